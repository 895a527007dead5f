#!/usr/bin/env bash
# Check a machine with a GPU in stages of minutes, and write gpu_bringup/bringup.md: launch/gpu_bringup.sh --help
#
# Needs neither .venv nor a network: a Python with torch, Triton and numpy. Further packages may come as wheels.
#
#   MVD_PYTHON   Python interpreter to use; python3 if not set
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${MVD_PYTHON:-python3}" -m mvd_scale.performance.bringup "$@"
