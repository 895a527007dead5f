"""Set-up of the loggers of this package and of the kernels: plain lines on standard error, from rank 0."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from mvd_scale.config.launcher import env_rank


def configure_logging() -> None:
    """Log messages of level INFO from rank 0, and warnings from every rank, to standard error."""
    # torch prints C++ stacks of a connection that the death of a rank closed; the watchdog prints one message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    rank = env_rank()
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    for name in ("mvd_scale", "mvd_kernels"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False
    # DeepSpeed calls collectives by names that newer torch releases deprecate, which users cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
