"""The ratios that the README prints, each with the record that it stands on.

They are of a CPU that computes in bfloat16; docs/avx2.md has the same tables of one that does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastdiff.precision import bfloat16_pays

from . import drop_in, end_to_end, kernels, networks, peers, runtimes, training
from .bars import by_row
from .records import PLAIN, Record
from .runtimes import bf16

README = Path(__file__).parents[1] / "README.md"
AVX2 = README.parent / "docs" / "avx2.md"
SLACK = 0.95  # of a printed ratio, which a run may fall to by its noise
DROP_IN = 'two cores, `python bench/run.py --only "drop in"`'  # the head of a table
NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Cell:
    """A ratio in a table of the README: the table's first heading, a row's, the column from 0."""

    section: str
    table: str
    line: str
    column: int
    row: str
    provider: str

    def ratio(self, text: str) -> float | None:
        """What a page prints there; None where it has no such cell."""
        tables = [part for part in text.split("\n\n") if part.startswith(f"| {self.table}")]
        lines = [line for table in tables for line in table.splitlines()]
        found = [line for line in lines if line.startswith(f"| {self.line} |")]
        if len(found) != 1:
            return None
        number = NUMBER.search(found[0].strip("| ").split("|")[self.column])
        return float(number[0]) if number else None


def _networks() -> Iterator[Cell]:
    labels = ("batch 16, float32", "batch 16, bfloat16", "batch 1, float32", "batch 1, bfloat16")
    providers = ("OpenVINO", "torch.compile", "ONNX Runtime", runtimes.EAGER.name)
    for label, row in zip(labels, networks.ROWS, strict=True):
        for column, provider in enumerate(providers, 2):
            if provider != "ONNX Runtime" or "float32" in label:
                yield Cell(networks.SECTION, "| `optimize`", label, column, row.title, provider)
    lines = ("8 guided images, DDIM, a step", "the shipped model, 16 guided, a step")
    loops = [*zip(lines, (end_to_end.CIFAR, end_to_end.FASHION), strict=True)]
    loops.append(("the same, bfloat16", replace(end_to_end.FASHION, dtype=bf16)))
    for line, loop in loops:
        for column, provider in enumerate(providers, 2):
            if provider != "ONNX Runtime" or loop.dtype != bf16:
                yield Cell(end_to_end.SECTION, "| `optimize`", line, column, loop.title, provider)
    line = "Stable Diffusion 1.5's network, bfloat16, batch 2 (`--only networks`)"
    row = networks.STABLE_DIFFUSION.title
    yield Cell(networks.SECTION, DROP_IN, line, 2, row, runtimes.EAGER.name)


def _drop_in() -> Iterator[Cell]:
    titles = [row.title for row in drop_in.PIPELINES]
    titles += [f"a training step of UNet2DModel, {dtype}" for dtype in ("fp32", "bf16")]
    lines = (
        "DDIMPipeline, CIFAR-10 network, batch 4, float32, a step",
        "the same, bfloat16",
        "a training step, UNet2DModel, batch 32, float32",
        "the same, bfloat16 autocast",
    )
    for line, title in zip(lines, titles, strict=True):
        yield Cell(drop_in.SECTION, DROP_IN, line, 2, title, peers.EAGER)
    for line, scheduler in (
        ("DDIMScheduler.step, 1x4x64x64", "DDIMScheduler"),
        ("DPMSolverMultistepScheduler.step", "DPMSolverMultistepScheduler"),
        ("DDPMScheduler.step", "DDPMScheduler"),
    ):
        yield Cell(drop_in.SECTION, DROP_IN, line, 2, f"{scheduler}.step", peers.EAGER)


def _kernels() -> Iterator[Cell]:
    for line, row in (
        ("step as DDIM", "step as DDIM"),
        ("step as DDPM, noise made inside", "step as DDPM, noise made"),
        ("step as DDIM, guidance fused", "step as DDIM, guided"),
        ("step, learned variance, noise made inside", "step, learned range"),
        ("noising with noise and v-target", "noising, noise made, v"),
        ("guidance alone", "cfg"),
    ):
        cell = partial(Cell, kernels.SECTION, "16x3x256x256, float32", line)
        yield cell(3, row, peers.EAGER)
        yield cell(4, row, PLAIN)
        yield cell(6, row + kernels.IN_CACHE, peers.EAGER)
    for line, row in (
        ("attention, 16 x 1 head x 256 tokens x 256", "attention, bf16"),
        ("attention, 2 x 8 x 4096 x 40", "attention, many tokens, bf16"),
        ("GroupNorm + SiLU, 16x128x32x32 channels-last", "group_norm_silu, bf16"),
        ("3x3 convolution, 16x256x16x16", "conv3x3, bf16"),
        ("3x3 convolution, 16x256x16x16, float32", "conv3x3"),
    ):
        yield Cell(kernels.SECTION, "a network's layers", line, 2, row, PLAIN)


def _training() -> Iterator[Cell]:
    for line, row in zip(("bfloat16 autocast", "float32"), training.ROWS, strict=True):
        cell = Cell(training.SECTION, "| fastdiff | images", line, 3, row.title, training.DIFFUSERS)
        yield cell


def cells() -> list[Cell]:
    """All that are known to stand on a record."""
    return [*_networks(), *_drop_in(), *_kernels(), *_training()]


def page() -> Path:
    """The page whose figures are of machines like this one."""
    return README if bfloat16_pays("cpu") else AVX2


def fallen(records: Iterable[Record], sections: Iterable[str], of: Path) -> list[str]:
    """The page's ratios that the records do not reach, or lack: a line each."""
    found, text, said = by_row(records), of.read_text(), []
    for cell in cells():
        printed, record = cell.ratio(text), found.get((cell.row, cell.provider))
        if printed is None or cell.section not in sections:
            continue
        says = f"{cell.row}: {of.name} says {printed:g} x {cell.provider}"
        if record is None or not record.ratio:
            said.append(f"{says}; not measured")
        elif record.ratio < SLACK * printed:
            said.append(f"{says}, now {record.ratio:.3g}")
    return said
