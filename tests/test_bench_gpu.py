"""The benchmark's code for GPUs, on a GPU that is this CPU."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benches import QUICK, row, tiny

from bench import (
    bars,  # noqa: F401, which counts the rows when it is imported
    calls,
    command,
    end_to_end,
    gate,
    kernels,
    memory,
    networks,
    records,
    runtimes,
    subjects,
    timing,
)
from bench.records import FASTDIFF, PLAIN, Record, Settings
from fastdiff import DDIMSampler, NoiseSchedule, UNetConfig
from fastdiff.ops import OPS

GPU = Settings(device="cuda")


def test_the_gpu_idles_until_its_calls_are_queued(monkeypatch, clock):
    """Its own time is between two events, after a wait that covers the host's part."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            done.append("event")

        def elapsed_time(self, other):
            return 0.6  # ms

    def call():
        clock.spend(100)
        done.append("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(cycles))
    assert timing.busy([call, call, call], 2, "cuda") == pytest.approx(600 / 6)
    cycles = timing.CYCLES_A_US * 2 * 6 * 100
    wanted = ["wait", "call", cycles, "event", *["call"] * 6, "event", "wait"]
    assert [pytest.approx(d) if isinstance(d, int) else d for d in done] == wanted
    done.clear()
    timing.busy([call] * 4, 2000, "cuda")
    assert done.count("call") == 1 + timing.QUEUED


def test_what_a_caller_waits_for_ends_with_the_gpus_work(monkeypatch, clock):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.spend(500))
    assert timing.burst([lambda: clock.spend(10)], 5, "cuda") == pytest.approx((5 * 10 + 500) / 5)


def test_buffers_outrun_the_cache(pretended_gpu):
    assert kernels.sets(GPU, 40_000_000) == 3 and kernels.sets(GPU, 20_000_000) == 7
    assert kernels.sets(GPU, 1) == 32 and kernels.sets(QUICK, 1) == kernels.SETS


@pytest.fixture
def only_the_tiny_model(monkeypatch):
    chosen = [r for r in runtimes.RUNTIMES if r.name in ("PyTorch", FASTDIFF, "OpenVINO")]
    monkeypatch.setattr(runtimes, "RUNTIMES", chosen)
    monkeypatch.setattr(networks, "ROWS", (row(),))
    monkeypatch.setattr(networks, "MORE_ON_GPUS", (row(torch.bfloat16),))
    monkeypatch.setattr(end_to_end, "ROWS", (end_to_end.Loop("tiny", tiny, 2, torch.float32),))
    monkeypatch.setattr(end_to_end, "MORE_ON_GPUS", ())
    monkeypatch.setattr(records, "bfloat16_pays", lambda device: True)  # as on every GPU
    end_to_end._ready.cache_clear()
    yield
    end_to_end._ready.cache_clear()


def test_a_run_on_a_gpu_from_end_to_end(tmp_path, capsys, only_the_tiny_model, pretended_gpu):
    out = tmp_path / "result.json"
    sections = [part for s in ("kernels", "networks", "end to end") for part in ("--only", s)]
    arguments = ["--device", "cuda", "--quick", "--steps", "3", "--out", str(out), *sections]
    assert command.main(arguments) == 0
    shown, content = capsys.readouterr().out, json.loads(out.read_text())
    assert "Pretended, compute capability 9.0" in shown and "TF32" in shown
    assert "required" not in shown and "requirements" not in shown
    found = [Record(**r) for r in content["records"]]
    timed = {r.row for r in found if r.p50 is not None and r.provider == FASTDIFF}
    assert {"step as DDIM", "step as DDIM, in cache", "step as DDIM, as called"} <= timed
    assert {"tiny, batch 2, fp32", "tiny, batch 2, bf16"} <= timed
    notes = {(r.row, r.provider): r.note for r in found if r.p50 is None}
    assert notes["conv3x3", FASTDIFF] == "left out: has no kernel for GPUs here"
    assert notes["tiny, batch 2, fp32", "OpenVINO"] == "left out: runs on the CPU alone here"
    assert pretended_gpu and min(pretended_gpu) >= 0


def test_the_cpus_requirements_are_not_a_gpus(capsys):
    with pytest.raises(SystemExit):
        command.main(["--check", "--device", "cuda"])
    assert "the requirements are the CPU's" in capsys.readouterr().err


