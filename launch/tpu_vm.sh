#!/usr/bin/env bash
# A run on Cloud TPU VMs, from a queued resource to its last step.
#
#   bash launch/tpu_vm.sh create  NAME TYPE [SLICES]   asks for SLICES (1) slices of an accelerator type, e.g. v5p-128
#   bash launch/tpu_vm.sh wait    NAME                 until they are there
#   bash launch/tpu_vm.sh install NAME TYPE [SLICES]   this commit, its environment and the bucket, on every machine
#   bash launch/tpu_vm.sh run     NAME TYPE SLICES RUN EXPERIMENT [OVERRIDES]
#                                                      starts, or goes on with, gs://$GLMV_BUCKET/RUN in the background
#   bash launch/tpu_vm.sh state   NAME TYPE [SLICES]   ABSENT, or what Google says; behind ACTIVE whether the run is idle
#                                                      (not begun), running or ended
#   bash launch/tpu_vm.sh log     NAME TYPE [SLICES]   what the first machine says and goes on to say; with LINES behind
#                                                      SLICES the last of it alone
#   bash launch/tpu_vm.sh stop    NAME TYPE [SLICES]   on every machine; a checkpoint is written first
#   bash launch/tpu_vm.sh resume  NAME TYPE SLICES RUN EXPERIMENT [OVERRIDES]
#                                                      after a spot slice was taken away: delete, create, wait, install
#                                                      and run
#   bash launch/tpu_vm.sh delete  NAME                 gives the machines back
#
#   bash launch/tpu_vm.sh --dry-run ...                prints what it would do, and does nothing
#
# For instance
#   export GLMV_ZONE=us-east5-a GLMV_BUCKET=my-bucket
#   bash launch/tpu_vm.sh create vlm v5p-128 && bash launch/tpu_vm.sh wait vlm
#   bash launch/tpu_vm.sh install vlm v5p-128
#   bash launch/tpu_vm.sh run vlm v5p-128 1 pretrain experiments/vlm_pretrain.py:size=l --config.batch=512
#
# It needs gcloud with a project (`gcloud config set project ...`) and reads
#   GLMV_ZONE     the zone, required
#   GLMV_BUCKET   bucket that runs are kept in; required by install, run and resume
#   GLMV_TIER     spot (default), on-demand or reserved
#   GLMV_RUNTIME  software version of the machines; default by type
# TPU7x (Ironwood) is to be had on Kubernetes only: launch/gke_jobset.yaml.
set -euo pipefail

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

DRY_RUN=""
case "${1:-}" in
  -h | --help | "") usage && exit 0 ;;
  --dry-run) DRY_RUN=1 && shift ;;
  -*) glmv_fail "unknown option $1; see bash launch/tpu_vm.sh --help" ;;
esac
COMMAND="${1:-}" NAME="${2:-}" TYPE="${3:-}" SLICES="${4:-1}"
ZONE="${GLMV_ZONE:-}"

# A command as it could be typed.
show() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@-]+$ ]] || word="'${word//\'/$quote}'"
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Every change to the world goes through here.
do_it() {
  if [[ -n "$DRY_RUN" ]]; then
    show "$@"
  else
    "$@"
  fi
}

# ----------------------------------------------------------------------------------------------------------------------
# What is asked for
# ----------------------------------------------------------------------------------------------------------------------

check() {
  [[ "$NAME" =~ ^[a-z][a-z0-9-]{0,38}$ ]] || glmv_fail "the name is small letters, digits and -, not '$NAME'"
  [[ -n "$ZONE" ]] || glmv_fail "no zone; export GLMV_ZONE=us-east5-a or another one that has the type"
  [[ -n "$DRY_RUN" ]] || command -v gcloud >/dev/null || glmv_fail "gcloud is not installed; see cloud.google.com/sdk"
  case "$COMMAND" in wait | delete) return ;; esac
  [[ "$TYPE" =~ ^[a-z0-9]+-[0-9]+$ ]] || glmv_fail "the accelerator type is like v5p-128, not '$TYPE'"
  [[ "$TYPE" != tpu7x-* ]] || glmv_fail "tpu7x is to be had on Kubernetes only; use launch/gke_jobset.yaml"
  [[ "$SLICES" =~ ^[1-9][0-9]*$ ]] || glmv_fail "the number of slices is a whole number, not '$SLICES'"
}

need_bucket() { [[ -n "${GLMV_BUCKET:-}" ]] || glmv_fail "no bucket; export GLMV_BUCKET=a bucket to keep runs in"; }

runtime() {
  case "${GLMV_RUNTIME:-$TYPE}" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    "$TYPE") glmv_fail "no software version known for $TYPE; export GLMV_RUNTIME=..." ;;
    *) echo "$GLMV_RUNTIME" ;;
  esac
}

tier() {
  case "${GLMV_TIER:-spot}" in
    spot) echo --spot ;;
    on-demand) ;;
    reserved) echo --reserved ;;
    *) glmv_fail "GLMV_TIER=$GLMV_TIER is not known; use spot, on-demand or reserved" ;;
  esac
}

# The nodes of a queued resource: one has its name, several have it as a prefix.
nodes() {
  local n
  if [[ "$SLICES" == 1 ]]; then echo "$NAME"; else for ((n = 0; n < SLICES; n++)); do echo "$NAME-$n"; done; fi
}

# ----------------------------------------------------------------------------------------------------------------------
# The machines
# ----------------------------------------------------------------------------------------------------------------------

queued() { do_it gcloud compute tpus queued-resources "$@" "--zone=$ZONE"; }

