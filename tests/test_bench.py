"""The benchmark: its clock, its statistics, its gate, and a small run of the whole."""

import functools
import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from benches import QUICK, ROOT, row, tiny

from bench import (
    agreement,
    bars,
    calls,
    ceiling,
    command,
    end_to_end,
    gate,
    kernels,
    networks,
    report,
    timing,
    training,
    work,
)
from bench.records import (
    CONVOLUTION,
    COPY,
    FASTDIFF,
    PLAIN,
    Record,
    of_race,
)
from bench.timing import Contender
from fastdiff import ops
from fastdiff.ops import OPS
from fastdiff.precision import bfloat16_pays
from fastdiff.verify import fault


def test_spread_is_the_median_and_the_middle_sixty_percent():
    spread = timing.Spread.of([float(i) for i in range(11)][::-1])
    assert (spread.p20, spread.p50, spread.p80) == (2.0, 5.0, 8.0)


def test_a_burst_is_the_mean_time_of_its_calls(clock):
    calls = [lambda: clock.spend(1000), lambda: clock.spend(3000)]
    assert timing.burst(calls, 3, "cpu") == 2000


def test_the_real_clock_counts_microseconds():
    assert timing.burst([lambda: time.sleep(5e-3)], 1, "cpu") >= 5000


def test_contenders_take_turns():
    order = []
    contenders = [Contender(n, "", (functools.partial(order.append, n),)) for n in "ABC"]
    times = timing.interleave(contenders, [200.0] * 3, "cpu", seconds=0.0, fewest=4)
    turns = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert times.shape == (3, 4) and "".join(turns) == "ABC" * 4
    assert all(order.count(n) == 4 * (1 + 5) for n in "ABC")  # 1 ms of 200 us calls, 1 untimed


def test_rounds_fill_the_time_asked_for(clock):
    contenders = [clock.contender("a", 1000)]
    times = timing.interleave(contenders, [1000.0], "cpu", seconds=0.1, fewest=3)
    assert times.shape == (1, 50)  # each a timed call and an untimed one
    assert clock.ns == 1e8


def test_a_race_reports_each_providers_fastest_option(clock):
    entered = [("a", 3000, "slow"), ("a", 1000, "fast"), ("b", 2000), ("c", 4000)]
    contenders = [clock.contender(*each) for each in entered]
    raced = timing.race(contenders, "cpu", 0.0, 2, only_if_faster={"c": "b", "b": "c"})
    assert {provider: contender.how for provider, (contender, _) in raced.items()} == {
        "a": "fast",
        "b": "",
    }
    assert raced["a"][1].tolist() == [1000, 1000] and raced["b"][1].tolist() == [2000, 2000]


def test_ratio_is_the_median_of_the_rounds_ratios():
    """A machine that slows down tenfold midway leaves the ratio as it is; medians would not."""
    drift = np.array([1.0, 1.0, 10.0])
    raced = {
        FASTDIFF: (Contender(FASTDIFF, "", ()), drift),
        "peer": (Contender("peer", "", ()), 3 * drift * [1, 1, 0.9]),
    }
    ours, peer = of_race(raced, section="s", row="r")
    assert ours.ratio == 1.0 and peer.ratio == 3.0 and peer.p50 == 3.0


@pytest.mark.parametrize("name", list(OPS))
def test_the_gate_passes_right_kernels(name):
    assert gate.refused([OPS[name]], (), "cpu") == {}


def break_op(monkeypatch, op, spoil):
    """Let the op's kernel be followed by `spoil(its first output)`."""
    launcher = type(op).launcher

    def wrong(*args):
        launcher(op, "cpu")(*args)
        spoil(args[-len(op.outputs)])

    def broken(self, device):
        return wrong if self is op else launcher(self, device)

    monkeypatch.setattr(type(op), "launcher", broken)


@pytest.mark.parametrize(
    "spoil",
    [lambda out: out.mul_(1 + 1e-5), lambda out: out.fill_(torch.nan), lambda out: out.add_(1e-4)],
    ids=["scaled", "nan", "shifted"],
)
def test_the_gate_refuses_wrong_kernels(monkeypatch, spoil):
    op = OPS["cfg"]
    break_op(monkeypatch, op, spoil)
    case = next(c for c in op.cases() if c.name == "fp32")
    assert "error" in fault(op, case)


