#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: status.sh [--dry-run] [--settings=FILE]

Says whether the machines are there and what the job does on each of them.
'
flags "$@"
no_more_flags ${REST[@]+"${REST[@]}"}
settings
need gcloud

queued list "--filter=name~/queuedResources/$NAME\$"
on_hosts 'bash t5style-upload/host.sh state'
