#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: logs.sh [--all | --node=N --worker=N] [--lines=N] [--dry-run] [--settings=FILE]

Shows the last lines of the job and what follows, until Ctrl-C: of the first host, which says most.

  --all            of all hosts, each line with its host
  --node=N         slice N, from 0
  --worker=N       host N of that slice, from 0
  --lines=N        how many lines to begin with (default: 100)'
flags "$@"
node=0 worker=0 lines=100
for flag in ${REST[@]+"${REST[@]}"}; do
  case $flag in
    --all) node=all worker=all ;;
    --node=*) node=${flag#*=} ;;
    --worker=*) worker=${flag#*=} ;;
    --lines=*) lines=${flag#*=} ;;
    *) no_more_flags "$flag" ;;
  esac
done
[[ $lines =~ ^[0-9]+$ ]] || fail "--lines=$lines must be a whole number"
settings
need gcloud

on_hosts "bash t5style/tpu_scripts/host.sh log $lines" "--node=$node" "--worker=$worker"