def test_wrong_bits_are_refused(monkeypatch):
    op = OPS["randn"]
    break_op(monkeypatch, op, lambda out: out.view(torch.int32).bitwise_xor_(1))
    assert "in case 'bits'" in gate.refused([op], (), "cpu")["randn"]


@pytest.mark.parametrize("row", kernels.ROWS, ids=lambda row: row.name)
def test_contenders_of_a_row_agree(row):
    op = OPS[row.op]
    inputs = next(c for c in op.cases() if c.name == row.small).inputs("cpu")
    if not kernels.has_kernel(op, inputs):
        pytest.skip("no kernel for this CPU")
    made = row.make(op, inputs, QUICK)
    assert work.faults(made) == {}
    assert {FASTDIFF, PLAIN, COPY} <= {o.provider for o in made.options}


@pytest.mark.parametrize("row", kernels.ROWS, ids=lambda row: row.name)
def test_large_cases_exist(row):
    assert next(c for c in OPS[row.op].cases() if c.name == row.large).large


def test_agreement_sees_what_is_wrong():
    true, z = torch.randn(9999, dtype=torch.float64), torch.randn(9999)
    exact = agreement.equal(lambda: true, torch.float32)
    assert exact(true.float()) is None and "error" in exact(1.001 * true)
    noisy = agreement.normal(lambda: (true, 0.5))
    assert noisy(true + 0.5 * z) is None
    assert "noise" in noisy(true + 0.6 * z) and "noise" in noisy(true + 0.5 * z + 0.1)
    x0, alpha, sigma = torch.rand(9, 999), torch.full((9, 1), 0.8), torch.full((9, 1), 0.6)
    z = torch.randn(9, 999)
    pair = agreement.noised(x0, alpha, sigma)
    assert pair((alpha * x0 + sigma * z, alpha * z - sigma * x0)) is None
    assert pair((alpha * x0 + sigma * z, alpha * z + sigma * x0))


def test_allocations_are_counted():
    x, m = torch.randn(2, *calls.SHAPE)
    few, more = (calls._allocations(steps, x, m) for steps in (10, 30))
    assert few > 0 and more == few


def figures(**ratios):
    about = {"section": kernels.SECTION, "row": "step as DDIM", "metric": "us"}
    ours = Record(provider=FASTDIFF, p20=1, p50=1, p80=1, ratio=1, **about)
    return [ours, *(Record(provider=p, p50=r, ratio=r, **about) for p, r in ratios.items())]


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        ({"diffusers": 20.0, "copy": 0.5}, [True, True]),
        ({"diffusers": 19.9, "copy": 0.4}, [False, False]),
        ({}, [False, False]),
    ],
)
def test_bars_are_met_or_not(ratios, met):
    found = bars.by_row(figures(**ratios))
    assert [bar.met(found) for bar in bars.BARS if bar.row == "step as DDIM"] == met


def test_own_figures_have_bars_too():
    bar = next(b for b in bars.BARS if b.row == "ops.step, DDIM")
    record = Record(calls.SECTION, bar.row, FASTDIFF, "us", 4.0)
    assert bar.met(bars.by_row([record])) and str(bar) == "≤ 4"
    assert not bar.met(bars.by_row([replace(record, p50=4.01)]))


def test_the_table_is_aligned_and_says_what_is_met():
    text = report.table(kernels.SECTION, figures(diffusers=25.0, copy=0.5))
    head, line = text.splitlines()
    assert head.index("required") == line.index("≥ 20 x diffusers met")
    assert "2.00" in line and line.endswith("≤ 2.2 x copy met")


def test_a_refused_row_shows_its_reason_and_no_time():
    record = Record(kernels.SECTION, "cfg", FASTDIFF, "", None, note="refused: wrong (error 1e-1)")
    _, line, note = report.table(kernels.SECTION, [record]).splitlines()
    assert line.split() == ["cfg", "-"] and "refused: wrong" in note


@pytest.mark.parametrize(
    ("ratios", "met"),
    [((3.0, 2.1), True), ((3.0, 2.09), False), ((), False)],
    ids=["met", "not met", "no other"],
)
def test_a_bar_against_the_fastest_other(ratios, met):
    title = networks.ROWS[0].title
    bar = next(b for b in bars.BARS if b.row == title)
    records = [
        Record(networks.SECTION, title, f"peer {k}", "us", r, ratio=r) for k, r in enumerate(ratios)
    ]
    yardstick = Record(networks.SECTION, title, CONVOLUTION, "us", 1.0, ratio=0.5)
    assert bar.met(bars.by_row([yardstick, *records])) == met
    assert str(bar) == "≥ 2.1 x the fastest other (aim 2.4)"


