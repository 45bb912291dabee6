#!/usr/bin/env bash
# Runs an experiment on the devices of this machine, and again where it stopped if it is killed.
# To be called in the repository's folder, in an environment with serkd-jax installed.
#
#   launch/local.sh [--cpu-devices N] [--tries N] --config=configs/X.py --workdir=W [...]
#
# --cpu-devices N  splits the CPU into N virtual devices; without it, JAX's own devices are used.
# --tries N        starts at most N times (default 3) if the run is killed; an error (exit status 1)
#                  is not tried again.
set -uo pipefail
tries=3
while [ $# -gt 0 ]; do
  case "$1" in
    --cpu-devices)
      export JAX_PLATFORMS=cpu
      export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$2"
      shift 2 ;;
    --tries) tries=$2; shift 2 ;;
    *) break ;;
  esac
done
if [ $# -eq 0 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit 2
fi
for try in $(seq "$tries"); do
  python -m serkd_jax.main "$@"
  status=$?
  [ "$status" -le 1 ] && exit "$status"
  echo "try $try of $tries ended with status $status; what is done is kept" >&2
done
exit "$status"
