"""Rank that adds up the numbers of all ranks: `python -m tests.two_hosts.sum_ranks`, started as by a launcher."""

from __future__ import annotations

import os

import torch

from mvd_scale.distributed.process_group import destroy_distributed, init_distributed


def main() -> None:
    ranks = init_distributed("cpu", timeout_minutes=0.5)
    total = torch.tensor(ranks.rank + 1)
    torch.distributed.all_reduce(total)
    print(f"{total.item()} over {os.environ['GLOO_SOCKET_IFNAME']}")
    destroy_distributed()


if __name__ == "__main__":
    main()
