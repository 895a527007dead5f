"""The pages of the documentation, and the blocks of code and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

FIRST = ("docs/tutorial.md", "README.md")
"""Pages whose commands make what the commands of other pages use."""

LAUNCHERS = ("launch/single_node.sh", "launch/multi_node.sh")
"""Scripts that run a subcommand of mvd-scale on several ranks."""

STARTS = (("launch/slurm.sbatch",), ("-m", "mvd_scale"))
"""Words of other programs, after which a subcommand of mvd-scale stands."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str
    """Path of the page in the repository."""

    line: int
    """Number of its first line in the page."""

    language: str

    title: str
    """Shown above the block in the site; of a block of commands: the reason why no test runs it."""

    run_by: tuple[str, ...]
    """Tests that run the commands, named in a comment before the block."""

    text: str


@dataclass(frozen=True)
class Command:
    """One command line."""

    block: Block

    words: tuple[str, ...]
    """Without the variables set in front of it."""

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def subcommand(self) -> tuple[str, ...] | None:
        """The words after `mvd-scale`, or after a launcher that stands for it; None for other programs."""
        if self.words[0] == "mvd-scale" or self.words[0].removeprefix("./") in LAUNCHERS:
            return self.words[1:]
        for start in STARTS:
            for end in range(len(start), len(self.words)):
                if self.words[end - len(start) : end] == start:
                    return self.words[end:]
        return None


def pages() -> list[str]:
    """All pages, those first whose commands others build on."""
    found = ["README.md", "CONTRIBUTING.md", "ds_configs/README.md"]
    found += sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md"))
    return [*FIRST, *(page for page in found if page not in FIRST)]


_FENCE = re.compile(r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\s*$")
_RUN_BY = re.compile(r"^<!-- run by: (.*) -->$")


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()
    run_by: tuple[str, ...] = ()
    start = None
    opening = None
    for number, line in enumerate(lines, start=1):
        if start is not None and line == "```":
            assert opening is not None
            text = "\n".join(lines[start : number - 1])
            yield Block(page, start + 1, opening["language"], opening["title"] or "", run_by, text)
            start, run_by = None, ()
        elif start is None and line.startswith("```"):
            opening = _FENCE.match(line)
            assert opening, f'{page}:{number}: {line!r} is no fence of the form ```bash or ```bash title="..."'
            start = number
        elif start is None and (comment := _RUN_BY.match(line)):
            run_by = tuple(name.strip() for name in comment[1].split(","))
    assert start is None, f"{page}:{start}: the block has no end"


def commands(block: Block) -> Iterator[Command]:
    """The command lines of a block of bash, with continued lines joined and `&&` taken apart."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield Command(block, tuple(words))


def all_commands() -> list[Command]:
    """The command lines of all pages, in the order in which they can be run."""
    return [
        command for page in pages() for block in blocks(page) if block.language == "bash" for command in commands(block)
    ]


def inline_code(page: str) -> Iterator[str]:
    """The pieces of code in the running text and the tables of a page."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for found in re.finditer(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        yield found[1]
