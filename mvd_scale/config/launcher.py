"""Environment variables that the launcher sets for each process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mvd_scale.errors import UserError


@dataclass(frozen=True)
class LaunchedRank:
    """This process among those that a launcher has started."""

    rank: int
    local_rank: int
    world_size: int

    host: str | None
    """Number of its host among those of the job; None if the launcher does not tell."""

    hosts: int | None
    """Number of hosts of the job; None if the launcher does not tell."""

    address: str
    """Address where the ranks meet."""

    port: int

    store_of_agent: bool
    """Whether torchrun's agent serves the store at that address, in place of rank 0."""

    attempt: int
    """Number of times that torchrun has started the ranks again; its store keeps what earlier ones wrote."""


def launched_rank(env: Mapping[str, str] = os.environ) -> LaunchedRank | None:
    """Read the place of this process among the ranks of a job; None without a launcher, which would set `RANK`.

    Args:
        env: variables of the process.

    Raises:
        UserError: `RANK` is set, but another variable is not.
    """
    if "RANK" not in env:
        return None
    check_environment(env)
    hosts = env.get("CROSS_SIZE", env.get("GROUP_WORLD_SIZE"))
    return LaunchedRank(
        rank=int(env["RANK"]),
        local_rank=int(env["LOCAL_RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        host=env.get("CROSS_RANK", env.get("GROUP_RANK")),
        hosts=None if hosts is None else int(hosts),
        address=env["MASTER_ADDR"],
        port=int(env["MASTER_PORT"]),
        store_of_agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def check_environment(env: Mapping[str, str] = os.environ) -> None:
    """Check that the launcher has set all variables of a rank, since it has set `RANK`.

    Raises:
        UserError: some are not set.
    """
    names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in env]:
        raise UserError(
            f"RANK is {env['RANK']}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: "
            "start ranks with the `deepspeed` launcher, or set RANK, LOCAL_RANK (number of the rank on its host; on "
            "Slurm $SLURM_LOCALID), WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each; to run one process, unset RANK"
        )


def env_rank() -> int:
    """Rank of this process, from `RANK`; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_world_size(world_size: int) -> int:
    """Number of ranks on this host, from `LOCAL_SIZE` or `LOCAL_WORLD_SIZE`; `world_size` without a launcher."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def chosen_interfaces(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Names of network interfaces that the user chose for gloo and NCCL, by variable; without those not set."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: env[name] for name in names if env.get(name)}


def job_end(env: Mapping[str, str] = os.environ) -> float | None:
    """Time at which Slurm ends this job, in seconds since 1970, from `SLURM_JOB_END_TIME`; None if it is not told."""
    end = env.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdecimal() else None