create() {
  local version which tiers
  version="$(runtime)"
  tiers="$(tier)"
  which=("--node-id=$NAME")
  [[ "$SLICES" == 1 ]] || which=("--node-count=$SLICES" "--node-prefix=$NAME")
  queued create "$NAME" "${which[@]}" "--accelerator-type=$TYPE" "--runtime-version=$version" ${tiers:+"$tiers"}
}

# What Google says of the queued resource, ABSENT where there is none.
google_says() {
  local errors now failed=0
  errors="$(mktemp)"
  now="$(queued describe "$NAME" "--format=value(state.state)" 2>"$errors")" || failed=1
  if [[ "$failed" == 1 ]] && grep -q NOT_FOUND "$errors"; then
    now=ABSENT failed=0
  fi
  if [[ "$failed" == 0 ]]; then echo "$now"; else cat "$errors" >&2; fi
  rm "$errors"
  return "$failed"
}

wait_for() {
  local now
  if [[ -n "$DRY_RUN" ]]; then
    echo "# every 30 s until it says ACTIVE; FAILED or SUSPENDED ends it"
    queued describe "$NAME" "--format=value(state.state)"
    return
  fi
  while :; do
    now="$(google_says)"
    [[ "$now" != ACTIVE ]] || break
    [[ "$now" != ABSENT ]] || glmv_fail "there is no $NAME; create it"
    [[ "$now" != FAILED && "$now" != SUSPENDED ]] || glmv_fail "$NAME is $now; delete it and create it again"
    echo "$NAME: $now" && sleep 30
  done
}

delete() { queued delete "$NAME" --force --quiet; }

# A command on machines of all nodes at once; on which, the first argument says.
on() {
  local node
  for node in $(nodes); do
    do_it gcloud compute tpus tpu-vm ssh "$node" "--zone=$ZONE" "--worker=$1" "--command=$2" &
    [[ -z "$DRY_RUN" ]] || wait $!  # in order on paper
  done
  local failed=0 job
  for job in $(jobs -p); do wait "$job" || failed=1; done
  [[ "$failed" == 0 ]] || glmv_fail "the command failed on a machine of $NAME (see above)"
}

# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------

# On a machine, as often as one likes: Python (theirs is 3.10), this package, and the bucket as the folder `runs`, where
# all hosts write their part of a checkpoint.
# shellcheck disable=SC2016  # the variables are theirs
PREPARE='set -e
python3.12 -c "import venv, ensurepip" 2>/dev/null || {
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get install -y python3.12 python3.12-venv
}
command -v gcsfuse >/dev/null || {
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update
  sudo apt-get install -y gcsfuse
}
mkdir -p glmv_jax runs
tar -xzf glmv_jax.tar.gz -C glmv_jax
mountpoint -q runs || gcsfuse --implicit-dirs "$bucket" runs
source glmv_jax/launch/install.sh
glmv_environment tpu'

install() {
  need_bucket
  local archive node
  archive="${TMPDIR:-/tmp}/glmv_jax-$NAME.tar.gz"
  do_it git -C "$GLMV_REPO" archive --format=tar.gz "--output=$archive" HEAD
  for node in $(nodes); do
    do_it gcloud compute tpus tpu-vm scp "$archive" "$node:glmv_jax.tar.gz" "--zone=$ZONE" --worker=all
  done
  on all "bucket=$GLMV_BUCKET; $PREPARE"
}

run() {
  need_bucket
  local workdir="${5:-}" experiment="${6:-}" train
  [[ -n "$workdir" && -n "$experiment" ]] || glmv_fail "run needs RUN and EXPERIMENT; see bash launch/tpu_vm.sh --help"
  printf -v train '%q ' .venv/bin/glmv train --config "$experiment" --workdir "../runs/$workdir" "${@:7}"
  # exec: the process that is remembered is the one that is told to stop.
  on all "(cd glmv_jax && exec nohup ${train}> ../train.log 2>&1 < /dev/null) & echo \$! > train.pid"
}

# A command on the first machine.
on_first() {
  local all
  all="$(nodes)"
  do_it gcloud compute tpus tpu-vm ssh "${all%%$'\n'*}" "--zone=$ZONE" --worker=0 "--command=$1"
}

log() {
  local lines="${5:-}"
  [[ -z "$lines" || "$lines" =~ ^[1-9][0-9]*$ ]] || glmv_fail "LINES is a whole number, not '$lines'"
  on_first "tail -n ${lines:-40 -F} train.log"
}

# shellcheck disable=SC2016  # the files are theirs
STATE='if [ ! -e train.pid ]; then echo idle
elif kill -0 "$(cat train.pid)" 2>/dev/null; then echo running
else echo ended; fi'

state() {
  if [[ -n "$DRY_RUN" ]]; then
    queued describe "$NAME" "--format=value(state.state)"
    on_first "$STATE"
    return
  fi
  local now run
  now="$(google_says)"
  if [[ "$now" == ACTIVE ]]; then
    run="$(on_first "$STATE")"
    now+=" ${run##*$'\n'}"
  fi
  echo "$now"
}

# shellcheck disable=SC2016  # the file is theirs
stop() { on all 'kill -TERM "$(cat train.pid)"'; }

resume() {
  need_bucket
  delete
  create
  wait_for
  install
  run "$@"
}

case "$COMMAND" in
  create | install | run | state | log | stop | resume | delete) check && "$COMMAND" "$@" ;;
  wait) check && wait_for ;;
  *) glmv_fail "no command '$COMMAND'; see bash launch/tpu_vm.sh --help" ;;
esac