def test_without_a_gpu_it_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch can use no GPU here"):
        command.main(["--device", "cuda"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_loops_take_turns_the_compiled_one_too(dtype, two_runtimes, monkeypatch):
    settings = SimpleNamespace(device="cpu", quick=True, compile=True, seconds=0.0, rounds=2)
    loop = end_to_end.Loop("tiny", tiny, 2, dtype)
    subject, runners, _ = end_to_end._ready(loop.build, 2, dtype, QUICK)
    loops_of = end_to_end.Loops(loop, subject, runners, 5, settings)
    real = torch.compile  # all but the compiler's minute: traced, and that in one piece

    def traced(function, mode, **options):
        assert mode == "reduce-overhead" and options["fullgraph"]
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    times, states = loops_of.whole()
    assert times.keys() == states.keys() == {FASTDIFF, runtimes.EAGER.name, PLAIN}
    assert all(us.shape == (2,) and (us > 0).all() for us in times.values())
    assert end_to_end._strays(states, 1e-3 if dtype == torch.float32 else 0.05) == {}
    assert loops_of.notes == {}
    in_step, ends = loops_of.in_step()
    assert torch.equal(ends[FASTDIFF], states[FASTDIFF]) and np.array(in_step[FASTDIFF]).size == 5


@torch.no_grad()
def test_peers_with_cuda_graphs_compute_the_network(monkeypatch):
    graphs = [r for r in runtimes.RUNTIMES if r.devices == ("cuda",)]
    assert [r.name for r in graphs] == ["torch.compile, graphs", "torch.compile, tuned"]
    subject = tiny()
    example = subject.example(2, "cpu")
    wanted = subject.network(*example)
    with torch.compiler.set_stance("force_eager"):
        for runtime in graphs:
            call = runtime.prepare(subject.network, example, torch.float32)
            torch.testing.assert_close(call(*example), wanted)


@torch.no_grad()
def test_a_networks_input_is_cast_to_its_dtype():
    x, *rest = tiny().example(2, "cpu")
    cast = subjects.Cast(tiny().network.bfloat16(), torch.bfloat16)
    assert cast(x, *rest).dtype == torch.bfloat16


def test_memory_of_a_gpu_is_what_torch_reserves(monkeypatch):
    reserved = {"memory_reserved": 3 << 20, "max_memory_reserved": 5 << 20}
    for name, value in reserved.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    done = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: done.append(name))
    memory.reset_peak("cuda")
    assert (memory.resident("cuda"), memory.peak("cuda")) == (3, 5)
    assert done == ["reset_peak_memory_stats", "empty_cache"]


def test_a_row_that_fails_ends_no_other(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of resources\nand more")

    first, second = kernels.ROWS[:2]
    monkeypatch.setattr(kernels, "ROWS", (replace(first, make=fails), second))
    failed, *others = kernels.measure(QUICK, {})
    assert failed.row == first.name and failed.note == "refused: RuntimeError: out of resources"
    assert {r.row for r in others} == {second.name, second.name + kernels.IN_CACHE}


def test_a_kernel_that_does_not_run_is_refused(monkeypatch):
    def fails(*args):
        raise RuntimeError("CUDA error: no kernel image\nand more")

    monkeypatch.setattr(gate, "fault", fails)
    wrong = gate.refused([OPS["cfg"]], (), "cpu")["cfg"]
    assert wrong.startswith("RuntimeError in case") and wrong.endswith("no kernel image")


def test_the_adm_network_hides_no_error(monkeypatch):
    config = UNetConfig(channels=32, norm_groups=8, num_classes=2)
    monkeypatch.setattr(UNetConfig, "adm", lambda size: config)
    network = subjects.adm(64).network
    assert all(p.any() for p in network.parameters())


@torch.no_grad()
def test_a_free_model_can_be_captured():
    """Only a module is; its output stays where it is."""
    m = torch.randn(calls.SHAPE)
    x = DDIMSampler(NoiseSchedule.linear(1000), 3).sample(calls.Free(m), calls.SHAPE, x_T=m)
    free = DDIMSampler(NoiseSchedule.linear(1000), 3).sample(lambda x, t: m, calls.SHAPE, x_T=m)
    assert torch.equal(x, free) and isinstance(calls.Free(m), torch.nn.Module)


@torch.no_grad()
def test_a_loop_that_fails_is_left_out_and_one_without_a_graph_says_so(two_runtimes, monkeypatch):
    settings = SimpleNamespace(device="cpu", quick=True, compile=True, seconds=0.0, rounds=2)
    loop = end_to_end.Loop("tiny", tiny, 2, torch.float32)
    subject, runners, _ = end_to_end._ready(loop.build, 2, torch.float32, QUICK)
    loops_of = end_to_end.Loops(loop, subject, runners, 3, settings)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: lambda *args: 1 / 0)
    sample = DDIMSampler.sample

    def warns(*args, **given):
        warnings.warn("the model cannot be captured as a CUDA graph: why", stacklevel=1)
        return sample(*args, **given)

    monkeypatch.setattr(DDIMSampler, "sample", warns)
    times, states = loops_of.whole()
    assert times.keys() == states.keys() == {FASTDIFF, runtimes.EAGER.name}
    assert loops_of.notes == {
        PLAIN: "left out: ZeroDivisionError: division by zero",
        FASTDIFF: "ran without CUDA graphs: the model cannot be captured as a CUDA graph: why",
    }
