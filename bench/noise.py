"""python bench/noise.py: a statistical account of the noise, written to docs/noise.md.

dieharder's tests (Debian's package) of the uint32 stream that normals are made of, along one sample
and across interleaved samples; 10^9 normals against the normal distribution; correlations between
samples, rows and seeds. Tests that docs/noise.json has, or noise.unfinished.json of a run that was
stopped, are not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from bench.claims.claim import DOCS, Point, Points
from fastdiff import ops
from fastdiff.files import write_bytes
from fastdiff.ops.randn import randbits

# all but those that dieharder's author calls suspect, or says not to use
TESTS = (0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 15, 16, 17, 100, 101, 102, 200, 201, 202, 203, 204)
TESTS += (205, 206, 207, 208, 209)
# those that count tuples, or words so many apart: of all lengths that dieharder -a runs, the last
# of a few
TUPLES = {200: range(1, 13), 201: range(2, 6), 202: range(2, 6), 203: (0, 1, 2, 4, 8, 16)}
LINE = re.compile(r"^\s*(\w+)\|\s*(\d+)\|\s*(\d+)\|\s*(\d+)\|([\d.]+)\|\s*(\w+)", re.MULTILINE)
BLOCK, SAMPLES = 1 << 22, 4096
NORMALS, SEEDS = 10**9, (1, 42)
TAILS = (1, 2, 3, 4, 5, 6)


def along() -> Iterator[Tensor]:
    """One sample's words, row after row."""
    row = 0
    while True:
        yield randbits((1, BLOCK), 0, row=row)
        row += 1


