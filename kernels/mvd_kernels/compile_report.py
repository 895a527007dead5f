"""Registers, shared memory and spills of every kernel, found by compiling it; needs no GPU.

python -m mvd_kernels.compile_report           # a table
python -m mvd_kernels.compile_report --json    # the same for tests/kernels/compile_report.json
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

from mvd_kernels.triton_ops.example_inputs import ExampleLaunch, example_launches
from mvd_kernels.triton_ops.launch import Launch

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class KernelResources:
    """Resources of one compiled kernel.

    Attributes:
        example: the launch that it was compiled for.
        architecture: compute capability, such as 90.
        registers: registers per thread.
        shared: shared memory per program, bytes; from sm_90 on this includes 1 KiB of the driver's.
        spilled: memory per thread for values that do not fit in registers, bytes.
    """

    example: ExampleLaunch
    architecture: int
    registers: int
    shared: int
    spilled: int

    @property
    def name(self) -> str:
        """Name of kernel, variant and architecture."""
        return f"{self.example.name} sm_{self.architecture}"


def compile_launch(launch: Launch, architecture: int) -> CompiledKernel:
    """Compile a kernel as its launch on a GPU of this architecture would.

    Triton specialises a kernel to integer arguments that are 1 or divisible by 16; the same is done here.
    """
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


def measure(example: ExampleLaunch, architecture: int) -> KernelResources:
    """Compile a kernel and read its resources from the binary."""
    kernel = compile_launch(example.launch, architecture)
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}
    shared = used["SHARED"] + kernel.metadata.shared
    return KernelResources(example, architecture, used["REG"], shared, used["STACK"] + used["LOCAL"])


def measure_all(architectures: Iterable[int] = ARCHITECTURES) -> Iterator[KernelResources]:
    """Measure every kernel on every architecture; about 0.5 s per kernel without Triton's cache."""
    architectures = tuple(architectures)
    for example in example_launches():
        for architecture in architectures:
            yield measure(example, architecture)


def as_json(resources: Iterable[KernelResources]) -> str:
    """Format resources as JSON, with Triton's version, for the comparison with later versions of the kernels.

    Another version of Triton compiles to other resources, so they are comparable for one version only.
    """
    lines = []
    for r in resources:
        taken = {"registers": r.registers, "shared": r.shared, "spilled": r.spilled}
        moved = {"read": round(r.example.read, 1), "written": round(r.example.written, 1)}
        lines.append(f"  {json.dumps(r.name)}: {json.dumps(taken | moved)}")
    kernels = ",\n".join(lines)
    return f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{kernels}\n }}\n}}'


@click.command()
@click.option("--json", "to_json", is_flag=True, help="Print the content of tests/kernels/compile_report.json.")
def main(to_json: bool) -> None:
    """Print registers, shared memory and spills of every kernel, and the bytes that it reads and writes per row."""
    if to_json:
        click.echo(as_json(measure_all()))
        return
    head = ("kernel", "arch", "warps", "registers", "shared, B", "spilled, B", "read, B/row", "written, B/row")
    click.echo("{:<52}{:>7}{:>7}{:>11}{:>11}{:>12}{:>13}{:>16}".format(*head))
    for r in measure_all():
        s = r.example
        click.echo(
            f"{s.name:<52}{f'sm_{r.architecture}':>7}{s.launch.warps:>7}{r.registers:>11}{r.shared:>11}{r.spilled:>12}"
            f"{s.read:>13.0f}{s.written:>16.0f}"
        )


if __name__ == "__main__":
    main()
