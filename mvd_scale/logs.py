"""One logger; rank 0 speaks. Plain lines, so that a file reads like a terminal."""

from __future__ import annotations

import logging
import sys
import warnings

from mvd_scale.config.launcher import launched_rank


def configure() -> None:
    """Send INFO of rank 0, and warnings of every rank, to standard error."""
    rank = launched_rank()
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("mvd_scale")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    # DeepSpeed calls collectives by names that newer torch releases deprecate; users cannot mend that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
