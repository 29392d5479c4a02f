"""What a compiled kernel is made of: registers, memory accesses and instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import triton


@dataclass(frozen=True)
class Code:
    """
    registers     of a thread
    spills        bytes (NVIDIA) or registers (AMD) that went to memory for lack of registers
    shared        bytes of shared memory a program
    accesses      bits wide -> how many global accesses of tiles a thread makes (scalars apart)
    tile_bytes    global memory that a program reads and writes in tiles; None if it loops
    listed        gives the names of the instructions; NVIDIA's disassembler takes half a second
    """

    registers: int
    spills: int
    shared: int
    accesses: dict[int, int]
    tile_bytes: int | None
    listed: Callable[[], list[str]] = field(repr=False)

    @cached_property
    def names(self) -> list[str]:
        """Of the instructions."""
        return self.listed()

    @property
    def instructions(self) -> int | None:
        """That a thread runs, each counted once, jumped over or not; None if it loops."""
        return None if self.tile_bytes is None else len(self.names)

    @property
    def tensor(self) -> int:
        """How many instructions are for tensor cores."""
        return sum("MMA" in name or name.startswith("v_mfma") for name in self.names)


def read(compiled: Any, backend: str) -> Code:
    """The code of Triton's compiled kernel."""
    read = {"cuda": _read_cuda, "hip": _read_hip}[backend]
    registers, spills, accesses, listed = read(compiled.asm)
    text = compiled.asm["ttir"]
    tiles = re.findall(r"tt\.(?:load|store) .*tensor<((?:\d+x)+)!tt\.ptr<\w*?(\d+)>>", text)
    loops = "scf.for" in text or "scf.while" in text
    return Code(
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        accesses=accesses,
        tile_bytes=None if loops else sum(_elements(n) * int(bits) // 8 for n, bits in tiles),
        listed=listed,
    )


def _elements(sizes: str) -> int:
    count = 1
    for size in sizes.rstrip("x").split("x"):
        count *= int(size)
    return count


_Machine = tuple[int, int, dict[int, int], Callable[[], list[str]]]


def _read_cuda(asm: Any) -> _Machine:
    """Tiles are masked or vectors, so their accesses are the PTX's that are predicated or wide."""
    found = re.findall(r"(@%p\d+ )?(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfu](\d+)", asm["ptx"])
    widths = [int(n or 1) * int(bits) for masked, n, bits in found if masked or n]
    widths += [
        8 * int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\..*?(0x\w+)", asm["ptx"])
    ]
    used = dict(
        re.findall(r"(REG|STACK|LOCAL):(\d+)", _dumped(asm["cubin"], "--dump-resource-usage"))
    )
    spills = int(used["STACK"]) + int(used["LOCAL"])
    return int(used["REG"]), spills, dict(Counter(widths)), partial(_disassembled, asm["cubin"])


def _disassembled(cubin: bytes) -> list[str]:
    said = _dumped(cubin, "--dump-sass")
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", said)
    return [n for n in names if n != "NOP"]


def _dumped(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_hip(asm: Any) -> _Machine:
    """Tiles go through buffer accesses where their offsets fit 32 bits, else beside the scalars."""
    text = asm["amdgcn"]
    accesses = re.findall(r"\t(buffer|global)_(?:load|store)_(\w+)", text)
    buffered = any(kind == "buffer" for kind, _ in accesses)
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
    widths |= {"ubyte": 8}
    counts = Counter(
        widths[unit.partition("_d16")[0]]
        for kind, unit in accesses
        if kind == "buffer" or not buffered
    )
    used = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    names = re.findall(r"^\t((?:[sv]|buffer|global|flat|ds)_\w+)", text, re.MULTILINE)
    spills = used["vgpr_spill_count"]  # scalars go to lanes of vector registers, not to memory
    return used["vgpr_count"], spills, dict(counts), lambda: [n for n in names if n != "s_nop"]
