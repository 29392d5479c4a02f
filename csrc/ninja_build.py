"""Builds the kernels with ninja: what each file is compiled with stands here.

setup.py uses it for the extension modules; `python csrc/ninja_build.py FOLDER` builds and runs the
plain C++ tests in FOLDER, with the address and undefined-behaviour sanitizers, or with that of
threads (`FOLDER thread`). Needs no torch. The CUDA kernels are compiled twice: by nvcc, and for the
emulator of csrc/tests by the C++ compiler. What checks AVX-512's kernels runs on machines without
it, too: another emulator there stands for its instructions.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nvcc

CSRC = Path(__file__).resolve().parent

# No contraction: a fused multiply-add is where the code says so (FD_FMA), and nowhere else.
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math "
    "-ffp-contract=off"
)
_AVX2 = "-mavx2 -mfma"
ISAS = {"scalar": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {
        "avx2": _AVX2,
        "avx512": f"{_AVX2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl "
        "-mprefer-vector-width=512",
    }
_EMULATOR = shlex.quote(str(CSRC / "tests" / "emulator"))
EMULATED = f"-x c++ -DFD_EMULATED -I{_EMULATOR} -Wno-unknown-pragmas"
EMULATED_AVX512 = f"{_AVX2} -DFD_EMULATED -include {_EMULATOR}/avx512.h -Wno-psabi"

SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}


def compiler() -> str | None:
    """The C++ compiler: $CXX, with its arguments, or the first that is found; None without one."""
    if own := os.environ.get("CXX", ""):
        if shutil.which(own):
            return shlex.quote(own)
        if shutil.which(shlex.split(own)[0]):
            return own
        print(f"fastdiff: CXX={own} is not found, another compiler is taken", file=sys.stderr)
    return next(filter(shutil.which, ["g++", "c++", "clang++"]), None)


def _host_compiler() -> str:
    """The compiler itself, for nvcc: without what starts it (ccache, ..) and its arguments."""
    words = shlex.split(compiler() or "c++")
    launched = len(words) > 1 and not words[1].startswith("-")
    return shlex.quote(words[1] if launched else words[0])


def _rules(flags: str) -> str:
    cxx, host = ((found or "").replace("$", "$$") for found in (compiler(), _host_compiler()))
    return f"""\
rule cxx
  command = {cxx} {FLAGS} {flags} $more -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} {flags} $in $more -o $out
rule nvcc
  command = nvcc {nvcc.FLAGS} -ccbin {host} -Xcompiler -fPIC,-fvisibility=hidden $more $
    -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvlink
  command = nvcc -shared -cudart static -ccbin {host} $in -o $out
"""


Edge = tuple[str, str, str, str]  # rule, output, inputs, further flags


def _path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _lacks_avx512() -> bool:
    """Whether this machine has AVX2 and no AVX-512, if Linux tells."""
    told = Path("/proc/cpuinfo")
    flags = told.read_text().split() if told.is_file() else []
    return "avx2" in flags and "avx512bw" not in flags


def _kernels(checked: bool = False) -> Iterator[Edge]:
    """Every file of csrc/cpu, once for each instruction set; and once the one that chooses.

    What is only checked runs everywhere: AVX-512's in the emulator where the machine lacks it.
    """
    isas, chooser = ISAS, ""
    if checked and _lacks_avx512():
        isas, chooser = ISAS | {"avx512": EMULATED_AVX512}, EMULATED_AVX512
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        each = {"any": chooser} if source.stem == "isa" else isas
        for isa, flags in each.items():
            yield "cxx", f"{source.stem}.{isa}.o", _path(source), f"-DFD_ISA={isa} {flags}"


def _emulated(*more: Path) -> Iterator[Edge]:
    """Every file of csrc/cuda, and more, for the emulator."""
    for source in [*nvcc.SOURCES, *more]:
        yield "cxx", f"{source.stem}.emulated.o", _path(source), EMULATED


def _run_ninja(folder: Path, flags: str, edges: list[Edge]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"build {out}: {rule} {inputs}\n  more = {more}\n" for rule, out, inputs, more in edges
    ]
    (folder / "build.ninja").write_text(_rules(flags) + "".join(lines))
    ninja = [shutil.which("ninja") or "ninja"]
    if importlib.util.find_spec("ninja"):
        ninja = [sys.executable, "-m", "ninja"]
    subprocess.run([*ninja, "-C", str(folder), "--quiet"], check=True)


def extension(
    name: str,
    output: Path,
    folder: Path,
    includes: list[str],
    emulated: bool = False,
    sanitized: bool = False,
) -> None:
    """Build the extension module `name`, _C or _cuda, as the file `output`; objects in `folder`.

    `emulated` builds _cuda for the emulator, which runs it on the CPU; `sanitized` with the address
    and undefined-behaviour sanitizers, whose runtime the process must have loaded first, and with
    AVX-512's instructions emulated where the machine lacks them.
    """
    include = " ".join(f"-I{shlex.quote(i)}" for i in includes).replace("$", "$$")
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    link = ("link", f"-shared {undefined}")
    if name == "_C":
        edges = [*_kernels(checked=sanitized), ("cxx", "bind.o", _path(CSRC / "bind.cpp"), include)]
    else:
        edges = [("cxx", "bind.o", _path(CSRC / "cuda" / "bind.cpp"), include)]
        if emulated:
            edges += _emulated()
        else:
            how = nvcc.gencode()
            edges += [("nvcc", f"{s.stem}.o", _path(s), how) for s in nvcc.SOURCES]
            link = ("nvlink", "")
    objects = " ".join(out for _, out, _, _ in edges)
    output.parent.mkdir(parents=True, exist_ok=True)
    edges.append((link[0], _path(output.resolve()), objects, link[1]))
    flags = "-O1" if emulated else "-O3 -DNDEBUG"
    _run_ninja(folder, f"-O1 -g1 {SANITIZERS['address']}" if sanitized else flags, edges)


def test(folder: Path, sanitizer: str = "address") -> int:
    """Build and run the C++ tests under a sanitizer; warnings are errors. The exit status."""
    tests = sorted((CSRC / "tests").glob("*.cpp"))
    edges = [*_kernels(checked=True), *_emulated(CSRC / "tests" / "emulator" / "barrier.cu")]
    edges += [("cxx", f"test_{s.stem}.o", _path(s), "") for s in tests]
    link, flags = "-fopenmp", SANITIZERS[sanitizer]
    if sanitizer == "thread":
        # OpenMP's runtime is not instrumented: threads of the standard library in its place
        threads = CSRC / "tests" / "emulator" / "threads.cc"
        edges.append(("cxx", "threads.o", _path(threads), ""))
        link, flags = "-pthread", f"{flags} -DFD_LARGE=1"
    objects = " ".join(out for _, out, _, _ in edges)
    edges.append(("link", "tests", objects, link))
    # gcc 12 warns of its own AVX-512 headers (bug 105593)
    warn = "-Wall -Wextra -Werror -Wno-uninitialized -Wno-maybe-uninitialized"
    _run_ninja(folder, f"-O1 -g1 {warn} {flags}", edges)
    return subprocess.run([str(folder.resolve() / "tests")]).returncode


if __name__ == "__main__":
    raise SystemExit(test(Path(sys.argv[1]), *sys.argv[2:]))
