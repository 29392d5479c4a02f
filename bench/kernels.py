"""The kernels at the size of real work, against diffusers, plain PyTorch and a copy.

A row takes its tensors from a case of the op's record and its coefficients from a sampler that
diffusers has too, so every contender can be asked for the same result, and is checked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from fastdiff.op import Op
from fastdiff.ops import OPS

from . import layers, peers, step, work
from .records import COPY, FASTDIFF, Record, Settings, of_race, surviving, without_time
from .timing import Contender, Timed, burst, busy, race
from .work import Work

SECTION = "kernels"
IN_CACHE = ", in cache"
CALLED = ", as called"  # on a GPU: the host's part included
SETS = 3  # of buffers, cycled, so that 16x3x256x256 comes from memory and not from the caches


@dataclass(frozen=True)
class Row:
    """A row of the table: a case of an op, a small one for --quick, and how to make its work."""

    name: str
    op: str
    large: str
    small: str
    make: Callable[[Op, tuple[Any, ...], Settings], Work]

    def case(self, settings: Settings) -> str:
        return self.small if settings.quick else self.large


_bf16 = partial(step.work, step.DDIM, dtype=torch.bfloat16)
_new = partial(step.work, step.DDIM, allocating=True)
ROWS = (
    Row("step as DDIM", "step", "large-ddim", "ddim", partial(step.work, step.DDIM)),
    Row("step as DDIM, bf16 model", "step", "large-ddim", "ddim", _bf16),
    Row("step as DDIM, new tensor", "step", "large-ddim", "ddim", _new),
    Row("step as DDPM, noise made", "step", "large-ddpm", "ddpm", partial(step.work, step.DDPM)),
    Row("step as DDIM, guided", "step", "large-guided", "guided", partial(step.work, step.DDIM)),
    Row(
        "step, learned range", "step", "large-learned", "learned", partial(step.work, step.LEARNED)
    ),
    Row("noising, noise made, v", "noising", "large", "seeded", work.noising),
    Row("cfg", "cfg", "large", "fp32", work.cfg),
    Row("randn", "randn", "large", "image", work.randn),
    Row("group_norm_silu, bf16", "group_norm_silu", "large", "bf16-last", layers.group_norm_silu),
    Row("attention, bf16", "attention", "large", "size-256-bf16", layers.attention),
    Row("attention, many tokens, bf16", "attention", "large-many", "bf16", layers.attention),
    Row("conv3x3", "conv3x3", "large-f4-16x256x16x16x256", "f4", layers.conv3x3),
    Row("conv3x3, bf16", "conv3x3", "large-bf16-16x256x16x16x256", "f2-bf16", layers.conv3x3),
)


def cases(settings: Settings) -> set[str]:
    """The cases that will be timed, as "op/case"."""
    return {f"{row.op}/{row.case(settings)}" for row in ROWS}


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """Each row twice: with its buffers in memory, and in the caches.

    On a GPU both are the time it works, and a third has the time that a caller waits for.
    """
    for row in tqdm(ROWS, desc=SECTION, leave=False):
        if row.op in refused:
            yield without_time(SECTION, row.name, f"refused: wrong ({refused[row.op]})")
        elif settings.device == "cuda" and OPS[row.op].backend("cuda") == "reference":
            yield without_time(SECTION, row.name, "left out: has no kernel for GPUs here")
        elif settings.device == "cpu" and not has_kernel(OPS[row.op], _inputs(row, settings)):
            yield without_time(SECTION, row.name, "left out: has no kernel for this CPU")
        else:
            yield from surviving(SECTION, row.name, _measured(row, settings))


def _inputs(row: Row, settings: Settings) -> tuple[Any, ...]:
    case = next(c for c in OPS[row.op].cases() if c.name == row.case(settings))
    return case.inputs(settings.device)


def has_kernel(op: Op, inputs: tuple[Any, ...]) -> bool:
    """Whether C++ takes these: some need instructions that not every CPU has."""
    return op.described is None or op.described(*inputs, *op.allocate(*inputs)) is not None


def _measured(row: Row, settings: Settings) -> Iterator[Record]:
    op = OPS[row.op]
    works = [row.make(op, _inputs(row, settings), settings)]
    for _ in range(sets(settings, works[0].moved) - 1):
        works.append(row.make(op, _inputs(row, settings), settings))
    wrong = work.faults(works[0])
    if reason := wrong.get((FASTDIFF, works[0].options[0].how)):
        yield without_time(SECTION, row.name, f"refused: wrong ({reason})")
        return
    yield from _raced(row.name, works, wrong, settings)
    yield from _raced(row.name + IN_CACHE, works[:1], wrong, settings)
    if settings.device == "cuda":
        yield from _raced(row.name + CALLED, works, wrong, settings, burst)


def sets(settings: Settings, moved: int) -> int:
    """How many sets of buffers do not fit a GPU's cache, where one set moves so many bytes."""
    if settings.device == "cpu" or settings.quick:
        return SETS
    cache = torch.cuda.get_device_properties().L2_cache_size
    return min(max(SETS, 3 * cache // max(moved, 1)), 32)


def _raced(
    name: str,
    works: list[Work],
    wrong: Mapping[tuple[str, str], str],
    settings: Settings,
    timed: Timed = busy,
) -> Iterator[Record]:
    contenders = [
        Contender(options[0].provider, options[0].how, tuple(o.call for o in options))
        for options in zip(*(w.options for w in works), strict=True)
        if options[0][:2] not in wrong
    ]
    raced = race(
        contenders, settings.device, settings.seconds, settings.rounds, peers.AT_BEST, timed
    )
    first = works[0]
    about: dict[str, Any] = {
        "shape": tuple(first.like.shape),
        "dtype": str(first.dtype).removeprefix("torch."),
    }
    for record in of_race(raced, section=SECTION, row=name, **about):
        moved = {FASTDIFF: first.moved, COPY: 2 * first.like.nbytes}.get(record.provider)
        told = moved and record.p50 and timed is busy
        yield replace(record, gb_s=moved / record.p50 / 1e3) if told else record
    for (provider, how), reason in wrong.items():
        if provider not in raced:
            yield without_time(SECTION, name, f"left out: {how}: {reason}", provider)
