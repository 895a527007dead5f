#!/usr/bin/env bash
# Run a subcommand of mvd-scale on the hosts of a hostfile (launch/hostfile.example is an example).
# The repository must be at the same path on all hosts.
#
# Start on one host, which has pdsh and reaches the others by ssh without a password:
#
#   HOSTFILE=hostfile launch/multi_node.sh pretrain --recipe distill/b_from_b --data.source /videos
#
# Or start on every host, by a scheduler or by hand, without ssh:
#
#   HOSTFILE=hostfile MASTER_ADDR=10.0.0.1 NODE_RANK=0 launch/multi_node.sh pretrain ...    # on the first host
#   HOSTFILE=hostfile MASTER_ADDR=10.0.0.1 NODE_RANK=1 launch/multi_node.sh pretrain ...    # on the second
#
#   HOSTFILE         file of the hosts and the number of ranks on each; ./hostfile if not set
#   NODE_RANK        line of this host in the hostfile, from 0; leave it unset where ssh starts the other hosts
#   MASTER_ADDR      address of the first host; required with NODE_RANK, otherwise obtained from that host by ssh
#   MASTER_PORT      port of the rendezvous of the ranks; 29500 if not set
#   DS_ACCELERATOR   cpu for ranks on CPUs; this requires NODE_RANK, because ssh does not pass this variable on
#
# ssh passes NCCL_* on, and the variables in ~/.deepspeed_env, one NAME=VALUE per line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
(($#)) || mvd_fail "no subcommand: expected, for example, $0 pretrain --recipe distill/b_from_b"

HOSTFILE="${HOSTFILE:-hostfile}"
[[ -f "$HOSTFILE" ]] || mvd_fail "no hostfile at $HOSTFILE: write one like $mvd_root/launch/hostfile.example, and set HOSTFILE to its path"
# DeepSpeed's launcher answers a malformed hostfile with a traceback, or starts nothing without a word.
python -m mvd_scale.distributed.hostfile "$HOSTFILE" ${NODE_RANK:+"$NODE_RANK"}

words=(mvd_scale "$@")
options=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" --module --no_local_rank --quiet)
if [[ -n "${MASTER_ADDR:-}" ]]; then
    options+=(--master_addr "$MASTER_ADDR")
fi
if [[ -n "${NODE_RANK:-}" ]]; then
    [[ -n "${MASTER_ADDR:-}" ]] || mvd_fail "NODE_RANK is set, but MASTER_ADDR is not: set MASTER_ADDR to the address of the first host"
    if [[ "$NODE_RANK" == 0 ]]; then
        python "$mvd_root/mvd_scale/distributed/free_port.py" "${MASTER_PORT:-29500}" >/dev/null
    fi
    options+=(--no_ssh --node_rank "$NODE_RANK")
else
    # DeepSpeed makes a line for the shells of the other hosts out of the words.
    packed="$(python -m mvd_scale.distributed.remote_command pack mvd_scale "$@")"
    mapfile -t words <<<"$packed"
fi
mvd_launch deepspeed "${options[@]}" "${words[@]}"
