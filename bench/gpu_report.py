"""The report of `bench.gpu_check`: Markdown to read, and a JSON of all findings beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .gpu_jobs import NOTE, WRONG, Finding
from .records import Record


def write(path: Path, host: dict[str, Any], order: Sequence[str], found: Sequence[Finding]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines(host, order, found)) + "\n")
    content = {"machine": host, "order": list(order), "findings": [asdict(f) for f in found]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def lines(host: dict[str, Any], order: Sequence[str], found: Sequence[Finding]) -> Iterator[str]:
    """What is wrong first, then what was left undone, then the figures."""
    reached = {f.job for f in found}
    wrong = [f"{f.job}: {f.text}" for f in found if f.mark == WRONG]
    undone = [f"{f.job}: {f.text}" for f in found if f.mark == NOTE]
    undone += [f"{job}: not reached" for job in order if job not in reached]
    yield from (f"# fastdiff on {host['device']}", "")
    yield f"**{len(wrong)} wrong.**" if wrong else "**Nothing is wrong.**"
    if host["rehearsal"]:
        yield "A rehearsal on the CPU: no graph was captured, and no word here is of a GPU."
    if host["quick"]:
        yield "Small sizes and few repeats: the times mean nothing."
    yield from _list("Wrong", wrong)
    yield from _list("Notes", undone)
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    processor = f"{host['cores']} cores, {host['threads']} threads"
    yield from _list("Machine", [*host["kernels"].splitlines(), processor, versions, host["time"]])
    yield from _correctness(found)
    yield from _list("Loops", [f"{f.job}: {f.text}" for f in found if f.job.startswith("sampler")])
    yield from _predictions(found)
    yield from _benchmark(found)


def _list(title: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield from ("", f"## {title}", "", *(f"- {item}" for item in items))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        yield from ("", f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|")
        yield from (f"| {' | '.join(row)} |" for row in rows)


def _correctness(found: Sequence[Finding]) -> Iterator[str]:
    """Cases that are right, an op a row and a backend a column."""
    of = [f.figures for f in found if f.job.startswith("op ") and f.figures]
    right = {(each["op"], each["backend"]): f"{each['right']} of {each['of']}" for each in of}
    backends = list(dict.fromkeys(backend for _, backend in right))
    rows = [
        [op, *(right.get((op, backend), "") for backend in backends)]
        for op in dict.fromkeys(op for op, _ in right)
    ]
    yield from _table("Right cases", ["op", *backends], rows)


def _predictions(found: Sequence[Finding]) -> Iterator[str]:
    """Microseconds; "allowed" is the most that compiled code and the data sheet let one expect."""
    rows = []
    for f in found:
        if f.job == "predictions" and (each := f.figures):
            measured, allowed = each["measured"], each["predicted"]
            rows.append([
                each["op"], each["case"], each["backend"], _us(measured),
                f"{_us(allowed)} ({allowed / measured:.0%})" if allowed else "",
                f"{_us(each['copying'])} ({each['copying'] / measured:.0%})",
                f"{each['moved'] / measured / 1e9:.0f}",
            ])  # fmt: skip
    head = ["op", "case", "backend", "us", "data sheet allows", "its bytes copied", "GB/s"]
    yield from _table("Large cases, measured and predicted", head, rows)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def _benchmark(found: Sequence[Finding]) -> Iterator[str]:
    records = [Record(**f.figures) for f in found if f.job.startswith("bench ") and f.figures]
    if not records:
        return
    from . import report  # which needs diffusers

    for section in dict.fromkeys(r.section for r in records):
        own = [r for r in records if r.section == section]
        text = report.ceiling(own) if section == "ceiling" else report.table(section, own, False)
        yield from ("", f"## Benchmark: {section}", "", "```", text, "```")
