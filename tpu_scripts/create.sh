#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: create.sh [--no-wait] [--dry-run] [--settings=FILE]

Asks for the machines (a queued resource) and waits until they are there.

  --no-wait        only ask'
flags "$@"
wait=yes
for flag in ${REST[@]+"${REST[@]}"}; do
  case $flag in --no-wait) wait=no ;; *) no_more_flags "$flag" ;; esac
done
settings
check_accelerator
need gcloud

words=("--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" "--service-account=$SERVICE_ACCOUNT"
  --scopes=https://www.googleapis.com/auth/cloud-platform)
if [ "$SLICES" = 1 ]; then words+=("--node-id=$NAME"); else words+=("--node-count=$SLICES" "--node-prefix=$NAME"); fi
case $CAPACITY in spot) words+=(--spot) ;; reserved) words+=(--reserved) ;; esac
[ -z "$VALID_FOR" ] || words+=("--valid-until-duration=$VALID_FOR")
[ -z "$NETWORK" ] || words+=("--network=$NETWORK")
[ -z "$SUBNETWORK" ] || words+=("--subnetwork=$SUBNETWORK")
[ -z "$SSH_FLAGS" ] || words+=(--internal-ips)
queued create "$NAME" "${words[@]}"
[ $wait = yes ] || exit 0
note "then every $POLL_SECONDS s, until the state is ACTIVE:"
if [ "$DRY_RUN" = yes ]; then
  queued describe "$NAME" '--format=value(state.state)'
  exit 0
fi
before=
while true; do
  state=$(queued describe "$NAME" '--format=value(state.state)') || state="unknown (gcloud failed)"
  [ "$state" = "$before" ] || say "$(date +%T) $NAME: $state"
  before=$state
  case $state in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      fail "the machines were not given ($state); why: gcloud compute tpus queued-resources describe $NAME \
--project=$PROJECT --zone=$ZONE; then delete.sh, and try again or elsewhere"
      ;;
  esac
  sleep "$POLL_SECONDS"
done
