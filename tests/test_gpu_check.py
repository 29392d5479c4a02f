"""The report of a GPU, rehearsed on the CPU: every part runs, and survives what may go wrong."""

import json

import pytest
import torch
from benches import QUICK, row, tiny  # noqa: F401, which sets the path

from bench import gpu_check, gpu_jobs, gpu_report
from bench.gpu_jobs import NOTE, OK, WRONG, Finding
from fastdiff.op import Op
from fastdiff.ops import OPS


def report(tmp_path, *only):
    out = tmp_path / "some" / "report.md"
    jobs = [part for job in only for part in ("--only", job)]
    status = gpu_check.main(["--device", "cpu", "--quick", "--out", str(out), *jobs])
    return status, out.read_text(), json.loads(out.with_suffix(".json").read_text())


def test_a_report_from_end_to_end(tmp_path, capsys):
    """In processes of its own, as on a GPU; networks and loops are in test_bench_gpu.py."""
    jobs = ("op cpp cfg", "op reference cfg", "sampler dpmpp", "predictions", "bench ceiling")
    status, text, content = report(tmp_path, *jobs)
    assert status == 0 and "**Nothing is wrong.**" in text
    assert "A rehearsal on the CPU: no graph was captured" in text
    assert sorted(content["order"]) == sorted(jobs)
    assert "| cfg | 8 of 8 | 8 of 8 |" in text.replace("| op | reference | cpp |", "")
    assert "sampler dpmpp: the loop as graphs equals the plain loop bit for bit" in text
    assert "| cfg | large | cpp |" in text and "## Benchmark: ceiling" in text
    figures = [f["figures"] for f in content["findings"] if f["job"] == "predictions"]
    assert all(f["measured"] > 0 and f["predicted"] > 0 for f in figures) and figures
    assert "report.md" in capsys.readouterr().out


WORKER = """
import json, os, sys, time
told, out = sys.argv[1:]
for job in json.load(open(told))["jobs"]:
    def tell(**line):
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\\n")
    if job == "dies":
        print("Fatal: it died", file=sys.stderr, flush=True)
        os.abort()
    if job == "hangs":
        time.sleep(60)
    if job == "op cpp cfg":
        tell(job=job, mark="wrong", text="error in case 'fp32'")
        sys.exit(3)
    tell(job=job, mark="ok", text=json.dumps(json.load(open(told))["refused"]))
    tell(ends=job)
"""


def test_jobs_that_end_their_process_do_not_end_the_rest(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "SILENCE_S", 2)
    monkeypatch.setattr(gpu_jobs, "__name__", "worker")
    order = ["first", "dies", "hangs", "op cpp cfg", "last"]
    first, dies, hangs, wrong, broke, last = gpu_check.done(order, QUICK)
    assert (first.mark, last.mark, last.job) == (OK, OK, "last")
    assert dies.mark == WRONG and "status -6: Fatal: it died" in dies.text
    assert hangs.mark == WRONG and "was stopped" in hangs.text
    assert wrong.text == "error in case 'fp32'" and "takes no more work" in broke.text
    assert json.loads(last.text) == {"cfg": "error in case 'fp32'"}  # so nobody times it


def test_a_wrong_kernel_is_told_first_and_not_timed(monkeypatch, tmp_path):
    launcher = Op.launcher

    def broken(self, device):
        run = launcher(self, device)
        if self.name != "cfg":
            return run
        return lambda *args: (run(*args), args[-1].mul_(1.01))

    monkeypatch.setattr(Op, "launcher", broken)
    found = list(gpu_jobs.do("op cpp cfg", QUICK, {}))
    *wrong, summary = found
    assert len(wrong) == 7 and all(f.mark == WRONG and "error" in f.text for f in wrong)
    assert summary.text == "1 of 8 cases"  # the empty one
    refused = {}
    gpu_jobs.refuse(refused, found[0], "cpu")
    found += gpu_jobs.do("bench kernels", QUICK, refused)
    assert any(f.mark == WRONG and "cfg: fastdiff refused: wrong" in f.text for f in found)
    text = "\n".join(gpu_report.lines(host(), ["op cpp cfg", "predictions"], found))
    assert f"**{sum(f.mark == WRONG for f in found)} wrong.**" in text
    assert text.index("## Wrong") < text.index("## Notes") < text.index("## Right cases")
    assert "- predictions: not reached" in text and "rehearsal" not in text


