# shellcheck shell=bash
# Shared by the scripts here: flags, settings, and running or printing of commands. It is sourced, not run.
# Works with bash 3.2, which macOS has.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # for the scripts that source this file
REPOSITORY=$(dirname "$HERE")
SETTINGS_FILE=$HERE/settings.env
DRY_RUN=no
REST=()
NAMES="PROJECT ZONE NAME ACCELERATOR_TYPE SLICES CAPACITY RUNTIME_VERSION VALID_FOR NETWORK SUBNETWORK \
SERVICE_ACCOUNT SSH_FLAGS RUN_DIR JOB ENVIRONMENT POLL_SECONDS MAX_RELAUNCHES CLUSTER IMAGE MAX_RESTARTS"

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

say() { printf '%s\n' "$*" >&2; }

# Words as one line of shell, quoted where needed.
quoted() {
  local word line=
  for word in "$@"; do
    case $word in
      '' | *[!a-zA-Z0-9_@%+=:,./-]*) printf -v word "'%s'" "${word//\'/\'\\\'\'}" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command; with --dry-run prints it.
run() {
  if [ "$DRY_RUN" = yes ]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# A remark among the commands of --dry-run.
note() { [ "$DRY_RUN" = no ] || printf '# %s\n' "$*"; }

# Takes --help, --dry-run and --settings=FILE from the arguments; the others are left in REST.
# The script's HELP says which those may be.
flags() {
  local argument
  for argument in "$@"; do
    case $argument in
      -h | --help)
        printf '%s\n\n%s\n' "${HELP%$'\n'}" "  --dry-run        print every command instead of running it
  --settings=FILE  the settings (default: $HERE/settings.env)
  --help           this text"
        exit 0
        ;;
      --dry-run) DRY_RUN=yes ;;
      --settings=*) SETTINGS_FILE=${argument#*=} ;;
      *) REST+=("$argument") ;;
    esac
  done
}

# Fails if an argument is left that the script does not know.
no_more_flags() {
  [ "$#" = 0 ] || fail "$(basename "$0") does not know ${1}; --help shows what it knows"
}

# Reads and checks the settings file.
settings() {
  local line name value number=0 seen=' '
  for name in $NAMES; do printf -v "$name" ''; done
  [ -f "$SETTINGS_FILE" ] || fail "there is no settings file $SETTINGS_FILE: copy $HERE/settings.example.env \
to $HERE/settings.env and fill it in, or give --settings=FILE"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%$'\r'}
    case $line in '' | '#'*) continue ;; esac
    name=${line%%=*}
    [ "$name" != "$line" ] || fail "$SETTINGS_FILE:$number: '$line' is not of the form NAME=value"
    case " $NAMES " in
      *" $name "*) ;;
      *) fail "$SETTINGS_FILE:$number: there is no setting '$name'; there are: $NAMES" ;;
    esac
    case $seen in *" $name "*) fail "$SETTINGS_FILE:$number: $name is set a second time" ;; esac
    seen="$seen$name "
    value=${line#*=}
    case $value in
      \"*\" | \'*\') value=${value:1:${#value}-2} ;;
    esac
    printf -v "$name" '%s' "$value"
  done <"$SETTINGS_FILE"
  SLICES=${SLICES:-1}
  CAPACITY=${CAPACITY:-spot}
  POLL_SECONDS=${POLL_SECONDS:-60}
  MAX_RELAUNCHES=${MAX_RELAUNCHES:-3}
  check_settings
}

# bad NAME 'what it must be'
bad() { fail "$1='${!1}' in $SETTINGS_FILE: $2"; }