def test_bars_stand_on_rows_that_are_measured():
    rows = {r.name for r in kernels.ROWS} | {r.title for r in networks.ROWS}
    rows |= {f"{r.title}: error" for r in networks.ROWS} | {networks.STABLE_DIFFUSION.title}
    rows |= {r.about["row"] for r in end_to_end.ROWS}
    sections = (kernels.SECTION, networks.SECTION, end_to_end.SECTION)
    assert {b.row for b in bars.BARS if b.section in sections} <= rows


@pytest.fixture
def only_the_tiny_model(monkeypatch, two_runtimes):
    monkeypatch.setattr(networks, "ROWS", [row(), row(torch.bfloat16)])
    monkeypatch.setattr(end_to_end, "ROWS", [end_to_end.Loop("tiny", tiny, 2, torch.float32)])


def test_a_run_from_end_to_end(tmp_path, capsys, only_the_tiny_model):
    out = tmp_path / "some" / "result.json"
    assert command.main(["--quick", "--steps", "3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    records = [Record(**r) for r in content["records"]]
    left_out = tuple(r.row for r in records if r.note.startswith("left out"))
    assert not (left_out and ops.conv3x3_available(torch.bfloat16)), left_out
    assert all(r.p50 is not None for r in records if r.row not in left_out)
    found = bars.by_row(records)
    for bar in bars.BARS:
        if bar.section not in (networks.SECTION, end_to_end.SECTION, training.SECTION):
            assert (bar.row, bar.against) in found or bar.row.startswith(left_out), bar
    dtype = "bf16" if bfloat16_pays("cpu") else "fp32"
    peers = (training.DIFFUSERS, training.DEFAULT)[: 2 if dtype == "bf16" else 1]
    for provider in (FASTDIFF, *peers):
        for what in ("", ": memory"):
            assert found[f"CIFAR-10 network, batch 1, {dtype}{what}", provider].p50 > 0
    for what in ("", ": error", ": memory"):
        assert found[f"tiny, batch 2, {dtype}{what}", FASTDIFF].p50 > 0
    for record in records:
        assert record.row in shown
        assert record.p20 is None or record.p20 <= record.p50 <= record.p80


def test_a_wrong_kernel_is_refused_and_fails_the_run(tmp_path, capsys, monkeypatch):
    break_op(monkeypatch, OPS["step"], lambda out: out.mul_(1.01))
    out = tmp_path / "result.json"
    sections = [part for s in (kernels.SECTION, calls.SECTION) for part in ("--only", s)]
    assert command.main(["--quick", "--out", str(out), *sections]) == 1
    assert "gate: step WRONG" in capsys.readouterr().out
    records = [Record(**r) for r in json.loads(out.read_text())["records"]]
    steps = [r for r in records if "step" in r.row]
    assert steps and all(r.p50 is None and "refused: wrong (error" in r.note for r in steps)
    assert any(r.row == "cfg" and r.p50 for r in records)


def test_check_fails_where_a_bar_is_not_met(tmp_path, monkeypatch, capsys):
    bar = next(b for b in bars.BARS if b.section == "accuracy")
    arguments = ["--check", "--only", "accuracy", "--out", str(tmp_path / "result.json")]
    monkeypatch.setattr(ceiling, "measure", lambda settings: [])
    assert command.main(arguments) == 0
    monkeypatch.setattr(report, "BARS", [replace(bar, limit=1e-9)])
    assert command.main(arguments) == 1
    assert "NOT MET" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "must be a whole number, 1 or more"),
        (["--quick", "--check"], "needs the full sizes"),
        (["--only", "nothing"], "invalid choice"),
    ],
)
def test_misuse_is_told(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setattr(command, "NEEDS", ("no_such_package",))
    with pytest.raises(SystemExit, match=r"no_such_package: pip install 'fastdiff\[bench\]'"):
        command.main([])


def test_it_runs_as_a_script():
    script = [sys.executable, str(ROOT / "bench" / "run.py"), "--help"]
    assert "--steps" in subprocess.check_output(script, text=True, cwd="/")
