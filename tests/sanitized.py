"""python tests/sanitized.py FOLDER: every case of every record, on kernels with sanitizers.

Builds fastdiff._C, and fastdiff._cuda for the emulator, with the address and undefined-behaviour
sanitizers in FOLDER, and runs all cases on both, between guard pages, for every instruction set.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]


def build(folder: Path) -> None:
    import ninja_build
    import pybind11

    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    for name in ("_C", "_cuda"):
        output = folder / f"{name}.so"
        emulated = name == "_cuda"
        ninja_build.extension(name, output, folder / name, includes, emulated, sanitized=True)


def run(folder: Path, isa: str) -> int:
    """The cases in a process that has the sanitizers' runtime from its start."""
    import ninja_build

    runtime = [
        subprocess.check_output([ninja_build.compiler(), f"-print-file-name={lib}"], text=True)
        for lib in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(line.strip() for line in runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python and torch, which are not built with it
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FASTDIFF_ISA": isa,
    }
    return subprocess.run([sys.executable, __file__, str(folder), isa], env=environment).returncode


def load(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fastdiff.{name}", folder / f"{name}.so")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cases(folder: Path, isa: str) -> None:
    import torch

    load(folder, "_C")
    from guarded import fenced, outputs_within

    from fastdiff.ops import OPS
    from fastdiff.ops.layout import _C

    assert _C.isa() == isa, _C.isa()
    emulated = load(folder, "_cuda")
    count = 0
    for op in OPS.values():
        for case in op.cases():
            if case.large:
                continue
            for at_end in (True, False):
                torch.manual_seed(0)
                inputs = case.inputs("cpu")
                outputs_within(op, inputs, at_end)
                count += 1
                if hasattr(emulated, op.name):
                    inside = tuple(fenced(x, at_end) for x in inputs)
                    outputs = [
                        None if x is None else fenced(x, at_end) for x in op.allocate(*inputs)
                    ]
                    op._run_cuda(getattr(emulated, op.name), lambda out: (0, 0), *inside, *outputs)
                    count += 1
    print(f"{isa}: {count} cases, nothing found", flush=True)


def main() -> int:
    folder = Path(sys.argv[1])
    if sys.argv[2:]:
        cases(folder, sys.argv[2])
        return 0
    build(folder)
    import ninja_build

    return max(run(folder, isa) for isa in ninja_build.ISAS)


if __name__ == "__main__":
    raise SystemExit(main())
