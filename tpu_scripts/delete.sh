#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: delete.sh [--dry-run] [--settings=FILE]

Gives the machines back, whatever runs on them (stop.sh saves first). What is in RUN_DIR stays.
'
flags "$@"
no_more_flags ${REST[@]+"${REST[@]}"}
settings
need gcloud

queued delete "$NAME" --force --quiet