def host():
    versions = {"torch": torch.__version__}
    return {
        "device": "a GPU", "quick": False, "kernels": "triton: step", "cores": 1, "threads": 1,
        "versions": versions, "time": "now", "rehearsal": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "mark"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), NOTE),
        (ModuleNotFoundError("No module named 'diffusers'"), NOTE),
        (RuntimeError("an illegal memory access"), WRONG),
    ],
)
def test_an_error_in_a_case_leaves_the_others(monkeypatch, error, mark):
    fault = gpu_jobs.fault

    def fails(op, case, device):
        if case.name == "fp32":
            raise error
        return fault(op, case, device)

    monkeypatch.setattr(gpu_jobs, "fault", fails)
    failed, summary = gpu_jobs.do("op reference cfg", QUICK, {})
    assert failed.mark == mark and failed.text.startswith("case 'fp32': " + type(error).__name__)
    assert summary.text == "7 of 8 cases" and "\n" not in failed.text


def test_a_gpu_out_of_order_ends_the_process(monkeypatch):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(SystemExit) as stop:
        gpu_jobs.broken("cuda")
    assert stop.value.code == gpu_jobs.BROKEN


def test_waiting_for_the_gpu_is_forbidden_from_the_first_row_on(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(ZeroDivisionError), gpu_jobs.forbidding("cuda") as callback:
        assert not modes
        callback(0, None, None)
        assert modes == ["error"]
        _ = 1 / 0
    assert modes == ["error", "default"]


@pytest.mark.parametrize("name", gpu_jobs.samplers())
def test_every_kind_of_loop_is_compared(name):
    found = list(gpu_jobs.do(f"sampler {name}", QUICK, {}))
    assert [f.mark for f in found] == [OK] * 3


def test_loops_that_differ_are_told():
    x = torch.ones(3)
    marks = [gpu_jobs.compared("sampler", "it", y, x).mark for y in (x, x + 1e-6, x + 1e-3, x / 0)]
    assert marks == [OK, NOTE, WRONG, WRONG]


def test_every_op_is_checked_on_every_backend():
    jobs = gpu_check.jobs("cpu")
    assert {f"op {b} {op}" for op in OPS for b in ("reference", "cpp")} < set(jobs)
    on_gpu = [job for job in gpu_check.jobs("cuda") if job.startswith("op ")]
    assert {f"op reference {op}" for op in OPS} <= set(on_gpu)
    triton = {f"op triton {name}" for name, op in OPS.items() if op.has_triton()}
    assert triton <= set(on_gpu) and not any("cpp" in job for job in on_gpu)
    kinds = list(dict.fromkeys(job.split()[0] for job in jobs))
    assert kinds == ["op", "sampler", "predictions", "bench"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "no GPU that torch can use" in capsys.readouterr().err


def test_a_record_without_a_figure_is_a_note(monkeypatch):
    from bench import kernels
    from bench.records import FASTDIFF, without_time

    told = [
        without_time("kernels", "cfg", "left out: no reason"),
        without_time("kernels", "r", "refused: wrong"),
    ]
    monkeypatch.setattr(kernels, "measure", lambda settings, refused: told)
    note, wrong = gpu_jobs.do("bench kernels", QUICK, {})
    assert (note.mark, wrong.mark) == (NOTE, WRONG)
    assert note == Finding(note.job, NOTE, f"cfg: {FASTDIFF} left out: no reason", note.figures)
