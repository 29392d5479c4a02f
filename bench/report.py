"""The report: a table on the screen, and the same records as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .bars import BARS, Found, by_row
from .records import COPY, FASTDIFF, RATE, YARDSTICKS, Record


def head(machine: dict[str, Any]) -> str:
    """What the figures depend on."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"revision {machine['revision']}",
        versions,
        f"kernels: {machine['kernels']}",
    ]
    if machine["load"] is not None and machine["load"] > 0.5:
        lines.append(f"load average {machine['load']:.1f}: other work disturbs these timings")
    return "\n".join(lines)


def ceiling(records: Sequence[Record]) -> str:
    """What plain copies reach."""
    return "\n".join(
        f"copy of {'x'.join(map(str, r.shape))} {r.dtype}, {r.row}, by {r.provider}: "
        f"{_figure(r)}, {r.gb_s:.0f} GB/s"
        for r in records
    )


def table(section: str, records: Sequence[Record], required: bool = True) -> str:
    """A section: fastdiff's figure, how many times longer each other takes, and the bars."""
    records = [r for r in records if r.section == section]
    found = by_row(records)
    providers = dict.fromkeys(r.provider for r in records if r.provider != FASTDIFF)
    columns: dict[str, Callable[[str], str]] = {
        section: str,
        FASTDIFF: lambda row: _figure(found.get((row, FASTDIFF))),
    }
    for provider in providers:
        columns[YARDSTICKS.get(provider, f"x {provider}")] = partial(_ratio, found, provider)
    if any(r.gb_s for r in records):
        columns["GB/s (of copy's)"] = lambda row: _moved(found, row)
    if any(r.gflop for r in records):
        columns["GFLOP/s"] = lambda row: _rate_of_work(found.get((row, FASTDIFF)))
    if rates := {r.row: r for r in reversed(records) if r.metric == RATE}:
        columns[RATE] = lambda row: f"{rates[row].p50:.3g}" if row in rates else ""
    if required:
        columns["required"] = lambda row: "; ".join(v for v, _ in bars(section, records, row))
    rows = dict.fromkeys(r.row for r in records)
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    notes = [f"{r.row}: {r.provider} {r.note}" for r in records if r.note]
    return "\n".join([*_aligned(lines), *notes])


def bars(
    section: str, records: Sequence[Record], row: str | None = None
) -> Iterator[tuple[str, bool]]:
    """Each bar of a section, or of one of its rows: in words, and whether it is met."""
    found = by_row(records)
    for bar in BARS:
        if bar.section == section and row in (None, bar.row):
            met = bar.met(found)
            said = "met" if met else "NOT MET" if bar.measured(found) else "NOT MEASURED"
            yield f"{bar} {said}", met


def write(path: Path, machine: dict[str, Any], records: Sequence[Record]) -> None:
    """JSON: the machine, and one object a measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "records": [asdict(r) for r in records]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _figure(record: Record | None) -> str:
    if record is None or record.p50 is None:
        return "-"
    figure = _quantity(record.p50, record.metric)
    if record.p20 is None or record.p80 is None:
        return figure
    scale = 1e-3 if record.metric == "us" and figure.endswith("ms") else 1.0
    return f"{figure} ({_digits(record.p20 * scale)}-{_digits(record.p80 * scale)})"


def _quantity(value: float, metric: str) -> str:
    if metric == "us" and value >= 1e4:
        value, metric = value / 1e3, "ms"
    return f"{_digits(value)} {metric}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(found: Found, provider: str, row: str) -> str:
    record = found.get((row, provider))
    if record is None or record.ratio is None:
        return ""
    if record.provider in YARDSTICKS:
        return f"{1 / record.ratio:.2f}"
    how = f", {record.how}" if record.how else ""
    return f"{record.ratio:.3g} ({_quantity(record.p50 or 0.0, record.metric)}{how})"


def _moved(found: Found, row: str) -> str:
    ours, copy = found.get((row, FASTDIFF)), found.get((row, COPY))
    if not (ours and copy and ours.gb_s and copy.gb_s):
        return ""
    return f"{ours.gb_s:.0f} ({ours.gb_s / copy.gb_s:.0%})"


def _rate_of_work(record: Record | None) -> str:
    if not (record and record.p50 and record.gflop):
        return ""
    return f"{1e6 * record.gflop / record.p50:.0f}"


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
