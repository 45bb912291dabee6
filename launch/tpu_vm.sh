#!/usr/bin/env bash
# Runs a program on all hosts of a Cloud TPU slice, and restarts it where it stopped. The slice is
# created if it does not exist, and again after each preemption. Call it in the repository's folder,
# on any machine that has gcloud, logged in and with a project set:
#
#   launch/tpu_vm.sh --name=serkd --zone=us-west4-a --type=v5litepod-16 \
#     --version=v2-alpha-tpuv5-lite --storage=gs://BUCKET --spot \
#     -m serkd_jax.main --config=configs/X.py --workdir=/mnt/serkd/runs/X
#
# --name, --zone, --type, --version  of the slice (`gcloud compute tpus tpu-vm create --help`)
# --storage=S   what all hosts mount at /mnt/serkd, for the workdir and the corpus: HOST:/SHARE by
#               NFS (Filestore), or gs://BUCKET by gcsfuse. A bucket needs a hierarchical namespace
#               (`gcloud storage buckets create --enable-hierarchical-namespace
#               --uniform-bucket-level-access`): without it, renaming a folder is not atomic,
#               and a checkpoint is completed by a rename.
# --spot        a cheaper slice that may be preempted
# --tries=K     give up after K crashes (default 3); preemptions do not count
# --dry-run     print the gcloud commands of one round, and run none
#
# The committed state of the repository (HEAD) is installed. Ctrl-C asks the run to save and end.
# After a lost connection, call this script again: it continues from the last checkpoint. The slice
# is kept and costs money until it is deleted; the command for that is printed.
#
# Not yet run on a TPU: tested with a stand-in for gcloud, and against the options and the source of
# gcloud 528.
set -uo pipefail

spot='' dry='' tries=3 name='' zone='' type='' version='' storage=''
usage() {
  sed -n '2,27s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
while [ $# -gt 0 ] && [ "$1" != -m ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --storage=*) storage=${1#*=} ;;
    --tries=*) tries=${1#*=} ;;
    --spot) spot=--spot ;;
    --dry-run) dry=yes ;;
    *) usage ;;
  esac
  shift
done
for value in "$name" "$zone" "$type" "$version" "$storage" "${1:-}"; do
  [ -n "$value" ] || usage
done

tpu() {
  local command=(gcloud compute tpus tpu-vm "$@" --zone="$zone")
  if [ -n "$dry" ]; then printf '%q ' "${command[@]}" && echo; else "${command[@]}"; fi
}
on_all_hosts() { tpu ssh "$name" --worker=all --command="$1"; }
say() { echo "launch/tpu_vm.sh: $*" >&2; }

state() { tpu describe "$name" --format='value(state)' 2>/dev/null || echo ABSENT; }
create() { tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+"$spot"}; }
delete() { tpu delete "$name" --quiet; }

# Returns when the slice is ready, creating it if needed. After a preemption there may be no
# capacity for hours, so it asks repeatedly; the first time, a failure rather means a wrong flag.
existed='' installed=''
get_slice() {
  while true; do
    case "$(state)" in
      READY) break ;;
      ABSENT)
        installed=''
        if ! create; then
          [ -n "$existed" ] || exit 1
          say "no slice yet; asks again in five minutes"
          sleep 300
        fi
        ;;
      PREEMPTED | TERMINATED)
        existed=yes installed=''
        delete
        ;;
      STOPPED | HIDDEN | UNKNOWN)
        say "$name is neither running nor gone: start it or delete it"
        exit 1
        ;;
      *) sleep 30 ;;
    esac
  done
  existed=yes
}

# uv provides a Python, as that of the TPU images is too old. Without metadata caching (ttl 0) every
# host sees what the others have written to the bucket.
mount_gs="sudo apt-get -qq install -y curl lsb-release
echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 ${storage#gs://} /mnt/serkd"
mount_nfs="sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common
sudo mount -t nfs $storage /mnt/serkd"
case "$storage" in gs://*) mount=$mount_gs ;; *) mount=$mount_nfs ;; esac
install="set -e
if ! mountpoint -q /mnt/serkd; then
sudo mkdir -p /mnt/serkd && sudo chown \"\$USER\" /mnt/serkd
$mount
fi
mkdir -p serkd-jax && tar -xzf serkd-jax.tar.gz -C serkd-jax && cd serkd-jax
curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d .venv ] || ~/.local/bin/uv venv --python 3.12
~/.local/bin/uv pip install --quiet -e '.[tpu]'"

install_project() {
  local folder archive
  folder=$(mktemp -d) && archive=$folder/serkd-jax.tar.gz
  git archive --format=tar.gz --output="$archive" HEAD &&
    tpu scp "$archive" "$name:" --worker=all &&
    on_all_hosts "$install"
  local status=$?
  rm -r "$folder"
  return "$status"
}

# gcloud starts a command again if its connection is lost, while the first may still be running. So
# the command stores its process id, by which it can be stopped.
run="cd serkd-jax && . .venv/bin/activate
pkill -KILL -F run.pid python 2>/dev/null; echo \$\$ >run.pid
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=30 JAX_COMPILATION_CACHE_DIR=/mnt/serkd/jax-cache
exec python $(printf '%q ' "$@")--coordinator=auto"
stop="pkill -TERM -F serkd-jax/run.pid python"

if [ -n "$dry" ]; then
  tpu describe "$name" --format='value(state)'
  create
  install_project
  on_all_hosts "$run"
  echo "# when it is interrupted:" && on_all_hosts "$stop"
  echo "# when it is preempted, before it is created again:" && delete
  exit 0
fi

keep() { say "$name is kept; to delete it: gcloud compute tpus tpu-vm delete $name --zone=$zone"; }
trap 'on_all_hosts "$stop"; say "asked the run to save and end"; exit 75' INT
trap keep EXIT
crashes=0
while true; do
  get_slice
  { [ -n "$installed" ] || install_project; } && installed=yes && on_all_hosts "$run"
  status=$?
  if [ "$status" = 0 ]; then exit 0; fi
  [ "$(state)" = READY ] || continue # whatever the status is, the lost slice is the cause
  case "$status" in
    1 | 2) exit "$status" ;;
    75) continue ;;
  esac
  crashes=$((crashes + 1))
  say "crash $crashes of $tries, status $status; what is done is kept"
  if [ "$crashes" -ge "$tries" ]; then exit "$status"; fi
done
