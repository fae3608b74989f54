#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: project.sh [--dry-run] [--settings=FILE]

Prepares a project once: the APIs, the service account that the machines act as, and the bucket of RUN_DIR.
The project itself must exist and have billing (README.md). What is there already is left as it is.
'
flags "$@"
no_more_flags ${REST[@]+"${REST[@]}"}
settings
need gcloud

bucket=${RUN_DIR#gs://}
bucket=gs://${bucket%%/*}
account=${SERVICE_ACCOUNT%%@*}

# there NOTE COMMAND ...: whether COMMAND, which only looks, finds something
there() {
  note "$1:"
  shift
  if [ "$DRY_RUN" = yes ]; then
    run "$@"
    return 1
  fi
  "$@" >/dev/null 2>&1
}

run gcloud services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com "--project=$PROJECT"
run gcloud beta services identity create --service=tpu.googleapis.com "--project=$PROJECT"
there "if this finds no account, the next command makes it" \
  gcloud iam service-accounts describe "$SERVICE_ACCOUNT" "--project=$PROJECT" ||
  run gcloud iam service-accounts create "$account" '--display-name=t5style on TPU' "--project=$PROJECT"
there "if this finds no bucket, the next command makes it" \
  gcloud storage buckets describe "$bucket" "--project=$PROJECT" ||
  run gcloud storage buckets create "$bucket" "--project=$PROJECT" "--location=${ZONE%-*}" --uniform-bucket-level-access
run gcloud storage buckets add-iam-policy-binding "$bucket" \
  "--member=serviceAccount:$SERVICE_ACCOUNT" --role=roles/storage.objectAdmin
