#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: launch.sh [FLAG ...] [--dry-run] [--settings=FILE]

Starts the job on all hosts and returns; logs.sh shows what it says. The same RUN_DIR resumes the run.

  FLAG             more flags for python -m t5style.main, after those of JOB, for example
                   --gin.Pretrain.profile_steps="(100, 102)"'
flags "$@"
for flag in ${REST[@]+"${REST[@]}"}; do
  case $flag in --gin*) ;; *) no_more_flags "$flag" ;; esac
done
settings
need gcloud

COMMAND+=(${REST[@]+"${REST[@]}"})
on_hosts "bash t5style/tpu_scripts/host.sh start $(quoted ${ENVIRONMENT_WORDS[@]+"${ENVIRONMENT_WORDS[@]}"} -- "${COMMAND[@]}")"
