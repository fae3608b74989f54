#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: profile.sh [FOLDER] [--dry-run] [--settings=FILE]

Fetches the traces and the stacks of hanging hosts that the run has left in RUN_DIR. The traces of all hosts are
one session for xprof. To have steps traced:

  stop.sh && launch.sh --gin.Pretrain.profile_steps="(FIRST, LAST)"      # at most 20 steps, from 1

  FOLDER           where to put them (default: ./profile-NAME)'
flags "$@"
settings
folder=${REST[0]-./profile-$NAME}
no_more_flags ${REST[@]+"${REST[@]:1}"}
case $folder in -*) no_more_flags "$folder" ;; esac
need gcloud

run mkdir -p "$folder"
for part in profile stacks; do
  # A run that never hung has no stacks.
  run gcloud storage cp "$RUN_DIR/$part" "$folder/" --recursive || say "there is no $RUN_DIR/$part"
done
say "pip install xprof && xprof --logdir=$folder/profile --port=6006"
