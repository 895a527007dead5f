#!/usr/bin/env bash
# Run a subcommand of mvd-scale on all GPUs of this machine, or on CPU ranks if there is no GPU:
#
#   launch/single_node.sh pretrain --recipe distill/b_from_b --data.source videos/
#
#   RANKS            number of ranks; if not set, one per visible GPU, or 2 ranks on the CPU
#   MASTER_PORT      port of the rendezvous of the ranks; a free port if not set
#   DS_ACCELERATOR   cpu for ranks on the CPU although there are GPUs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
(($#)) || mvd_fail "no subcommand: expected, for example, $0 pretrain --recipe distill/b_from_b"

port="$(python "$mvd_root/mvd_scale/distributed/free_port.py" ${MASTER_PORT:+"$MASTER_PORT"})"
options=(--hostfile= --master_port "$port" --module --no_local_rank --quiet)

# Not piped: where grep ends at the first line, SIGPIPE ends nvidia-smi, and pipefail would count that as no GPU.
gpus="$(nvidia-smi --list-gpus 2>/dev/null || true)"
if [[ "${DS_ACCELERATOR:-}" == cpu || $'\n'"$gpus" != *$'\nGPU '* ]]; then
    RANKS="${RANKS:-2}"
    [[ "${DS_ACCELERATOR:-}" == cpu ]] || echo "nvidia-smi lists no GPU: $RANKS ranks on the CPU" >&2
    export DS_ACCELERATOR=cpu
fi
# Without --num_gpus, the launcher takes all visible GPUs (CUDA_VISIBLE_DEVICES).
if [[ -n "${RANKS:-}" ]]; then
    options+=(--num_gpus "$RANKS")
fi
mvd_launch deepspeed "${options[@]}" mvd_scale "$@"
