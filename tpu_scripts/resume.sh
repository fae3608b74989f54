#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: resume.sh [--dry-run] [--settings=FILE]

Keeps the job going until it is done: asks for machines when there are none, sets them up, launches, and does so
again whenever they are taken away or the job ends without being done. The run goes on in the same RUN_DIR, from
its newest checkpoint. Leave it running in tmux on any machine that stays on; it may be stopped and started at any
time, for all that it knows it asks for. A job that fails by itself is started again MAX_RELAUNCHES times.
'
flags "$@"
no_more_flags ${REST[@]+"${REST[@]}"}
settings
check_accelerator
need gcloud git

# One of the scripts beside this one, with the same settings.
script() {
  local name=$1
  shift
  [ "$DRY_RUN" = no ] || set -- "$@" --dry-run
  "$HERE/$name" "$@" "--settings=$SETTINGS_FILE"
}

# shellcheck disable=SC2016 # the host's own name
ASK='bash t5style-upload/host.sh state 2>/dev/null || echo "state of $(hostname): empty"'

if [ "$DRY_RUN" = yes ]; then
  note "every $POLL_SECONDS s:"
  queued list "--filter=name~/queuedResources/$NAME\$" '--format=value(state.state)'
  note "when there is none, or after the delete:"
  script create.sh --no-wait
  note "when it is SUSPENDED or FAILED (preempted, or not given):"
  script delete.sh
  note "when it is ACTIVE, to see what the job does:"
  on_hosts "$ASK"
  note "when a host is new:"
  script setup.sh
  note "when the job runs on some hosts only, twice in a row:"
  script stop.sh
  note "when it does not run and is not done:"
  script launch.sh
  exit 0
fi

# The different states of the job on its hosts, in one line: 'running', 'done', 'empty running', ...
job_states() {
  local answer
  answer=$(on_hosts "$ASK" 2>/dev/null) || return 1
  printf '%s\n' "$answer" | sed -n 's/^.*state of [^:]*: //p' | sort -u | tr '\n' ' ' | sed 's/ $//'
}

before='' mixed=0 failures=0 healthy=0
tell() {
  [ "$*" = "$before" ] || say "$(date '+%F %T') $*"
  before=$*
}

# One look, and what follows from it. Whatever gcloud refuses is tried again at the next look.
look() {
  local state jobs
  state=$(resource_state) || { tell "gcloud does not answer; trying again"; return; }
  case $state in
    NONE)
      tell "there are no machines; asking for them"
      mixed=0 failures=0
      script create.sh --no-wait || true
      return
      ;;
    SUSPENDED | FAILED)
      tell "the machines are gone ($state); asking for new ones"
      mixed=0 failures=0
      script delete.sh || true
      return
      ;;
    ACTIVE) ;;
    *)
      tell "the machines are $state"
      return
      ;;
  esac
  jobs=$(job_states) || { tell "not all hosts answer; trying again"; return; }
  case $jobs in
    running)
      tell "the job runs on all hosts"
      mixed=0
      # Failures that lie far apart are not in a row.
      healthy=$((healthy + 1))
      if [ "$healthy" -ge 30 ]; then failures=0; fi
      ;;
    done)
      say "the job is done; delete.sh gives the machines back"
      exit 0
      ;;
    *running*)
      # Just started, just ended, or some hosts left behind, which wait for nothing.
      tell "the job runs on some hosts only ($jobs)"
      mixed=$((mixed + 1))
      if [ "$mixed" -ge 2 ]; then script stop.sh || true; fi
      ;;
    '') tell "no host says what it does; trying again" ;;
    *)
      tell "the job does not run ($jobs)"
      mixed=0 healthy=0
      case $jobs in
        *failed*)
          failures=$((failures + 1))
          [ "$failures" -le "$MAX_RELAUNCHES" ] ||
            fail "the job has failed by itself $failures times in a row; logs.sh --all says why"
          ;;
      esac
      case $jobs in *empty*) script setup.sh || return 0 ;; esac
      script launch.sh || true
      before=
      ;;
  esac
}

while true; do
  look
  sleep "$POLL_SECONDS"
done
