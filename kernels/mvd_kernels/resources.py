"""What every kernel takes of a GPU, found by compiling it: no GPU is needed.

python -m mvd_kernels.resources           # a table
python -m mvd_kernels.resources --json    # the same for tests/kernels/resources.json
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from mvd_kernels.fused.launch import Launch
from mvd_kernels.fused.specimens import Specimen, specimens

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel.

    Attributes:
        registers: of each thread.
        shared: memory of each program, bytes; from sm_90 on, 1 KiB of it is the driver's.
        spilled: memory that each thread keeps what it has no registers for in, bytes.
    """

    specimen: Specimen
    architecture: int
    registers: int
    shared: int
    spilled: int

    @property
    def name(self) -> str:
        """Kernel, variant and architecture."""
        return f"{self.specimen.name} sm_{self.architecture}"


def compile_launch(launch: Launch, architecture: int) -> CompiledKernel:
    """Compile as a launch would on such a GPU: specialised to numbers that are 1 or divisible by 16."""
    values = launch.arguments | launch.constants
    signature, constants, attributes = {}, dict(launch.constants), {}
    for place, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            continue
        value = values[parameter.name]
        signature[parameter.name], key = native_specialize_impl(BaseBackend, value, False, True, True)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif key:
            attributes[(place,)] = BaseBackend.parse_attr(key)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": launch.warps})


def measure(specimen: Specimen, architecture: int) -> Resources:
    """Compile a kernel and read its resources out of the binary."""
    kernel = compile_launch(specimen.launch, architecture)
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}
    shared = used["SHARED"] + kernel.metadata.shared
    return Resources(specimen, architecture, used["REG"], shared, used["STACK"] + used["LOCAL"])


def measure_all(architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Resources]:
    """Every kernel on every architecture; about half a second each when nothing is cached."""
    architectures = tuple(architectures)
    for specimen in specimens():
        for architecture in architectures:
            yield measure(specimen, architecture)


def as_json(resources: Iterable[Resources]) -> str:
    """What a later version of a kernel is compared with. Another Triton compiles otherwise: it is named."""
    lines = []
    for r in resources:
        taken = {"registers": r.registers, "shared": r.shared, "spilled": r.spilled}
        moved = {"read": round(r.specimen.read, 1), "written": round(r.specimen.written, 1)}
        lines.append(f"  {json.dumps(r.name)}: {json.dumps(taken | moved)}")
    kernels = ",\n".join(lines)
    return f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{kernels}\n }}\n}}'


@click.command()
@click.option("--json", "to_json", is_flag=True, help="Print what tests/kernels/resources.json holds.")
def main(to_json: bool) -> None:
    """Print registers, memory and spills of every kernel, with the bytes it moves for one row."""
    if to_json:
        click.echo(as_json(measure_all()))
        return
    head = ("kernel", "arch", "warps", "registers", "shared, B", "spilled, B", "read, B/row", "written, B/row")
    click.echo("{:<52}{:>7}{:>7}{:>11}{:>11}{:>12}{:>13}{:>16}".format(*head))
    for r in measure_all():
        s = r.specimen
        click.echo(
            f"{s.name:<52}{f'sm_{r.architecture}':>7}{s.launch.warps:>7}{r.registers:>11}{r.shared:>11}{r.spilled:>12}"
            f"{s.read:>13.0f}{s.written:>16.0f}"
        )


if __name__ == "__main__":
    main()
