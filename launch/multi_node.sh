#!/usr/bin/env bash
# Run a subcommand of mvd-scale on the hosts of a hostfile (launch/hostfile.example shows one).
# This folder must be at the same path on all of them.
#
# Started on one host, which reaches the others by ssh without a password and has pdsh:
#
#   HOSTFILE=hostfile launch/multi_node.sh pretrain --recipe distill/b_from_b --data.source /videos
#
# Started on every host, by a scheduler or by hand, without ssh:
#
#   HOSTFILE=hostfile MASTER_ADDR=10.0.0.1 NODE_RANK=0 launch/multi_node.sh pretrain ...    # on the first host
#   HOSTFILE=hostfile MASTER_ADDR=10.0.0.1 NODE_RANK=1 launch/multi_node.sh pretrain ...    # on the second
#
#   HOSTFILE         the hosts and the ranks on each; ./hostfile if not set
#   NODE_RANK        line of this host in the hostfile, from 0; not set where ssh starts the others
#   MASTER_ADDR      address of the first host; needed with NODE_RANK, asked from the first host by ssh otherwise
#   MASTER_PORT      port where the ranks meet; 29500 if not set
#   DS_ACCELERATOR   set to cpu for ranks on CPUs; then give NODE_RANK, since ssh does not carry it
#
# Variables that ssh shall carry (NCCL_* goes by itself) stand in ~/.deepspeed_env, one NAME=VALUE a line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
(($#)) || mvd_fail "no subcommand: expected, for example, $0 pretrain --recipe distill/b_from_b"

HOSTFILE="${HOSTFILE:-hostfile}"
[[ -f "$HOSTFILE" ]] || mvd_fail "no hostfile at $HOSTFILE: write one like $mvd_root/launch/hostfile.example and name it in HOSTFILE"

options=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" --module --no_local_rank --quiet)
if [[ -n "${MASTER_ADDR:-}" ]]; then
    options+=(--master_addr "$MASTER_ADDR")
fi
if [[ -n "${NODE_RANK:-}" ]]; then
    [[ -n "${MASTER_ADDR:-}" ]] || mvd_fail "NODE_RANK is set, MASTER_ADDR is not: set it to the address of the first host"
    if ((NODE_RANK == 0)); then
        python "$mvd_root/launch/free_port.py" "${MASTER_PORT:-29500}" >/dev/null
    fi
    options+=(--no_ssh --node_rank "$NODE_RANK")
fi
mvd_launch deepspeed "${options[@]}" mvd_scale "$@"
