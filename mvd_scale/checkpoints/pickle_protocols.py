"""Pickles of protocols 3 to 5, rewritten as protocol 2, which is the one that torch's unpickler of tensors understands.

The rewriting runs nothing of a file: it replaces operations by others of the same meaning, and torch's unpickler then
accepts or refuses the result as it does any file. Objects of bytes, which only numbers of numpy hold, become None.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from torch import _weights_only_unpickler

_READ = range(3, 6)
_RENAMED = (
    dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE8"), "BINUNICODE")
    | dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), "NONE")
    | {"EMPTY_SET": "EMPTY_LIST", "ADDITEMS": "APPENDS", "FROZENSET": "TUPLE"}
)
_FORMS = {"BININT": "<i", "BININT1": "<B", "BININT2": "<H", "BINFLOAT": ">d"}
_PLAIN = (
    {"MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWFALSE", "NEWTRUE"}
    | {"EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}
    | {"BUILD", "REDUCE", "NEWOBJ", "BINPERSID", "STOP"}
)
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"})
_GETS = frozenset({"BINGET", "LONG_BINGET", "GET"})
_CODES = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}


def newer_protocol(path: Path) -> int | None:
    """The protocol of a file of `torch.save` that has to be rewritten; None for protocol 2, and for other files."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next((name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"), None)
                head = b"" if name is None else archive.open(name).read(2)
        else:
            with path.open("rb") as file:
                head = file.read(2)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, struct.error, zipfile.BadZipFile, zlib.error):
        # What is damaged has no protocol; torch's reader says what is wrong.
        return None
    return head[1] if len(head) == 2 and head[:1] == _CODES["PROTO"] and head[1] in _READ else None


class Unpickler(_weights_only_unpickler.Unpickler):
    """torch's unpickler of tensors, for one pickle of any protocol."""

    def __init__(self, file: IO[bytes], *, encoding: str = "bytes") -> None:
        super().__init__(file, encoding=encoding)
        self._file = file

    def load(self) -> Any:
        """Read one pickle, up to its end.

        Raises:
            pickle.UnpicklingError: it is damaged, or has an operation or a name that is not one of tensors.
        """
        rewritten = io.BytesIO(as_protocol_2(self._file))
        self.read, self.readline = rewritten.read, rewritten.readline
        return super().load()


def load(file: IO[bytes], *, encoding: str = "ASCII") -> Any:
    """Read one pickle, as `pickle.load` does; this module is the `pickle_module` of `torch.load`."""
    return Unpickler(file, encoding=encoding).load()


def as_protocol_2(file: IO[bytes]) -> bytes:
    """Rewrite the pickle that begins at the position of a file, and leave the file behind its end.

    Raises:
        pickle.UnpicklingError: the pickle is damaged, or has an operation that protocol 2 cannot express.
    """
    # Each operation with the text that it pushes, if it pushes one.
    written: list[tuple[bytes, str | None]] = []
    memo: dict[int, str | None] = {}
    try:
        operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(file)
        for opcode, argument, _ in operations:
            name = _RENAMED.get(opcode.name, opcode.name)
            if name in _PUTS:
                place = len(memo) if name == "MEMOIZE" else int(argument)
                memo[place] = written[-1][1]
                if memo[place] is None:
                    written.append((_CODES["LONG_BINPUT"] + struct.pack("<I", place), None))
            elif name in _GETS:
                text = memo[int(argument)]
                # A text is written again, so that nothing but the text has to be taken back for a STACK_GLOBAL.
                code = _CODES["LONG_BINGET"] + struct.pack("<I", int(argument)) if text is None else _text(text)
                written.append((code, text))
            elif name == "STACK_GLOBAL":
                (_, module), (_, attribute) = written[-2:]
                if module is None or attribute is None:
                    raise pickle.UnpicklingError("a name in the pickle is no text")
                written[-2:] = [(_operation("GLOBAL", f"{module} {attribute}"), None)]
            elif name not in ("PROTO", "FRAME"):
                written.append((_operation(name, argument), argument if name == "BINUNICODE" else None))
    except (ValueError, LookupError, struct.error) as error:
        raise pickle.UnpicklingError(f"damaged pickle: {error}") from error
    return _CODES["PROTO"] + bytes([2]) + b"".join(code for code, _ in written)


def _operation(name: str, argument: Any) -> bytes:
    if name == "BINUNICODE":
        return _text(argument)
    if name == "GLOBAL":
        return _CODES[name] + argument.replace(" ", "\n", 1).encode() + b"\n"
    if name == "LONG1":
        data = pickle.encode_long(argument)
        return _CODES[name] + bytes([len(data)]) + data
    if name in _FORMS:
        return _CODES[name] + struct.pack(_FORMS[name], argument)
    if name not in _PLAIN:
        raise pickle.UnpicklingError(f"the pickle has the operation {name}")
    return _CODES[name]


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return _CODES["BINUNICODE"] + struct.pack("<I", len(data)) + data
