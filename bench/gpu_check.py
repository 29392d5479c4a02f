"""Everything that can only be known on a GPU, in one report to attach to an issue.

    make gpu-check        or        python -m bench.gpu_check [--out gpu-report.md] [--quick]

Every op in every case on every backend there; samplers' loops as CUDA graphs; measured times beside
those that compiled code and data sheets allow; then the benchmark, against diffusers and
torch.compile with CUDA graphs. What is wrong is told first, and does not keep the rest from going
on. A JSON with all figures goes beside the report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from fastdiff import gpu
from fastdiff.ops import OPS

from . import gpu_jobs, gpu_report
from .gpu_jobs import WRONG, Finding
from .records import Settings, machine

SILENCE_S = 3600  # a job that tells nothing for so long hangs; tuning a network takes minutes
ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("ceiling", "kernels", "calls", "networks", "end to end", "accuracy")


def main(argv: list[str] | None = None) -> int:
    """Do every job and write the report. 0: all is right; 1: something is wrong; 2: no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__.split("\n\n", 1)[0],
        epilog="Exit status 0: all is right; 1: something is wrong; 2: there is no GPU.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-report.md"), help="Markdown; a JSON goes beside it")
    add("--steps", type=int, default=50, help="sampling steps, end to end (default 50)")
    add("--quick", action="store_true", help="small sizes, few repeats: does it run, not how fast")
    add("--only", action="append", metavar="JOB", help="jobs that begin so; may be repeated")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the check itself")
    args = parser.parse_args(argv)
    if args.device == "cuda" and (reason := gpu.why_none()):
        print(f"no GPU that torch can use: {reason}; there is nothing to check", file=sys.stderr)
        return 2
    settings = Settings(args.steps, args.device, args.quick)
    asked = tuple(args.only or ("",))
    order = [job for job in jobs(args.device) if job.startswith(asked)]
    host, findings = machine(settings) | {"rehearsal": args.device == "cpu"}, []
    try:
        for finding in done(order, settings):
            findings.append(finding)
    finally:  # what is known is worth having, also if the rest was interrupted
        gpu_report.write(args.out, host, order, findings)
        print(f"wrote {args.out}, {args.out.with_suffix('.json')}")
    wrong = sum(f.mark == WRONG for f in findings)
    print(f"{wrong} wrong" if wrong else "all is right")
    return int(bool(wrong))


def jobs(device: str) -> list[str]:
    """What `gpu_jobs.do` is told, in order: nothing is timed that was not checked before."""
    return [
        *(f"op {name} {op.name}" for op in OPS.values() for name in gpu_jobs.backends(op, device)),
        *(f"sampler {name}" for name in gpu_jobs.samplers()),
        "predictions",
        *(f"bench {section}" for section in SECTIONS),
    ]


def done(order: Sequence[str], settings: Settings) -> Iterator[Finding]:
    """The findings of jobs, done in a process that is started anew behind one that ended it."""
    remaining, refused = list(order), dict[str, str]()
    while remaining:
        with tempfile.TemporaryDirectory() as folder:
            told, out, said = (Path(folder, name) for name in ("order", "findings", "stderr"))
            content = {"jobs": remaining, "settings": asdict(settings), "refused": refused}
            told.write_text(json.dumps(content))
            out.touch()
            status = _process(told, out, said)
            lines = [json.loads(line) for line in out.read_text().splitlines()]
            last = (said.read_text().splitlines() or [""])[-1]
        for line in lines:
            if "ends" in line:
                remaining.remove(line["ends"])
            else:
                yield (finding := Finding(**line))
                gpu_jobs.refuse(refused, finding, settings.device)
        if remaining:
            why = {
                None: f"it told nothing for {SILENCE_S // 60} minutes, and was stopped",
                gpu_jobs.BROKEN: "the GPU takes no more work from its process; left off there",
            }.get(status, f"its process ended with status {status}: {last}")
            yield Finding(remaining.pop(0), WRONG, why)


def _process(told: Path, out: Path, said: Path) -> int | None:
    """Its exit status; None if it hangs."""
    command = [sys.executable, "-m", gpu_jobs.__name__, str(told), str(out)]
    quiet = {"TQDM_DISABLE": "1", "KINETO_LOG_LEVEL": "6"}
    with said.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, env=os.environ | quiet)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if time.time() - out.stat().st_mtime > SILENCE_S:
                return None
        return process.returncode
    finally:
        process.kill()  # if it still runs
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
