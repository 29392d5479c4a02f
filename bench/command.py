"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from fastdiff import gpu

RESULTS = Path(__file__).parent / "results"
NEEDS = ("diffusers", "matplotlib")
# minutes on two cores, the compiling of peers included
MINUTES = {
    "kernels": 2.0,
    "calls": 0.7,
    "networks": 7.0,
    "end to end": 5.6,
    "training": 1.5,
    "drop in": 1.0,
    "accuracy": 0.1,
}


def main(argv: list[str] | None = None) -> int:
    """Check, measure, report. 0: done; 1: a kernel is wrong, or --check or --readme misses."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.check and args.quick:
        parser.error("--check: needs the full sizes; leave out --quick")
    if args.readme and (args.quick or args.device != "cpu"):
        parser.error("--readme: its figures are the CPU's, of the full sizes")
    if args.check and args.device != "cpu":
        parser.error("--check: the requirements are the CPU's; leave out --check")
    if lacking := [name for name in NEEDS if not importlib.util.find_spec(name)]:
        sys.exit(f"the benchmark needs {' and '.join(lacking)}: pip install 'fastdiff[bench]'")
    if args.device == "cuda" and (reason := gpu.why_none()):
        sys.exit(f"--device cuda: torch can use no GPU here: {reason}; or use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)

    from fastdiff.ops import OPS

    from . import (
        accuracy,
        calls,
        ceiling,
        drop_in,
        end_to_end,
        gate,
        kernels,
        networks,
        picture,
        readme,
        report,
        training,
    )
    from .records import Settings, machine

    settings = Settings(args.steps, args.device, args.quick)
    made = (kernels, calls, networks, end_to_end, training, drop_in, accuracy)
    modules = {m.SECTION: m for m in made}
    sections = args.only or list(MINUTES)
    required = args.device == "cpu" and not args.quick
    host = machine(settings)
    print(report.head(host))
    minutes = 2 if args.quick else sum(MINUTES[s] for s in sections)
    lasts = f"about {minutes:.1f} minutes" if args.device == "cpu" else "compiling takes most of it"
    print(f"sections: {', '.join(sections)}; {lasts}\n", flush=True)
    with torch.no_grad():
        timed = kernels.cases(settings) if kernels.SECTION in sections else set()
        refused = gate.refused(OPS.values(), timed, args.device)
        for op in OPS:
            print(f"gate: {op} {'WRONG: ' + refused[op] if op in refused else 'is right'}")
        records = list(ceiling.measure(settings))
        print("\n" + report.ceiling(records), flush=True)
        for section in sections:
            records += list(modules[section].measure(settings, refused))
            print("\n" + report.table(section, records, required=required), flush=True)
    report.write(args.out, host, records)
    written = [args.out]
    if picture.draw(args.out.with_suffix(".png"), host, records):
        written.append(args.out.with_suffix(".png"))
    print("\nwrote " + ", ".join(map(str, written)))
    verdicts = [met for s in sections for _, met in report.bars(s, records)]
    if required:
        print(f"{sum(verdicts)} of {len(verdicts)} requirements met")
    below = readme.fallen(records, sections, readme.page()) if args.readme else []
    print(*below, sep="\n", end="\n" if below else "")
    wrong = refused or below or any(r.note.startswith("refused") for r in records)
    return int(bool(wrong) or (args.check and not all(verdicts)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description="fastdiff against diffusers, OpenVINO, ONNX Runtime and PyTorch: correctness "
        "first, then kernels, small calls, networks, whole sampling loops, training and accuracy. "
        "On a GPU against the peers there, torch.compile with CUDA graphs among them; `make "
        "gpu-check` does this and more, in one report.",
    )
    add = parser.add_argument
    add("--steps", type=_positive, default=50, help="sampling steps, end to end (default 50)")
    add("--quick", action="store_true", help="small sizes, few repeats: does it run, not how fast")
    add("--only", action="append", choices=list(MINUTES), help="a section; may be repeated")
    add("--out", type=Path, default=RESULTS / "latest.json", help="JSON; a PNG goes beside it")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="default cpu; nothing was measured on cuda yet",
    )
    add("--threads", type=_positive, help="of torch and of the kernels (default: torch's)")
    add("--check", action="store_true", help="exit with 1 if a requirement is not met")
    figures = "exit with 1 if a ratio is below the README's, or docs/avx2.md's"
    add("--readme", action="store_true", help=figures)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return int(text)
