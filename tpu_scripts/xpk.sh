#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HELP='usage: xpk.sh cluster | image | launch [FLAG ...] | status | logs | stop | delete-cluster
              [--dry-run] [--settings=FILE]

The same job on Google Kubernetes Engine, by XPK (tried with the flags of xpk 1.16). GKE brings back machines that
were taken away and starts the job again, up to MAX_RESTARTS times; it resumes in the same RUN_DIR.

  cluster          makes the cluster CLUSTER with SLICES slices of ACCELERATOR_TYPE
  image            builds this checkout into IMAGE and pushes it
  launch           starts the job; FLAGs are added to those of JOB
  status           lists the jobs of the cluster
  logs             what the hosts say, and what follows
  stop             ends the job; it saves first
  delete-cluster   gives the machines back'
flags "$@"
verb=${REST[0]-}
REST=(${REST[@]+"${REST[@]:1}"})
case $verb in
  cluster | image | status | logs | stop | delete-cluster) no_more_flags ${REST[@]+"${REST[@]}"} ;;
  launch)
    for flag in ${REST[@]+"${REST[@]}"}; do
      case $flag in --gin*) ;; *) no_more_flags "$flag" ;; esac
    done
    ;;
  *) fail "xpk.sh needs one of cluster, image, launch, status, logs, stop, delete-cluster; not '$verb'" ;;
esac
settings
[[ $CLUSTER =~ ^[a-z][a-z0-9-]{0,38}[a-z0-9]$ ]] || bad CLUSTER "must be lower-case letters, digits and hyphens"
[[ $IMAGE =~ ^[a-z0-9.-]+/.+:.+$ ]] || bad IMAGE "must be REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG"
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || bad MAX_RESTARTS "must be a whole number from 0"

region=${ZONE%-*}
where=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
case $verb in
  cluster)
    need xpk gcloud kubectl
    case $CAPACITY in
      reserved) fail "CAPACITY=reserved: xpk wants the reservation's name; run xpk cluster create \
--reservation=NAME yourself, with the flags that --dry-run shows for CAPACITY=spot" ;;
    esac
    run xpk cluster create "${where[@]}" "--tpu-type=$ACCELERATOR_TYPE" "--num-slices=$SLICES" "--$CAPACITY"
    ;;
  image)
    need docker gcloud
    path=${IMAGE#*/*/}
    run gcloud artifacts repositories create "${path%%/*}" --repository-format=docker "--location=${IMAGE%%-docker*}" \
      "--project=$PROJECT" || say "(it is there already, or the push will say what is wrong)"
    run gcloud auth configure-docker "${IMAGE%%/*}" --quiet
    run docker build --platform=linux/amd64 "--file=$HERE/Dockerfile" "--tag=$IMAGE" "$REPOSITORY"
    run docker push "$IMAGE"
    ;;
  launch)
    need xpk gcloud kubectl
    COMMAND+=(${REST[@]+"${REST[@]}"})
    words=()
    for word in ${ENVIRONMENT_WORDS[@]+"${ENVIRONMENT_WORDS[@]}"}; do words+=("--env=$word"); done
    # exec: xpk sends SIGTERM to the shell around the command, which would not hand it on.
    run xpk workload create "${where[@]}" "--workload=$NAME" "--tpu-type=$ACCELERATOR_TYPE" "--num-slices=$SLICES" \
      "--docker-image=$IMAGE" "--max-restarts=$MAX_RESTARTS" --termination-grace-period-seconds=120 \
      ${words[@]+"${words[@]}"} "--command=exec bash tpu_scripts/host.sh run $(quoted "${COMMAND[@]}")"
    ;;
  status)
    need xpk
    run xpk workload list "${where[@]}"
    ;;
  logs)
    need gcloud kubectl
    run gcloud container clusters get-credentials "$CLUSTER" "--location=$region" "--project=$PROJECT" --dns-endpoint
    run kubectl logs --follow --prefix --all-containers --tail=100 --max-log-requests=1024 \
      "--selector=xpk.google.com/workload=$NAME"
    ;;
  stop)
    need xpk
    run xpk workload delete "${where[@]}" "--workload=$NAME" --force
    ;;
  delete-cluster)
    need xpk gcloud
    run xpk cluster delete "${where[@]}" --force
    ;;
esac
