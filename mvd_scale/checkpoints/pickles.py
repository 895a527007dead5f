"""Reader for files of `torch.save`, treated as untrusted: tensors and plain values only; no code of the file runs."""

from __future__ import annotations

import pickle
import shlex
import struct
import zipfile
from pathlib import Path
from typing import Any, Self

import torch

from mvd_scale.checkpoints import pickle_protocols
from mvd_scale.checkpoints.pickle_protocols import newer_protocol
from mvd_scale.errors import UserError

_REWRITTEN = {"weights_only": False, "pickle_module": pickle_protocols}


class _Placeholder:
    """Placeholder for an object in a file that is not needed: accepts any arguments and state, and discards them."""

    def __new__(cls, *arguments: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_HARMLESS = (
    # Settings, scores and paths that published files contain beside the weights.
    "argparse.Namespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "_codecs.encode",
    # Objects in DeepSpeed's files of optimizer states.
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    # Python 3.11.0 to 3.11.3 pickle the members of enums by this function.
    "builtins.getattr",
)
"""Names that a file may refer to. None of them is imported or called: `_Placeholder` replaces each of them."""


_FAILURES = (
    # A pickle is a program for a stack machine: a damaged one can raise any of these.
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def load_pickle(path: Path) -> Any:
    """Load a file of `torch.save`; tensors are memory-mapped if the file is a zip archive (PyTorch 1.6 and later).

    Raises:
        UserError: the file contains code, is damaged, or was not written by `torch.save`.
    """
    mapped, protocol = zipfile.is_zipfile(path), newer_protocol(path)
    # `weights_only` is torch's name for its own unpickler, of which that of `pickle_protocols` is a kind.
    how: dict[str, Any] = {"weights_only": True} if protocol is None else _REWRITTEN
    with torch.serialization.safe_globals([(_Placeholder, name) for name in _HARMLESS]):
        try:
            return torch.load(path, map_location="cpu", mmap=mapped, **how)
        except pickle.UnpicklingError as error:
            names = _foreign_names(path) if mapped else ""
            if names or "global" in str(error).lower():
                raise UserError(_refusal(path, names)) from error
            raise _damaged(path, error, protocol) from error
        except _FAILURES as error:
            raise _damaged(path, error, protocol) from error


def _foreign_names(path: Path) -> str:
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))))
    except (pickle.UnpicklingError, *_FAILURES):
        return ""


def _damaged(path: Path, error: Exception, protocol: int | None) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if protocol is not None:
        reason += f"; it was saved with pickle protocol {protocol}"
    return UserError(
        f"{path} is damaged, truncated, or not a file of `torch.save` ({reason}); download or copy it again"
    )


CONVERSION = (
    "import sys, torch; from safetensors.torch import save_file; "
    "g = lambda v: v.state_dict() if hasattr(v, 'state_dict') else v; "
    "f = lambda v, p='': {n: t for k, w in v.items() if isinstance(k, str) for n, t in "
    "(f(g(w), p + k + '/') if isinstance(g(w), dict) else {p + k: w}).items() if torch.is_tensor(t)}; "
    "c = f(g(torch.load(sys.argv[1], map_location='cpu', weights_only=False))); "
    "save_file({n: t.detach().clone().contiguous() for n, t in c.items()}, 'converted.safetensors')"
)
"""Program that writes the tensors of a file, named `wrapper/name` in its dictionaries. It runs the code of the file."""


def _refusal(path: Path, names: str) -> str:
    return (
        f"{path} is a pickle that contains code{f' ({names})' if names else ''} and was not loaded: loading it would "
        "run that code on this machine. If you trust its author, convert it in a container without network and "
        f'secrets:\n  python -c "{CONVERSION}" {shlex.quote(path.name)}\n'
        "and use converted.safetensors here"
    )
