"""The benchmark of networks and loops: every runtime, on a tiny network."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from benches import QUICK, tiny
from torch._inductor.utils import run_and_get_code

from bench import (
    end_to_end,
    growth,
    loops,
    memory,
    networks,
    peers,
    runtimes,
    subjects,
)
from bench.records import (
    FASTDIFF,
    RATE,
    Settings,
)
from fastdiff import NoiseSchedule


def ready(dtype=torch.float32, quick=True):
    x, t, labels = tiny().example(2, "cpu")
    early = t // 500  # in so small a network a rounded angle of a late time is most of the error
    return networks.ready(tiny(), (x, early, labels), dtype, Settings(quick=quick))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_runtime_computes_the_network(dtype):
    runners, left_out = ready(dtype)
    installed = {r.name for r in runtimes.RUNTIMES if r.installed and not r.compiles}
    assert (
        set(runners)
        == {r.name for r in runtimes.RUNTIMES if r.takes(tiny().network, dtype)} & installed
    )
    assert all(why.startswith("not installed") for why in left_out.values())
    assert all(0 < r.error < 0.1 and r.ms > 0 for r in runners.values())
    assert "packed weights" in runners[FASTDIFF].held


class Convolution(torch.nn.Module):
    """As a network, one layer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x)


def convolution():
    return subjects.Subject(Convolution().eval(), (3, 8, 8), NoiseSchedule.cosine(10), "v")


@torch.no_grad()
def test_frozen_compilation_computes_a_network(monkeypatch):
    chosen = [r for r in runtimes.RUNTIMES if r.name in (runtimes.EAGER.name, "torch.compile")]
    monkeypatch.setattr(runtimes, "RUNTIMES", chosen)
    example = convolution().example(2, "cpu")
    runners, left_out = networks.ready(convolution(), example, torch.float32, Settings())
    assert set(runners) == {"PyTorch", "torch.compile"} and not left_out


@torch.no_grad()
def test_frozen_compilation_packs_the_weights_once():
    compiled = next(r for r in runtimes.RUNTIMES if r.compiles)
    subject = convolution()
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(
            lambda: compiled.prepare(subject.network, subject.example(2, "cpu"), torch.float32)
        )
    assert any("_frozen_param" in code for code in codes)


def altered(monkeypatch, name, **how):
    """Let a runtime of this name be another."""
    table = [replace(r, **how) if r.name == name else r for r in runtimes.RUNTIMES]
    monkeypatch.setattr(runtimes, "RUNTIMES", table)


@torch.no_grad()
def test_a_runtime_that_is_wrong_broken_or_absent_is_told(monkeypatch):
    exact = runtimes.EAGER.prepare
    altered(monkeypatch, "OpenVINO", package="no_such_package")
    altered(monkeypatch, "ONNX Runtime", package="torch", prepare=lambda *_: 1 / 0)
    altered(
        monkeypatch, FASTDIFF,
        prepare=lambda *how: lambda *args: 1.001 * exact(*how)(*args),
    )  # fmt: skip
    runners, left_out = ready()
    assert set(runners) == {runtimes.EAGER.name}
    assert "refused: wrong (error 1.0e-03" in left_out[FASTDIFF]
    assert left_out["OpenVINO"].startswith("not installed")
    assert left_out["ONNX Runtime"] == "left out: ZeroDivisionError: division by zero"


@torch.no_grad()
def test_a_peer_that_rounds_more_is_timed_with_a_note(monkeypatch, two_runtimes):
    exact = runtimes.EAGER.prepare
    rough = replace(
        runtimes.EAGER, name="peer", prepare=lambda *how: lambda *args: 1.01 * exact(*how)(*args)
    )
    monkeypatch.setattr(runtimes, "RUNTIMES", (*runtimes.RUNTIMES, rough))
    monkeypatch.setattr(networks, "ROWS", [networks.Row("tiny", tiny, 2, torch.float32)])
    records = list(networks.measure(QUICK, {}))
    (timed,) = (r for r in records if r.provider == "peer" and r.ratio and r.metric == "us")
    assert timed.p50 and timed.note.startswith("is timed, though it rounds more (error 1.0e-02")


