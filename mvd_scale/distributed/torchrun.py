"""torchrun that ends as its ranks do: `python -m mvd_scale.distributed.torchrun [OPTIONS] -m mvd_scale SUBCOMMAND ...`.

The options are those of torchrun, which itself exits with 1 however its ranks ended, gives them 30 seconds after a
signal and kills them then, and does not pass SIGUSR1 on. Job schedulers need the exit code of the ranks: it tells a
fault, after which a restart may help, from invalid input (`mvd_scale.errors`). And a run needs the time to finish its
step and to save a checkpoint.
"""

from __future__ import annotations

import os
import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from mvd_scale.errors import FAULT_CODE

_DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""Signals that are passed on to the ranks, and seconds that they have to end; the environment variables of torchrun.

Before torch 2.12 torchrun gives 30 seconds whatever the variable says.
"""


def main() -> None:
    """Run torchrun, and exit with the code of the rank that failed first, or with 128 + the number of the signal.

    A signal is reported when the ranks have ended. Hosts that do not meet are a fault, which a restart may mend.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    options = parse_args(sys.argv[1:])
    # torchrun replaces $local_rank and $$ in the words of the ranks: a path with a dollar sign must stay as it is.
    options.training_script_args = [word.replace("$", "$$") for word in options.training_script_args]
    try:
        run(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A process that a signal ended has minus its number.
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except (DistError, RendezvousError) as error:
        print(f"mvd-scale: the hosts did not meet: {error}", file=sys.stderr)
        sys.exit(FAULT_CODE)


if __name__ == "__main__":
    main()
