"""Commands that DeepSpeed's launcher starts on other hosts, safe from the shells there.

The launcher over pdsh puts the words of a command, the current folder, Python's path and some environment variables
into a line for the shells of the other hosts. It encloses words with spaces in double quotes, and others not at all: a
semicolon or a `$(...)` in a path would be executed there, and a line break would end the command. So the words travel
as one word in letters and digits, and what cannot be changed is checked.

    python -m mvd_scale.distributed.remote_command pack MODULE [ARGUMENTS]    checks, and prints the word
    python -m mvd_scale.distributed.remote_command run WORD                   runs the module with its arguments
"""

from __future__ import annotations

import base64
import os
import re
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mvd_scale.distributed.hostfile import is_host
from mvd_scale.errors import UserError

EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Beginnings of the names of the variables that DeepSpeed sends to the other hosts."""

_PLAIN = re.compile(r"[\w@+=:,./-]+")
"""Text that shells and pdsh take as it is; pdsh would replace %h, %n and %u."""

_ACTIVE = re.compile(r'["$`\\\n\r]')
"""Characters that shells interpret between double quotes, in which DeepSpeed encloses the values of variables."""


def pack(words: Sequence[str]) -> str:
    """Encode words as one word of letters, digits, - and _ (and = at its end)."""
    return base64.urlsafe_b64encode("\0".join(words).encode("utf-8", "surrogateescape")).decode()


def unpack(word: str) -> list[str]:
    """Decode what `pack` encoded."""
    return base64.urlsafe_b64decode(word).decode("utf-8", "surrogateescape").split("\0")


def remote_words(module: str, arguments: Sequence[str]) -> list[str]:
    """Words that take the place of a module and its arguments on the command line of DeepSpeed's launcher.

    Raises:
        UserError: the launcher would put something into the line that a shell interprets.
    """
    check_line(os.getcwd(), sys.executable, os.environ)
    return ["mvd_scale.distributed.remote_command", "run", pack([module, *arguments])]


def check_line(folder: str, python: str, environment: Mapping[str, str]) -> None:
    """Check all that DeepSpeed's launcher puts into the line beside the words of the command.

    Args:
        folder: current folder, in which the command runs on every host.
        python: path of the Python interpreter, the same on every host.
        environment: variables of this process.

    Raises:
        UserError: a shell would interpret a part of it.
    """
    for name, path in (("current folder", folder), ("path of Python", python)):
        if not _PLAIN.fullmatch(path):
            raise UserError(
                f"the {name} is {path!r}, and the shells of the other hosts would interpret some of its characters: "
                "use a path of letters, digits and @+=:,./-_, or start every host with NODE_RANK, without ssh"
            )
    address = environment.get("MASTER_ADDR")
    if address and not is_host(address):
        raise UserError(f"MASTER_ADDR is {address!r}: expected the name or address of a host")
    exported = [(name, value) for name, value in environment.items() if name.startswith(EXPORTED)]
    for name, value in [*exported, *_variables_of_files(environment.get("DS_ENV_FILE", ".deepspeed_env"))]:
        if not re.fullmatch(r"\w+", name) or _ACTIVE.search(value):
            raise UserError(
                f"the variable {name!r} has the value {value!r}, and the shells of the other hosts would interpret "
                'some of its characters: remove ", $, `, \\ and line breaks, or unset it for this command'
            )


def _variables_of_files(file: str) -> Iterable[tuple[str, str]]:
    """Variables of the files in which DeepSpeed looks for further ones to send."""
    for folder in (Path.home(), Path()):
        path = folder / file
        if path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                name, equals, value = line.partition("=")
                if not equals:
                    raise UserError(f"{path}:{number}: {line!r} is malformed: expected NAME=VALUE")
                yield name.strip(), value.strip()


def main() -> None:
    """Print the packed command, or run it in this process."""
    action, *words = sys.argv[1:]
    if action == "pack":
        try:
            print("\n".join(remote_words(words[0], words[1:])))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    else:
        module, *arguments = unpack(words[0])
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