check_settings() {
  [[ $PROJECT =~ ^[a-z][a-z0-9-]{4,28}[a-z0-9]$ ]] ||
    bad PROJECT "must be a project's id, 6 to 30 lower-case letters, digits and hyphens (gcloud projects list)"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || bad ZONE "must be a zone such as us-west4-a"
  # shellcheck disable=SC2153 # set by name above
  [[ $NAME =~ ^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$ ]] ||
    bad NAME "must be 1 to 30 lower-case letters, digits and hyphens, a letter first"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || bad SLICES "must be a whole number from 1"
  case $CAPACITY in
    spot | on-demand | reserved) ;;
    *) bad CAPACITY "must be spot, on-demand or reserved" ;;
  esac
  [[ $VALID_FOR =~ ^([1-9][0-9]*[smhd])?$ ]] || bad VALID_FOR "must be a time such as 6h or 2d, or empty"
  case $SSH_FLAGS in
    '' | --tunnel-through-iap | --internal-ip) ;;
    *) bad SSH_FLAGS "must be empty, --tunnel-through-iap or --internal-ip" ;;
  esac
  [[ $RUN_DIR =~ ^gs://[^/]+/.*[^/]$ ]] ||
    bad RUN_DIR "must be gs://BUCKET/FOLDER: the hosts share no disk, and lose theirs when they are taken away"
  [[ $POLL_SECONDS =~ ^[1-9][0-9]*$ ]] || bad POLL_SECONDS "must be a whole number of seconds from 1"
  [[ $MAX_RELAUNCHES =~ ^[0-9]+$ ]] || bad MAX_RELAUNCHES "must be a whole number from 0"
  SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-t5style-tpu@$PROJECT.iam.gserviceaccount.com}
  [ -n "$JOB" ] || bad JOB "must hold the flags of python -m t5style.main, at least one --gin_file=FILE"
  split JOB && JOB_WORDS=("${WORDS[@]}")
  case " ${JOB_WORDS[*]}" in *" --gin.RUN_DIR="*) bad JOB "must not set RUN_DIR, which has a line of its own" ;; esac
  case " ${JOB_WORDS[*]}" in *" --gin_file="*) ;; *) bad JOB "names no --gin_file=FILE" ;; esac
  split ENVIRONMENT && ENVIRONMENT_WORDS=(${WORDS[@]+"${WORDS[@]}"})
  local word
  for word in ${ENVIRONMENT_WORDS[@]+"${ENVIRONMENT_WORDS[@]}"}; do
    [[ $word =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || bad ENVIRONMENT "'$word' is not of the form NAME=value"
  done
  # shellcheck disable=SC2034 # for the scripts that source this file
  COMMAND=(python -m t5style.main "${JOB_WORDS[@]}" "--gin.RUN_DIR=$RUN_DIR")
}

# Splits a setting's value into WORDS as a shell would, without expanding anything.
split() {
  local words
  WORDS=()
  words=$(printf '%s' "${!1}" | xargs -n 1 printf '%s\n' 2>/dev/null) || bad "$1" "a quote is not closed"
  local word
  while IFS= read -r word; do
    [ -z "$word" ] || WORDS+=("$word")
  done <<<"$words"
}

# For Cloud TPU VMs (and not GKE): checks ACCELERATOR_TYPE and finds its RUNTIME_VERSION.
check_accelerator() {
  local size=${ACCELERATOR_TYPE##*-} version
  case $ACCELERATOR_TYPE in
    v5e-*) bad ACCELERATOR_TYPE "gcloud calls it v5litepod-$size" ;;
    tpu7x* | v7x*) bad ACCELERATOR_TYPE "this generation is on GKE only: use xpk.sh" ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) bad ACCELERATOR_TYPE "must be one of v2-N, v3-N, v4-N, v5litepod-N, v5p-N, v6e-N" ;;
  esac
  case $ACCELERATOR_TYPE in
    v5litepod-* | v6e-*)
      [[ $size =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
        bad ACCELERATOR_TYPE "it comes with 1, 4, 8, 16, 32, 64, 128 or 256 chips"
      ;;
    *)
      [[ $size =~ ^[1-9][0-9]*$ ]] || size=1
      [ $((size % 8)) = 0 ] || bad ACCELERATOR_TYPE "the number is of cores, a multiple of 8"
      ;;
  esac
  RUNTIME_VERSION=${RUNTIME_VERSION:-$version}
}

# Without --dry-run the programs must be there.
need() {
  local program
  [ "$DRY_RUN" = yes ] && return
  for program in "$@"; do
    command -v "$program" >/dev/null || fail "there is no program '$program' here; README.md says how to get it"
  done
}

queued() { # queued COMMAND ...: gcloud compute tpus queued-resources, in the project and zone
  local command=$1
  shift
  run gcloud compute tpus queued-resources "$command" "$@" "--project=$PROJECT" "--zone=$ZONE"
}

# on_hosts COMMAND [--node=N --worker=N]: runs a line of shell on all hosts of all slices, or on those.
on_hosts() {
  local command=$1
  shift
  [ "$#" -gt 0 ] || set -- --node=all --worker=all
  # shellcheck disable=SC2086 # SSH_FLAGS is one flag or none
  queued ssh "$NAME" "$@" "--command=$command" $SSH_FLAGS
}

# State of the queued resource, or NONE. Fails where gcloud does: a lost connection is not a lost machine.
resource_state() {
  local state
  state=$(gcloud compute tpus queued-resources list "--project=$PROJECT" "--zone=$ZONE" \
    "--filter=name~/queuedResources/$NAME\$" '--format=value(state.state)') || return 1
  printf '%s' "${state:-NONE}"
}
