#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: stop.sh [--dry-run] [--settings=FILE]

Asks the job on all hosts to finish its step and save, and waits for it. launch.sh goes on from there.
'
flags "$@"
no_more_flags ${REST[@]+"${REST[@]}"}
settings
need gcloud

on_hosts 'bash t5style/tpu_scripts/host.sh stop'
