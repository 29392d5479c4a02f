"""The account as a page: what a data sheet allows, and every kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from .report import Prediction, Report
from .targets import TARGETS

HEAD = """\
# The GPU kernels, seen without a GPU

Nothing here was measured on a GPU. Each Triton kernel was compiled ahead of time, for every case of
its op's record, by Triton {triton}; then its machine code was read. `make aot` writes this page.

Times are what a data sheet allows: the fewest bytes over the bandwidth, or the products over the
tensor cores' rate if that is longer. "issue" is the time to issue all instructions of all threads,
as a share of it: below half, arithmetic hides behind memory. "instructions an element" are those of
all threads over the elements of the result. A kernel that loops has neither count. Where targets
differ, values are those of {targets}.
"""

KERNELS = """\
Each line is a kernel as compiled for the cases named; a launch takes the fastest of its
configurations, of which the first is shown, the others where the case is large. "accesses" are
those of a thread to tiles in global memory, count x bits; "resident" is the share of a processor's
threads that fit at once; "instructions" are a thread's, "tensor" those of them for tensor cores.
"""


CUDA = """\
## CUDA C++

The core ops once more, for machines without Triton, as ptxas reports them. Where targets differ,
values are those of {targets}.
"""


def page(rows: Sequence[Report], predicted: Sequence[Prediction], cuda: Sequence[Any] = ()) -> str:
    """The whole page, in Markdown; `cuda` are the rows of `cuda.usage()`."""
    names = " / ".join(target.name for target in TARGETS)
    parts = [
        HEAD.format(triton=version("triton"), targets=names),
        "![Predicted times](gpu_static.png)\n",
        _table(_times(predicted)),
        _sheets(),
        "## Every kernel\n",
        KERNELS,
    ]
    for op in dict.fromkeys(row.op.name for row in rows):
        parts += [f"### {op}\n", _table(_kernels([row for row in rows if row.op.name == op]))]
    if cuda:
        targets = dict.fromkeys(row.target for row in cuda)
        parts += [CUDA.format(targets=" / ".join(targets)), _table(_of_ptxas(cuda))]
    return "\n".join(parts)


def _times(predicted: Sequence[Prediction]) -> Iterator[dict[str, str]]:
    """A line a case, a column a target."""
    for op, case in dict.fromkeys((p.op, p.case) for p in predicted):
        own = [p for p in predicted if (p.op, p.case) == (op, case)]
        cells = {p.target.name: p for p in sorted(own, key=_place)}
        any_one = next(iter(cells.values()))
        excess = {p.excess for p in cells.values()}
        line = {
            "op": op,
            "case": case,
            "MB": f"{any_one.fewest / 1e6:.1f}",
            "moved / fewest": _same(excess, lambda e: "loops" if e is None else f"{e:.2f}"),
            "instructions an element": _same([p.each for p in cells.values()], _count),
        }
        for target in TARGETS:
            if p := cells.get(target.name):
                issue = f", issue {p.issue / p.roofline:.0%}" if p.issue is not None else ""
                bound = " tensor" if p.roofline > p.memory else ""
                line[target.device] = f"{p.roofline * 1e6:.1f} us{bound}{issue}"
        yield line


def _place(told: Report | Prediction) -> int:
    return TARGETS.index(told.target)


def _count(each: float | None) -> str:
    return "" if each is None else f"{each:.0f}"


def _sheets() -> str:
    told = [
        f"{t.device} ({t.name}): {t.bandwidth / 1e12:.2f} TB/s, {t.processors} processors, "
        f"{t.lanes} threads' instructions a clock each, {t.clock / 1e9:.2f} GHz, "
        f"{t.tensor / 1e12:.0f} TFLOP/s dense bf16"
        for t in TARGETS
    ]
    return "Data sheets: " + "; ".join(told) + ".\n"


def _kernels(rows: Sequence[Report]) -> Iterator[dict[str, str]]:
    """A line for each set of cases that share a kernel, on the targets together."""
    groups: dict[object, list[Report]] = {}
    for row in rows:
        blocks = tuple(row.config.blocks.items())
        key = row.kernel, row.cases, blocks, row.config.threads, row.config.stages
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        group.sort(key=_place)
        first = group[0]
        sizes = " ".join(f"{k}={v}" for k, v in first.config.blocks.items())
        yield {
            "cases": ", ".join(first.cases),
            "kernel": first.kernel.removesuffix("_kernel"),
            "configuration": f"{sizes}, {first.config.threads} threads",
            "registers": _across(group, lambda r: str(r.code.registers)),
            "spills": _across(group, lambda r: str(r.code.spills)),
            "shared B": _across(group, lambda r: str(r.code.shared)),
            "resident": _across(group, lambda r: f"{r.resident / r.target.threads:.0%}"),
            "accesses": _across(group, _accesses),
            "instructions": _across(group, lambda r: str(r.code.instructions or "loops")),
            "tensor": _across(group, lambda r: str(r.code.tensor)),
        }


def _of_ptxas(rows: Sequence[Any]) -> Iterator[dict[str, str]]:
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        yield {
            "kernel": f"`{kernel}`",
            "registers": _same([row.registers for row in own], str),
            "spills": _same([row.spills for row in own], str),
            "shared B": _same([row.shared for row in own], str),
        }


def _accesses(row: Report) -> str:
    return " ".join(f"{n}x{bits}" for bits, n in sorted(row.code.accesses.items()))


def _across(group: Iterable[Report], tell: Callable[[Report], str]) -> str:
    return _same([tell(row) for row in group], str)


def _same(values: Iterable[object], tell: Callable[..., str]) -> str:
    told = [tell(value) for value in values]
    return told[0] if len(set(told)) == 1 else " / ".join(told)


def _table(lines: Iterable[dict[str, str]]) -> str:
    rows = list(lines)
    if not rows:
        return ""
    head = list(rows[0])
    text = [head, ["---"] * len(head), *([row.get(name, "") for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in text) + "\n"
