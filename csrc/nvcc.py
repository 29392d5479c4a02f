"""nvcc: where it is, which GPUs it compiles for, and what ptxas says of every kernel.

`python csrc/nvcc.py [sm_90 ...]` prints registers, spills and shared memory of each kernel for the
targets named, or for all. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent / "cuda"
SOURCES = sorted(FOLDER.glob("*.cu"))
OLDEST = 75  # the architectures from Turing on

FLAGS = "-std=c++17 -O3 -fmad=false"  # as for the CPU, the code says where a product is fused


class Usage(NamedTuple):
    """A kernel on a target: registers a thread, bytes spilled, bytes of shared memory."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int


def compiler() -> str | None:
    """nvcc, unless it is not found or $FASTDIFF_CUDA is 0."""
    return None if os.environ.get("FASTDIFF_CUDA") == "0" else shutil.which("nvcc")


def targets() -> list[str]:
    """The GPUs that this nvcc compiles for, oldest first: sm_75, sm_80, ..."""
    said = _run(["nvcc", "--list-gpu-code"])
    numbers = sorted({int(n) for n in re.findall(r"\bsm_(\d+)\b", said)})
    return [f"sm_{n}" for n in numbers if n >= OLDEST]


def shipped() -> list[str]:
    """The first target of each generation: its code runs on those after it in the generation."""
    first: dict[str, str] = {}
    for target in targets():
        first.setdefault(target[:-1], target)
    return list(first.values())


def gencode() -> str:
    """Flags for all GPUs: what is shipped, and for generations to come the newest in a form that
    drivers compile."""
    numbers = [target[3:] for target in shipped()]
    code = [f"-gencode arch=compute_{n},code=sm_{n}" for n in numbers]
    return " ".join([*code, f"-gencode arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"])


def cubin(source: Path, target: str, output: Path) -> str:
    """Compile one source for one target, with warnings as errors; what ptxas says."""
    how = ["-Werror", "all-warnings", "-arch", target, "-cubin", "-Xptxas", "-v", "-o", output]
    return _run(["nvcc", *FLAGS.split(), *how, source])


def usage(wanted: list[str] | None = None, folder: Path | None = None) -> list[Usage]:
    """Every kernel for every target wanted, or for all; cubins stay in `folder` if one is given."""
    with tempfile.TemporaryDirectory() as temporary:
        at = folder or Path(temporary)

        def rows(source: Path, target: str) -> list[Usage]:
            return _read(cubin(source, target, at / f"{source.stem}.{target}.cubin"), target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda pair: rows(*pair), product(SOURCES, wanted or targets())))
    return [row for some in found for row in some]


def _read(said: str, target: str) -> list[Usage]:
    rows = []
    for entry in said.split("Compiling entry function ")[1:]:
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", entry)))
        stack = re.search(r"(\d+) bytes stack frame", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert stack and registers, entry
        rows.append(
            Usage(
                _name(entry.split("'")[1]),
                target,
                int(registers[1]),
                max(spills, int(stack[1])),
                int(shared[1]) if shared else 0,
            )
        )
    return rows


def _name(symbol: str) -> str:
    """step_kernel<1, 0> of its symbol."""
    name = re.search(r"(?<=\d)[a-z][a-z_]*_kernel", symbol)
    assert name, symbol
    constants = re.findall(r"L(?:b|NS_5DTypeE)(\d)E", symbol[name.end() :])
    dtypes = "DType" in symbol[name.end() : name.end() + 12]
    if dtypes:
        constants = [("float32", "bfloat16", "float16")[int(c)] for c in constants]
    return name[0] + (f"<{', '.join(constants)}>" if constants else "")


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    for row in usage(sys.argv[1:]):
        print(f"{row.target:7} {row.registers:3} registers {row.spills:3} B spilled ", end="")
        print(f"{row.shared:6} B shared  {row.kernel}")