def across() -> Iterator[Tensor]:
    """A word of each of 4096 samples in turn."""
    row = 0
    while True:
        yield randbits((SAMPLES, BLOCK // SAMPLES), 0, row=row).view(torch.int32).T.contiguous()
        row += 1


def seeds() -> Iterator[Tensor]:
    """A word of each of 4096 neighbouring seeds in turn."""
    row = 0
    while True:
        bits = randbits((SAMPLES, BLOCK // SAMPLES), range(SAMPLES), row=row)
        yield bits.view(torch.int32).T.contiguous()
        row += 1


def control() -> Iterator[Tensor]:
    """The operating system's generator: what the tests say of noise that nobody doubts."""
    while True:
        yield torch.frombuffer(bytearray(os.urandom(4 * BLOCK)), dtype=torch.int32)


STREAMS: dict[str, Callable[[], Iterator[Tensor]]] = {
    "one sample": along,
    "samples interleaved": across,
    "seeds interleaved": seeds,
    "control": control,
}


def runs(tests: Iterable[int]) -> Iterator[tuple[int, int | None]]:
    """Each test, by the lengths of its tuples if it has some."""
    for test in tests:
        for length in TUPLES.get(test, (None,)):
            yield test, length


def named(test: int, length: int | None, stream: str) -> str:
    return f"dieharder {test}{'' if length is None else f' of {length}'}, {stream}"


def dieharder(stream: Callable[[], Iterator[Tensor]], test: int, length: int | None) -> Point:
    """The p-values of a test, of as much of the stream as it reads."""
    # -Y 1: a weak p-value is made of more samples until it passes or fails
    command = ["dieharder", "-g", "200", "-Y", "1", "-d", str(test)]
    if length is not None:
        command += ["-n", str(length)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        read = 0
        with suppress(BrokenPipeError):
            for words in stream():
                process.stdin.write(words.view(torch.uint8).numpy().data)
                read += words.numel()
                if process.poll() is not None:
                    break
        with suppress(BrokenPipeError):
            process.stdin.close()
        said = process.stdout.read().decode()
    found = LINE.findall(said)
    if not found:
        raise RuntimeError(f"{' '.join(command)}: said nothing that is understood: {said!r}")
    return {
        "name": found[0][0] + ("" if length is None else f", {length}"),
        "words": read,
        "p": [float(p) for *_, p, _ in found],
        "verdicts": [verdict for *_, verdict in found],
    }


def normals(seed: int) -> Point:
    """Moments, distribution and tails of 10^9 normals, each beside its expectation and spread."""
    bins = 1 << 16
    counts = torch.zeros(bins, dtype=torch.int64)
    moments = torch.zeros(4, dtype=torch.float64)
    beyond = torch.zeros(len(TAILS), dtype=torch.int64)
    done, row, largest = 0, 0, 0.0
    while done < NORMALS:
        z = ops.randn((16, BLOCK // 16), seed, row=row).flatten()[: NORMALS - done].double()
        square = z.square()
        moments += torch.stack((z.sum(), square.sum(), (square * z).sum(), square.square().sum()))
        beyond += torch.stack([(z.abs() > k).sum() for k in TAILS])
        largest = max(largest, z.abs().max().item())
        place = torch.special.ndtr(z).mul(bins).long().clamp_(max=bins - 1)
        counts += torch.bincount(place, minlength=bins)
        done, row = done + len(z), row + 1
    n = float(NORMALS)
    mean, second, third, fourth = (moments / n).tolist()
    # standard deviations of the sample moments: of x^k it is sqrt((E x^2k - (E x^k)^2) / n)
    spread = [math.sqrt(v / n) for v in (1, 2, 15, 96)]
    off = [mean, second - 1, third, fourth - 3]
    expected = n / bins
    chi2 = (counts - expected).square().sum().item() / expected
    steps = counts.cumsum(0).double() / n - torch.arange(1, bins + 1) / bins
    return {
        "moments": off,
        "moments_z": [v / s for v, s in zip(off, spread, strict=True)],
        "ks": steps.abs().max().item() * math.sqrt(n),
        "chi2_z": (chi2 - (bins - 1)) / math.sqrt(2 * (bins - 1)),
        "beyond": beyond.tolist(),
        "expected": [n * math.erfc(k / math.sqrt(2)) for k in TAILS],
        "largest": largest,
    }  # fmt: skip


def correlations() -> Point:
    """Correlations times sqrt(n), standard normal if there are none; of values and of squares."""
    elements, batch, rows = 1 << 14, 64, 32
    z = torch.stack([ops.randn((batch, elements), 2, row=r) for r in range(rows)]).double()
    seeds = torch.stack([ops.randn((1, elements), s)[0] for s in range(512)]).double()
    pairs = {
        "neighbouring elements": (z[..., 1:], z[..., :-1]),
        "elements four apart": (z[..., 4:], z[..., :-4]),
        "neighbouring samples": (z[:, 1:], z[:, :-1]),
        "neighbouring rows": (z[1:], z[:-1]),
        "neighbouring seeds": (seeds[1:], seeds[:-1]),
        "a sample's row and the next sample's next row": (z[1:, 1:], z[:-1, :-1]),
    }
    found = {}
    for name, (a, b) in pairs.items():
        values = (a * b).sum() / math.sqrt(a.numel())
        squares = ((a * a - 1) * (b * b - 1)).sum() / (2 * math.sqrt(a.numel()))
        found[name] = [values.item(), squares.item()]
    return {"z": found, "n": z.numel()}


def document(points: Mapping[str, Point]) -> str:
    every = {name: p["verdicts"] for name, p in points.items() if "dieharder" in name}
    control = [v for name, found in every.items() if "control" in name for v in found]
    verdicts = [v for name, found in every.items() if "control" not in name for v in found]
    lines = [
        "# The noise",
        "",
        "`python bench/noise.py`: the Philox streams that all noise is made of.",
        "",
        f"## dieharder: {len(verdicts)} p-values",
        "",
        f"{verdicts.count('PASSED')} passed, {verdicts.count('WEAK')} weak, "
        f"{verdicts.count('FAILED')} failed. Below 0.005 or above 0.995 dieharder takes more "
        "samples until a test passes or fails (one in a million), at most a hundred times as many. "
        f"The control is the operating system's generator: {control.count('WEAK')} weak of its "
        f"{len(control)}.",
        "",
        "| test | " + " | ".join(STREAMS) + " |",
        "|---" + "|---" * len(STREAMS) + "|",
    ]
    for test, length in runs(TESTS):
        row = [points.get(named(test, length, name)) for name in STREAMS]
        if any(row):
            cells = [_said(p) for p in row]
            name = next(p["name"] for p in row if p)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for seed in SEEDS:
        lines += _normals(seed, points[f"normals, seed {seed}"])
    if "correlations" in points:
        p = points["correlations"]
        lines += [
            "",
            "## Correlations",
            "",
            f"Times sqrt(n), of about {p['n']:,} pairs (seeds: 8 million): standard normal where "
            "there is none.",
            "",
            "| between | values | squares |",
            "|---|---:|---:|",
            *(f"| {name} | {a:+.2f} | {b:+.2f} |" for name, (a, b) in p["z"].items()),
        ]
    return "\n".join([*lines, ""])


def _said(p: Point | None) -> str:
    if p is None:
        return ""
    odd = [
        f"{v.lower()} {x:.4f}" for x, v in zip(p["p"], p["verdicts"], strict=True) if v != "PASSED"
    ]
    many = len(p["p"])
    return ", ".join(odd) + (f" of {many}" if odd and many > 1 else "") if odd else (
        f"{p['p'][0]:.2f}" if many == 1 else f"{many} passed"
    )  # fmt: skip


def _normals(seed: int, p: Point) -> list[str]:
    names = ("mean", "variance - 1", "third moment", "fourth moment - 3")
    return [
        "",
        f"## 1,000,000,000 normals, seed {seed}",
        "",
        "| | found | in standard deviations |",
        "|---|---:|---:|",
        *(
            f"| {name} | {value:+.2e} | {z:+.2f} |"
            for name, value, z in zip(names, p["moments"], p["moments_z"], strict=True)
        ),
        f"| chi-square of 65,536 equally likely bins | | {p['chi2_z']:+.2f} |",
        "",
        f"Kolmogorov-Smirnov: sqrt(n) D = {p['ks']:.2f} (95 % of perfect samples are below 1.36). "
        f"The largest of all is {p['largest']:.2f}; float32 uniforms of 2^-33 and up end at 6.76.",
        "",
        "| beyond | found | expected | in standard deviations |",
        "|---|---:|---:|---:|",
        *(
            f"| {k} sigma | {found:,} | {wanted:,.1f} | "
            f"{(found - wanted) / math.sqrt(wanted * (1 - wanted / NORMALS)):+.2f} |"
            for k, found, wanted in zip(TAILS, p["beyond"], p["expected"], strict=True)
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--tests", type=int, nargs="*", default=list(TESTS), help="dieharder's -d")
    args: Any = parser.parse_args(argv)
    points = Points(args.out / "noise.json", {})
    for seed in SEEDS:
        points.measure(f"normals, seed {seed}", partial(normals, seed))
    points.measure("correlations", correlations)
    if args.tests and shutil.which("dieharder") is None:
        raise SystemExit("dieharder: not found; apt install dieharder, or --tests with none")
    for test, length in runs(args.tests):
        for name, stream in STREAMS.items():
            run = partial(dieharder, stream, test, length)
            points.measure(named(test, length, name), run)
    points.finish()
    write_bytes(args.out / "noise.md", document(points.found).encode())
    print(args.out / "noise.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
