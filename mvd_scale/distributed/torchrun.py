"""torchrun that ends as its ranks do: `python -m mvd_scale.distributed.torchrun [OPTIONS] -m mvd_scale SUBCOMMAND ...`.

The options are those of torchrun, which itself exits with 1 however its ranks ended, gives them 30 seconds after a
signal and kills them then, and does not pass SIGUSR1 on. Job schedulers need the exit code of the ranks: it tells a
fault, after which a restart may help, from invalid input (`mvd_scale.errors`). And a run needs the time to finish its
step and to save a checkpoint.

The store of torchrun, on which the ranks meet, listens at --master-addr alone here, and on one host at localhost.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import Any

from torch.distributed import DistError, DistNetworkError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousInfo, static_tcp_rendezvous
from torch.distributed.run import parse_args, run

from mvd_scale.distributed.free_port import free_port
from mvd_scale.distributed.interface import listen_at
from mvd_scale.distributed.rendezvous import resolve_endpoint
from mvd_scale.errors import FAULT_CODE, UserError

_DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""Signals that are passed on to the ranks, and seconds that they have to end; the environment variables of torchrun.

Before torch 2.12 torchrun gives 30 seconds whatever the variable says.
"""


class Rendezvous(static_tcp_rendezvous.StaticTCPRendezvous):
    """Rendezvous of a fixed number of hosts, whose store listens at its own address alone; torch's at all addresses."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Open the store on the first host, and wait for the others."""
        if self.rank == 0 and self._store is None:
            self._store = self._open_store()
        return super().next_rendezvous()

    def _open_store(self) -> Any:
        endpoint = resolve_endpoint(self.master_addr, self.master_port, self.timeout)
        listener = None
        # A name may stand beside 127.0.1.1 in `/etc/hosts` of its own host, where other hosts cannot reach it.
        if not endpoint.is_loopback or self.world_size == 1 or endpoint.host == endpoint.address:
            try:
                listener = listen_at(endpoint.address, endpoint.port)
            except OSError as error:
                raise DistNetworkError(f"{endpoint.host}:{endpoint.port} cannot be used ({error.strerror})") from error
        return TCPStore(
            endpoint.address if listener else endpoint.host,
            endpoint.port,
            self.world_size,
            is_master=True,
            timeout=self.timeout,
            multi_tenant=True,
            master_listen_fd=listener.detach() if listener else None,
        )


def main() -> None:
    """Run torchrun, and exit with the code of the rank that failed first, or with 128 + the number of the signal.

    A signal is reported when the ranks have ended. Hosts that do not meet are a fault, which a restart may mend.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    static_tcp_rendezvous.StaticTCPRendezvous = Rendezvous  # type: ignore[misc]
    try:
        run(_prepare(parse_args(sys.argv[1:])))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A process that a signal ended has minus its number.
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except (DistError, RendezvousError) as error:
        print(f"mvd-scale: the hosts did not meet: {error}", file=sys.stderr)
        sys.exit(FAULT_CODE)
    except UserError as error:
        print(f"mvd-scale: {error}", file=sys.stderr)
        sys.exit(2)


def _prepare(options: Namespace) -> Namespace:
    """Change what torchrun would do otherwise with the words of the ranks, and with a job on one host."""
    # torchrun replaces $local_rank and $$ in the words of the ranks: a path with a dollar sign must stay as it is.
    options.training_script_args = [word.replace("$", "$$") for word in options.training_script_args]
    alone = options.nnodes in ("1", "1:1") and options.rdzv_backend == "static" and not options.rdzv_endpoint
    if options.standalone or (alone and options.master_port is None):
        # torchrun would choose a rendezvous whose store listens at all addresses of the host.
        options.standalone = False
        options.master_addr, options.master_port = "127.0.0.1", free_port(host="127.0.0.1")
    return options


if __name__ == "__main__":
    main()
