"""Compile every Triton kernel ahead of time, without a GPU, and report what came out.

    python -m fastdiff.aot [--target sm_90] [--json report.json]

Each case of each op's record is compiled for each target exactly as its launch would be: the same
signature, constants and divisibility. Nothing runs: the time given is the roofline, the fewest
bytes over the bandwidth that the device's data sheet states.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .op import Case, Op
from .ops import OPS

launching = importlib.import_module("fastdiff.kernels.launch")


@dataclass(frozen=True)
class Target:
    """A GPU: its compiler backend and architecture, warp width, and memory bandwidth in bytes/s."""

    name: str
    device: str
    backend: str
    arch: int | str
    warp: int
    bandwidth: float


TARGETS = (
    Target("sm_80", "A100 SXM 80GB", "cuda", 80, 32, 2.039e12),
    Target("sm_90", "H100 SXM", "cuda", 90, 32, 3.35e12),
    Target("sm_100", "B200", "cuda", 100, 32, 8.0e12),
    Target("gfx942", "MI300X", "hip", "gfx942", 64, 5.3e12),
)


@dataclass(frozen=True)
class Report:
    """One compiled kernel for one target, and the cases that share it.

    spills       bytes (NVIDIA) or registers (AMD) that did not fit; 0 is none
    shared       bytes of shared memory a program
    accesses     bits wide -> how many global accesses of tiles a thread makes (scalars apart)
    tile_bytes   global memory that a program reads and writes in tiles
    excess       bytes of all tiles over the fewest that the op can move: 1.0 is none too many
    per_element  instructions an element; each counted once, also where it is jumped over
    roofline     seconds at the target's bandwidth, for a large case
    """

    op: str
    target: str
    cases: tuple[str, ...]
    registers: int
    spills: int
    shared: int
    accesses: dict[int, int]
    tile_bytes: int
    excess: float
    per_element: float
    roofline: float | None


def reports(
    select: Callable[[Op, Case, Target], bool] = lambda op, case, target: True,
) -> list[Report]:
    """Compile the selected cases for the selected targets, each different kernel once.

    RuntimeError in Triton's interpreter, which cannot compile, and for a Triton whose launcher
    does not tell what it compiles.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter cannot compile; unset it")
    if not hasattr(triton.JITFunction, "_pack_args"):
        raise RuntimeError(f"Triton {triton.__version__} is too old for this; 3.9 is known to do")
    sources: dict[Any, tuple[Op, Target, Any]] = {}
    cases: dict[Any, list[tuple[Case, int, int]]] = {}
    for op in filter(Op.has_triton, OPS.values()):
        for case in op.cases():
            targets = [target for target in TARGETS if select(op, case, target)]
            if not targets:
                continue
            inputs = case.inputs("cpu")
            outputs = op.allocate(*inputs)
            launch = importlib.import_module(f"fastdiff.kernels.{op.name}").plan(*inputs, *outputs)
            elements = next(o for o in outputs if o is not None).numel()
            for target in targets:
                source = source_of(launch, target)
                key = (target, source.hash())
                sources.setdefault(key, (op, target, source))
                cases.setdefault(key, []).append((case, elements, op.moved(*inputs)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler releases Python's lock
        return list(pool.map(lambda key: _report(*sources[key], cases[key]), sources))


def _backend(target: Target) -> Any:
    return make_backend(GPUTarget(target.backend, target.arch, target.warp))


def source_of(launch: Any, target: Target) -> Any:
    """What the just-in-time launcher would compile, told by its own binder."""
    kernel, backend = launch.kernel, _backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.args)
    _, signature, constants, attributes = kernel._pack_args(
        backend, launching.options(target.warp), bound, specialization, None
    )
    return ASTSource(kernel, signature, constants, attributes)


def compile_for(source: Any, target: Target) -> Any:
    return triton.compile(source, _backend(target).target, launching.options(target.warp))


def _report(op: Op, target: Target, source: Any, cases: list[tuple[Case, int, int]]) -> Report:
    compiled = compile_for(source, target)
    machine = (_read_cuda if target.backend == "cuda" else _read_hip)(compiled.asm)
    tiles = re.findall(r"tt\.(?:load|store) .*<(\d+)x!tt\.ptr<\w?f(\d+)>>", compiled.asm["ttir"])
    tile_bytes = sum(int(n) * int(bits) // 8 for n, bits in tiles)
    case, elements, fewest = max(cases, key=lambda row: row[2])
    return Report(
        op=op.name,
        target=target.name,
        cases=tuple(c.name for c, _, _ in cases),
        shared=compiled.metadata.shared,
        tile_bytes=tile_bytes,
        excess=elements * tile_bytes / launching.BLOCK / fewest if fewest else 1.0,
        per_element=machine.pop("instructions") * launching.THREADS / launching.BLOCK,
        roofline=fewest / target.bandwidth if case.large else None,
        **machine,
    )


def _read_cuda(asm: Any) -> dict[str, Any]:
    """Tiles are masked, so their accesses are the predicated ones of the PTX."""
    accesses = re.findall(r"@%p\d+ (?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass"]
        said = subprocess.run([*command, file.name], check=True, capture_output=True, text=True)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout))
    code = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", said.stdout)
    return {
        "registers": int(used["REG"]),
        "spills": int(used["STACK"]) + int(used["LOCAL"]),
        "accesses": dict(Counter(int(n or 1) * int(bits) for n, bits in accesses)),
        "instructions": sum(name != "NOP" for name in code),
    }


