#!/usr/bin/env bash
# Run a subcommand of mvd-scale on all GPUs of this machine, or on CPU ranks where there is none:
#
#   launch/single_node.sh pretrain --recipe distill/b_from_b --data.source videos/
#
#   RANKS            number of ranks; all visible GPUs if not set, or 2 ranks on the CPU
#   MASTER_PORT      port where the ranks meet; a free one if not set
#   DS_ACCELERATOR   set to cpu to leave the GPUs alone
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
(($#)) || mvd_fail "no subcommand: expected, for example, $0 pretrain --recipe distill/b_from_b"

port="$(python "$mvd_root/launch/free_port.py" ${MASTER_PORT:+"$MASTER_PORT"})"
options=(--hostfile= --master_port "$port" --module --no_local_rank --quiet)

if [[ "${DS_ACCELERATOR:-}" == cpu ]] || ! nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then
    RANKS="${RANKS:-2}"
    export DS_ACCELERATOR=cpu
fi
# Without a number the launcher takes all GPUs, and heeds CUDA_VISIBLE_DEVICES.
if [[ -n "${RANKS:-}" ]]; then
    options+=(--num_gpus "$RANKS")
fi
mvd_launch deepspeed "${options[@]}" mvd_scale "$@"
