#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: setup.sh [--dry-run] [--settings=FILE]

Brings this checkout (its commit, and changes to tracked files) and its packages to all hosts. Again after each
change of the code; files that git does not track do not go along.
'
flags "$@"
no_more_flags ${REST[@]+"${REST[@]}"}
settings
need gcloud git

upload=$HERE/upload
if [ "$DRY_RUN" = no ]; then
  upload=$(mktemp -d)
  trap 'rm -rf "$upload"' EXIT
  untracked=$(git -C "$REPOSITORY" ls-files --others --exclude-standard | wc -l)
  [ "$untracked" -eq 0 ] || say "note: $((untracked)) files are not tracked by git and stay here"
fi
run git -C "$REPOSITORY" bundle create --quiet "$upload/code.bundle" HEAD
run git -C "$REPOSITORY" diff --binary "--output=$upload/code.patch" HEAD
# shellcheck disable=SC2016,SC2088 # the host's own home
on_hosts 'mkdir -p ~/t5style-upload'
# shellcheck disable=SC2086 # SSH_FLAGS is one flag or none
queued scp "$upload/code.bundle" "$upload/code.patch" "$HERE/host.sh" "$NAME:t5style-upload/" \
  --node=all --worker=all $SSH_FLAGS
on_hosts 'bash t5style-upload/host.sh setup'