def _read_hip(asm: Any) -> dict[str, Any]:
    """Tiles go through buffer accesses where their offsets fit 32 bits, else beside the scalars."""
    text = asm["amdgcn"]
    accesses = re.findall(r"\t(buffer|global)_(?:load|store)_(\w+)", text)
    buffered = any(kind == "buffer" for kind, _ in accesses)
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
    counts = Counter(
        widths[unit.removesuffix("_d16_hi")]
        for kind, unit in accesses
        if kind == "buffer" or not buffered
    )
    used = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    code = re.findall(r"^\t((?:[sv]|buffer|global|flat|ds)_\w+)", text, re.MULTILINE)
    return {
        "registers": used["vgpr_count"],
        "spills": used["vgpr_spill_count"] + used["sgpr_spill_count"],
        "accesses": dict(counts),
        "instructions": sum(name != "s_nop" for name in code),
    }


def table(rows: Iterable[Report]) -> str:
    """The reports as aligned text."""
    told = [
        {
            "op": row.op,
            "target": row.target,
            "registers": str(row.registers),
            "spills": str(row.spills),
            "shared B": str(row.shared),
            "accesses x bits": " ".join(f"{n}x{bits}" for bits, n in sorted(row.accesses.items())),
            "moved/fewest": f"{row.excess:.2f}",
            "instructions/element": f"{row.per_element:.0f}",
            "roofline us": f"{row.roofline * 1e6:.1f}" if row.roofline else "",
            "cases": ", ".join(row.cases),
        }
        for row in rows
    ]
    lines = [list(told[0]), *(list(row.values()) for row in told)] if told else []
    across = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, across, strict=True)).rstrip()
        for line in lines
    )


def main() -> None:
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(prog="python -m fastdiff.aot", description=__doc__)
    parser.add_argument(
        "--target", action="append", choices=names, help="only this one; repeatable"
    )
    parser.add_argument(
        "--op",
        action="append",
        choices=[op.name for op in OPS.values() if op.has_triton()],
        help="only this one; repeatable",
    )
    parser.add_argument("--json", type=Path, help="also write the report here")
    asked = parser.parse_args()
    found = reports(
        lambda op, case, target: (
            target.name in (asked.target or names) and op.name in (asked.op or OPS)
        )
    )
    print(table(found))
    assumed = [f"{t.name} {t.device} {t.bandwidth / 1e12:.2f} TB/s" for t in TARGETS]
    print(f"Nothing ran. Bandwidths assumed for the roofline: {', '.join(assumed)}.")
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
