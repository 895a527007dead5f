"""Rendezvous of the ranks of a job: its address, and its store, which listens at this address alone."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any

import torch

from mvd_scale.distributed.interface import (
    Endpoint,
    list_outer_addresses,
    listen_at,
    set_interface,
    set_only_interface,
)
from mvd_scale.errors import UserError

_RETRY_SECONDS = 1.0

CONNECTIONS_OF_A_RANK = 3
"""Connections of each rank to the store: of its main thread, its writer of checkpoints and its watchdog."""

_OWN_FILES = 256
"""Files that a rank opens besides: 35 in a small run, and pipes of its data workers."""


def resolve_endpoint(host: str, port: int, timeout: timedelta) -> Endpoint:
    """Resolve the address of the rendezvous; waits for a name that is not known yet, as of a pod that starts.

    Raises:
        UserError: the name has no address within the timeout.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return Endpoint(host, port, str(found[0][4][0]))
        except socket.gaierror as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"MASTER_ADDR {host!r} has no address ({error.strerror}): set it to a name or an address of the "
                    "host of rank 0 that every host knows"
                ) from error
        time.sleep(_RETRY_SECONDS)


def has_own_meaning_here(endpoint: Endpoint, *, several_hosts: bool) -> bool:
    """Whether the name of the rendezvous is a loopback address on this host alone, so that it says nothing of the way.

    A name that stands in `/etc/hosts` beside 127.0.1.1, as Debian writes it, is another address on other hosts.

    Raises:
        UserError: so it is, and a rank would serve the store at an address that other hosts cannot reach.
    """
    if not several_hosts or not endpoint.is_loopback or endpoint.host in ("localhost", endpoint.address):
        return False
    if not _agent_serves():
        raise UserError(
            f"MASTER_ADDR {endpoint.host} is {endpoint.address} on its own host, which other hosts cannot reach: set "
            f"MASTER_ADDR to an address of this host ({list_outer_addresses()}), or to 127.0.0.1 for a job on one host"
        )
    return True


def choose_way(
    endpoint: Endpoint, environment: MutableMapping[str, str], *, several_hosts: bool, device: torch.device
) -> None:
    """Set the variables by which gloo and NCCL find the interface to the other ranks, unless the user has set one.

    Args:
        endpoint: address of the rendezvous.
        environment: variables of this process.
        several_hosts: whether the job has several hosts.
        device: device of this rank: those of CPUs reduce over gloo.

    Raises:
        UserError: no interface leads there, or nothing tells which; or as `has_own_meaning_here`.
    """
    if has_own_meaning_here(endpoint, several_hosts=several_hosts):
        set_only_interface(endpoint, environment, gloo=device.type == "cpu")
    else:
        set_interface(endpoint, environment)


def open_store(endpoint: Endpoint, rank: int, world_size: int, timeout: timedelta, *, wait_for_all: bool = True) -> Any:
    """Open the store of the rendezvous; rank 0 serves it at the address of the endpoint alone.

    Torch by itself would listen on all addresses of the host, as the agent of `torchrun` does.

    Args:
        endpoint: address of the rendezvous.
        rank: number of this rank.
        world_size: number of ranks.
        timeout: longest wait for the connection and for a key.
        wait_for_all: whether rank 0 waits until all ranks are connected.

    Returns:
        `torch.distributed.TCPStore`; below the agent of `torchrun`, whose store outlives a restart of the ranks, the
        keys of this attempt in it.

    Raises:
        DistNetworkError: the port is in use, the address is not one of this host, or rank 0 does not answer.
        UserError: rank 0 may not open as many files as the ranks have connections.
    """
    serves = rank == 0 and not _agent_serves()
    if serves:
        _allow_connections(world_size)
    try:
        listener = listen_at(endpoint.address, endpoint.port) if serves else None
    except OSError as error:
        raise torch.distributed.DistNetworkError(f"rank 0 cannot listen there ({error.strerror})") from error
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        # The other ranks resolve the name as often as they try: a pod that starts anew has another address.
        endpoint.address if serves else endpoint.host,
        endpoint.port,
        world_size,
        is_master=serves,
        timeout=timeout,
        wait_for_workers=wait_for_all,
        master_listen_fd=listener.detach() if listener else None,
    )
    if not _agent_serves():
        return store
    # Otherwise the ranks would take answers that the ranks before the restart have left.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]


def _allow_connections(world_size: int) -> None:
    """Raise this process's limit of open files to what the connections of all ranks need.

    Raises:
        UserError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = CONNECTIONS_OF_A_RANK * world_size + _OWN_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"rank 0 may open {hard} files, but the connections of {world_size} ranks need {needed}: raise the hard "
            "limit of open files on its host, by /etc/security/limits.conf, LimitNOFILE or --ulimit of the container"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