def test_flops_are_those_of_the_direct_algorithms():
    assert networks.gflop(convolution()) == 2 * 9 * 3 * 5 * 64 / 1e9
    yardstick, work = networks.convolution_of(torch.float32, QUICK)
    assert work == 2 * 9 * 32 * 32 * 64 / 1e9 and yardstick.calls[0]().shape == (1, 32, 8, 8)


def test_memory_is_what_a_process_holds():
    before = memory.resident()
    if before is None:
        pytest.skip("needs Linux's /proc")
    kept = torch.ones(2**24)  # 64 MB
    memory.reset_peak()
    torch.ones(2**24)
    assert 60 < memory.resident() - before < 70 and 120 < memory.peak() - before < 140
    del kept


@torch.no_grad()
def test_loops_give_the_same_images_and_a_time_a_step(monkeypatch, two_runtimes):
    few = end_to_end.Loop("tiny", tiny, 2, torch.float32, steps=3)
    monkeypatch.setattr(end_to_end, "ROWS", [few])
    records = list(end_to_end.measure(Settings(steps=7, quick=True), {}))
    times, rates = ({r.provider: r for r in records if r.metric == m} for m in ("us", RATE))
    assert times.keys() == rates.keys() == {FASTDIFF, runtimes.EAGER.name}
    assert {r.row for r in records} == {"tiny, batch 2, fp32, 3 steps"}
    assert all(r.p50 > 0 for r in times.values())
    assert not any(r.note for r in records)


@torch.no_grad()
def test_loops_that_differ_are_refused(monkeypatch, two_runtimes):
    monkeypatch.setattr(end_to_end, "ROWS", [end_to_end.Loop("tiny", tiny, 2, torch.float32)])
    monkeypatch.setattr(peers, "guided", lambda c, u, w: c)
    records = list(end_to_end.measure(Settings(steps=7, quick=True), {}))
    refused = [r for r in records if r.note.startswith("refused")]
    assert [r.provider for r in refused] == [FASTDIFF] and "images are off" in refused[0].note
    assert not any(r.p50 for r in records)


def test_turns_time_each_loops_steps(clock):
    def other():
        for _ in range(3):
            clock.spend(400)
            yield torch.zeros(1)

    class Network(torch.nn.Module):
        def forward(self, x):
            clock.spend(100)
            return x

    network, turns = Network(), loops.Turns({"other": other()}, "cpu")
    clock.spend(7)  # fastdiff's preparation
    with network.register_forward_pre_hook(turns):
        for _ in range(3):
            network(torch.zeros(1))
            clock.spend(5)  # fastdiff's own work
    steps = {provider: np.round(us, 3).tolist() for provider, us in turns.steps().items()}
    assert steps == {FASTDIFF: [112, 105, 105], "other": [400, 400, 400]}


def test_the_cifar10_network_has_its_published_size():
    with torch.device("meta"):
        plain, guided = (subjects.cifar10(classes).network for classes in (None, 10))
    sizes = [sum(p.numel() for p in network.parameters()) for network in (plain, guided)]
    assert sizes == [35_746_307, 35_746_307 + 11 * 512]


def test_growth_measures_each_size_on_each_runtime(tmp_path, capsys):
    kinds = (runtimes.OURS, runtimes.EAGER)
    panel = growth.Panel("tiny, by batch", tiny, ((1, 1, 8), (2, 2, 8)), kinds)
    out = tmp_path / "some" / "growth.png"
    threads = torch.get_num_threads()
    assert growth.main(["--out", str(out)], (panel,)) == 0
    assert torch.get_num_threads() == threads and str(out) in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    points = [growth.Point(**p) for p in json.loads(out.with_suffix(".json").read_text())["points"]]
    assert {p.provider for p in points} == {growth.ROOF, FASTDIFF, runtimes.EAGER.name}
    assert all(p.ms > 0 for p in points)
    work = {p.x: p.gflop for p in points}
    assert work[1] == networks.gflop(tiny()) and work[2] == 2 * work[1]
