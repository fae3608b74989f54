#!/usr/bin/env bash
# What happens on each host: the other scripts call it there, over ssh or in a container.
set -euo pipefail

HELP='usage: host.sh setup | start [NAME=VALUE ...] -- COMMAND ... | stop | state | log [LINES] | run COMMAND ...

Run on the hosts themselves, by the other scripts.

  setup            code from ~/t5style-upload into ~/t5style, its packages into ~/t5style-env
  start            starts COMMAND as the systemd unit "t5style"; python is that of ~/t5style-env
  stop             asks it to save and end (SIGTERM), and waits
  state            prints running, done, stopped, failed STATUS, ready (never started) or empty (not set up)
  log              the last LINES of its output, and what follows
  run              runs COMMAND here. Ends with 0 only if its work is done: a training that was stopped and has
                   saved ends with 0 itself, here it is 143, so that GKE starts it again
  --dry-run        prints what would be run instead of running it
  --help           this text'

UNIT=t5style
CODE=$HOME/t5style
ENV=$HOME/t5style-env
UPLOAD=$HOME/t5style-upload
STATE=$HOME/t5style-state # what the last command came to
LOG=$HOME/t5style.log

fail() {
  printf 'error: %s: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

running() { systemctl is-active --quiet "$UNIT"; }

DRY_RUN=no
act() {
  if [ "$DRY_RUN" = yes ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

setup() {
  if [ "$DRY_RUN" = no ] && running; then fail "the job is running; stop.sh first"; fi
  act rm -rf "$CODE" "$STATE"
  act git -c advice.detachedHead=false clone --quiet "$UPLOAD/code.bundle" "$CODE"
  if [ "$DRY_RUN" = yes ] || [ -s "$UPLOAD/code.patch" ]; then
    act git -C "$CODE" apply "$UPLOAD/code.patch"
  fi
  # The images have Python 3.10; uv brings 3.11 without asking for root.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || act python3 -m pip install --quiet --user uv ||
    act python3 -m pip install --quiet --user --break-system-packages uv
  act uv venv --quiet --allow-existing --python 3.11 "$ENV"
  act uv pip install --quiet --python "$ENV/bin/python" --constraint "$CODE/constraints.txt" --editable "${CODE}[tpu]"
  [ "$DRY_RUN" = yes ] || printf '%s: set up, %s\n' "$(hostname)" "$(git -C "$CODE" log -1 --format='%h %s')"
}

start() {
  local words=()
  while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
    words+=("--setenv=$1")
    shift
  done
  [ "$#" -gt 1 ] || fail "start needs a command after --"
  shift
  if [ "$DRY_RUN" = no ]; then
    [ -x "$ENV/bin/python" ] || fail "it is not set up; setup.sh first"
    if running; then fail "the job is running already; stop.sh first"; fi
  fi
  # A unit of its own outlives the ssh connection, and at a shutdown gets SIGTERM and time to save. Only this
  # shell gets it (KillMode=mixed), and hands it on to Python alone, not to Python's own workers.
  act sudo systemctl reset-failed "$UNIT" 2>/dev/null || true
  act sudo systemd-run --quiet --unit="$UNIT" --uid="$(id -u)" --gid="$(id -g)" --working-directory="$CODE" \
    --property=KillMode=mixed --property=TimeoutStopSec=120 --property=LimitNOFILE=1048576 \
    --setenv=HOME="$HOME" --setenv=PATH="$ENV/bin:$PATH" --setenv=T5STYLE_LOG="$LOG" \
    ${words[@]+"${words[@]}"} bash "$CODE/tpu_scripts/host.sh" run "${@//\$/\$\$}" # systemd reads $$ as $
}

stop() {
  act sudo systemctl stop "$UNIT" || true
}

state() {
  local word=empty
  if running; then
    word=running
  elif [ -e "$STATE" ]; then
    word=$(cat "$STATE")
    # The unit is gone without having said so: the machine was, in between.
    [ "$word" != running ] || word=stopped
  elif [ -x "$ENV/bin/python" ]; then
    word=ready
  fi
  printf 'state of %s: %s\n' "$(hostname)" "$word"
}

log() {
  local name
  name=$(hostname)
  tail -n "${1:-100}" -F "$LOG" | sed -u "s/^/$name: /"
}

run() {
  [ "$#" -gt 0 ] || fail "run needs a command"
  # A new ending for each start; the log of all starts is one.
  if [ -n "${T5STYLE_LOG:-}" ]; then exec >>"$T5STYLE_LOG" 2>&1; fi
  export T5STYLE_DONE_FILE
  T5STYLE_DONE_FILE=$(mktemp -u)
  printf 'running\n' >"$STATE"
  printf '== %s: %s\n' "$(date -u +%FT%TZ)" "$*"
  local child status woken=yes
  "$@" &
  child=$!
  trap 'woken=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT
  # A signal ends `wait` early; the command's own status comes from the one that no signal ended.
  while [ "$woken" = yes ]; do
    woken=no status=0
    wait "$child" || status=$?
  done
  if [ "$status" = 0 ] && [ ! -e "$T5STYLE_DONE_FILE" ]; then status=143; fi
  rm -f "$T5STYLE_DONE_FILE"
  case $status in
    0) printf 'done\n' >"$STATE" ;;
    143) printf 'stopped\n' >"$STATE" ;;
    *) printf 'failed %s\n' "$status" >"$STATE" ;;
  esac
  printf '== %s: %s\n' "$(date -u +%FT%TZ)" "$(cat "$STATE")"
  exit "$status"
}

while [ "$#" -gt 0 ]; do
  case $1 in
    -h | --help)
      printf '%s\n' "$HELP"
      exit 0
      ;;
    --dry-run) DRY_RUN=yes && shift ;;
    *) break ;;
  esac
done
case ${1:-} in
  setup | start | stop | state | log | run) "$@" ;;
  *) fail "host.sh does not know '${1:-}'; --help shows what it knows" ;;
esac
