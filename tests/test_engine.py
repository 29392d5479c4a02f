"""The engine against the network it was made from, in float64 and in torch's own precision."""

import copy
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from networks import NETWORKS, inputs, network, run
from torch import nn

import fastdiff
from fastdiff import DDIMSampler, NoiseSchedule, optimize
from fastdiff.engine import Engine
from fastdiff.engine.optimize import compiled
from fastdiff.models.network import Network
from fastdiff.precision import bfloat16_pays


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_error_is_at_most_three_times_torchs(name, batch):
    model, args = network(name), inputs(name, batch)
    truth = run(copy.deepcopy(model).double(), *args, dtype=torch.float64)
    ours = relative(run(optimize(model), *args), truth)
    assert ours <= 3 * relative(run(model, *args), truth)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_error_is_at_most_1_3_times_torchs(name):
    model, args = network(name), inputs(name)
    truth = run(copy.deepcopy(model).double(), *args, dtype=torch.float64)
    ours = relative(run(optimize(model, "bfloat16"), *args), truth)
    torchs = run(copy.deepcopy(model).bfloat16(), *args, dtype=torch.bfloat16)
    assert ours <= 1.3 * relative(torchs, truth)


def test_a_bfloat16_network_is_computed_in_bfloat16_from_its_weights_where_that_pays():
    model, args = network("ddpm").bfloat16(), inputs("ddpm")
    fast = optimize(model)
    assert fast.compute == (torch.bfloat16 if bfloat16_pays("cpu") else torch.float32)
    with torch.no_grad():
        out = fast(args[0].bfloat16(), args[1])
    assert out.dtype == torch.bfloat16
    assert relative(out.double(), run(model, *args, dtype=torch.bfloat16)) < 0.03


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_machines_without_avx512_compute_in_float32(isa):
    code = """
import copy, os, torch
from networks import inputs, network, run
from fastdiff import ops, optimize
winograd = ops.conv3x3_available(torch.float32)
assert winograd == (os.environ["FASTDIFF_ISA"] == "avx2")
assert not ops.conv3x3_available(torch.bfloat16)
for name in ("adm", "UNet2DConditionModel"):
    model, args = network(name), inputs(name)
    truth = run(copy.deepcopy(model).double(), *args, dtype=torch.float64)
    halved = copy.deepcopy(model).bfloat16()
    own = {
        "float32": (run(model, *args) - truth).norm(),
        "bfloat16": (run(halved, *args, dtype=torch.bfloat16) - truth).norm(),
    }
    for (dtype, torchs), times in zip(own.items(), (3, 1.3)):
        fast = optimize(model, dtype)
        error = (run(fast, *args) - truth).norm()
        assert error <= times * torchs, (name, dtype, error, torchs)
        assert winograd or "winograd" not in repr(fast), fast
        assert fast.compute == torch.float32
"""
    others = {"avx2": ("AVX2", "avx2"), "scalar": ("SSE41", "default")}
    own = {"FASTDIFF_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    theirs = dict(zip(("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"), others[isa], strict=True))
    env = {**os.environ, **own, **theirs}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if f"FASTDIFF_ISA={isa}: this machine runs" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stderr


def test_the_call_and_its_result_are_the_networks_own():
    model, (x, t, text) = network("UNet2DConditionModel"), inputs("UNet2DConditionModel")
    fast = optimize(model)
    with torch.no_grad():
        wanted, out = model(x, t, text), fast(x, t, encoder_hidden_states=text)
        (first,) = fast(x, 7, text, return_dict=False)
        named = fast(sample=x, timestep=torch.tensor(7), encoder_hidden_states=text)
        half = fast(x.bfloat16(), t, text.bfloat16()).sample
        same = model(x, 7, text).sample
    assert type(out) is type(wanted)
    torch.testing.assert_close(out.sample, wanted.sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first, same, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first, named.sample)
    assert half.dtype == torch.bfloat16
    assert fast.config.sample_size == model.config.sample_size


def test_results_are_new_tensors_and_memory_stays_where_it_is():
    fast, args = optimize(network("ddpm")), inputs("ddpm")
    first = fast(*args)
    kept, arena = first.clone(), fast._arena.data_ptr()
    second = fast(args[0] + 1, args[1])
    assert torch.equal(first, kept) and not torch.equal(first, second)
    fast(*inputs("ddpm", 1))
    assert fast._arena.data_ptr() == arena
    fast(*inputs("ddpm", 5))  # a larger batch moves the arena, and every program with it
    assert fast._arena.data_ptr() != arena
    torch.testing.assert_close(fast(*args), kept)


def test_prepared_rows_are_computed_once_and_are_the_same(monkeypatch):
    fast, (x, _, cond) = optimize(network("adm")), inputs("adm")
    plain = [fast(x, torch.full((2,), i), cond) for i in range(6)]
    rows = torch.arange(6)[:, None].repeat(1, 2)
    embedding, calls = fast._latest.embedding, []
    moving = embedding._moving
    monkeypatch.setattr(embedding, "_moving", lambda *a: calls.append(a) or moving(*a))
    fast.prepare_rows(x, rows, cond)
    for i in (0, 3, 1, 5, 2, 4):
        torch.testing.assert_close(fast(x, rows[i], cond), plain[i], rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    other = cond.flip(0)  # not what was prepared for
    truth = run(network("adm"), x, rows[1], other)
    torch.testing.assert_close(fast(x, rows[1], other).double(), truth, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
    cond.copy_(other)  # the tensor of the run, with other labels in it
    torch.testing.assert_close(fast(x, rows[1], cond).double(), truth, rtol=1e-4, atol=1e-4)


def test_long_runs_are_prepared_in_pieces(monkeypatch):
    fast, (x, _, cond) = optimize(network("adm")), inputs("adm")
    rows = torch.arange(7)[:, None].repeat(1, 2)
    fast.prepare_rows(x, rows, cond)
    whole = [fast(x, row, cond) for row in rows]
    width = sum(n.meta["val"].numel() for n in fast._latest.embedding.moving)
    monkeypatch.setattr("fastdiff.engine.embedding._CHUNK", 3 * width)
    fast.prepare_rows(x, rows, cond)
    for row, wanted in zip(rows, whole, strict=True):
        torch.testing.assert_close(fast(x, row, cond), wanted)


@pytest.mark.parametrize("interval", [None, (0.2, 0.7)])
def test_samples_are_those_of_the_network(interval):
    model = network("adm")
    schedule = NoiseSchedule.cosine(1000)
    sampler = DDIMSampler(schedule, steps=8, clip=1.0)
    how = {"seed": 0, "cond": torch.tensor([0, 1, 3]), "guidance": 1.5}
    if interval:
        how["guidance_interval"] = interval
    wanted = sampler.sample(model, (3, 3, 16, 16), **how)
    ours = sampler.sample(optimize(model), (3, 3, 16, 16), **how)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


CHANGES = {
    "in place": lambda conv: conv.weight.mul_(2),
    "through .data": lambda conv: conv.weight.data.copy_(2 * conv.weight),
    "another .data": lambda conv: setattr(conv.weight, "data", 2 * conv.weight.detach()),
    "another parameter": lambda conv: setattr(conv, "weight", nn.Parameter(2 * conv.weight)),
    "another module": lambda conv: conv.register_module("adapter", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_network_is_noticed(change):
    model, args = network("ddpm"), inputs("ddpm")
    fast = optimize(model)
    before, program = fast(*args), fast._latest
    fast(*args)
    assert fast._latest is program
    with torch.no_grad():
        CHANGES[change](model.input_blocks[0][0])
    after = fast(*args)
    assert fast._latest is not program
    assert relative(after.double(), run(model, *args)) < 1e-5
    assert torch.allclose(after, before, atol=1e-4) == (change == "another module")


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_what_is_made_in_one_mode_serves_in_another(first):
    model, args = network("ddpm"), inputs("ddpm")
    fast = optimize(model)
    with first():
        expected = fast(*args)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert fast(*args).equal(expected)
    fast.report(rounds=1)
    with torch.inference_mode():
        within = optimize(network("ddpm"))  # its weights too
        assert within(*args).shape == expected.shape
        within.report(rounds=1)


def test_a_network_that_was_cast_is_read_again():
    model, args = network("ddpm"), inputs("ddpm")
    fast = optimize(model, "float32")
    fast(*args)
    expected = run(model, *args)
    model.bfloat16()
    assert relative(fast(args[0].bfloat16(), *args[1:]).double(), expected) < 2e-2


def test_low_memory_does_without_the_largest_weights():
    model, args = network("adm"), inputs("adm")
    high, low = optimize(model), optimize(model, memory="low")
    torch.testing.assert_close(low(*args), high(*args), rtol=1e-4, atol=1e-4)
    assert "winograd4" not in repr(low)
    for engine in (high, low):
        assert engine._weights.bytes > 0
    assert low._weights.bytes <= high._weights.bytes


def test_the_report_names_every_layer_and_who_runs_it():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 32, 3, padding=1)
            self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
            self.norm = nn.LayerNorm(8)

        def forward(self, x, t):
            return self.norm(torch.tanh(self.grouped(self.conv(x)))) * t[:, None, None, None]

    model, (x, t) = Odd().eval(), (torch.randn(2, 16, 8, 8), torch.tensor([1, 2]))
    fast = optimize(model)
    with pytest.raises(RuntimeError, match="call the network first"):
        fast.report()
    torch.testing.assert_close(fast(x, t), model(x, t).detach())
    report = fast.report(rounds=1)
    where = {line.layer: line.backend for line in report.lines}
    assert where["norm"] == "torch" and where["grouped"] == "onednn" and "conv" in where
    assert all(line.seconds > 0 for line in report.lines)
    assert "layers: torch" in str(report) and "torch" in repr(fast)
    direct = 2 * 2 * 32 * 16 * 9 * 8 * 8
    assert next(line.flops for line in report.lines if line.layer == "conv") == direct


def test_weights_that_depend_on_the_inputs_are_left_to_torch():
    class Modulated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 16, 3, 3))
            self.mix = nn.Parameter(torch.randn(32, 32))

        def forward(self, x, t):
            y = nn.functional.conv2d(x, self.weight * x.mean(), padding=1)
            return nn.functional.linear(y.movedim(1, -1), self.mix * t[0]).movedim(-1, 1)

    model, (x, t) = Modulated().eval(), (torch.randn(2, 16, 8, 8) + 1, torch.tensor([2.0, 3.0]))
    fast = optimize(model)
    torch.testing.assert_close(fast(x, t), model(x, t).detach(), rtol=1e-4, atol=1e-4)
    assert fast.report(1).by_backend().keys() == {"torch"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_embedding_and_a_pooled_image_may_be_added_to_convolutions(dtype):
    """An embedding that two convolutions share; an addend that is made of the image itself."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Conv2d(16, 32, 3, padding=1) for _ in range(2))
            self.embed = nn.Linear(1, 32)

        def forward(self, x, t):
            e = self.embed(t[:, None] / 1000)[:, :, None, None]
            y = torch.tanh(self.first(x) + e) + torch.tanh(self.second(x) + e)
            return self.first(x) + y.mean((2, 3), keepdim=True)

    torch.manual_seed(0)
    model, (x, t) = Shared().eval(), (torch.randn(2, 16, 8, 8), torch.tensor([2.0, 900.0]))
    limits = {"float32": 1e-4, "bfloat16": 0.05}
    with torch.no_grad():
        wanted = model(x, t)
    torch.testing.assert_close(optimize(model, dtype)(x, t), wanted, rtol=0, atol=limits[dtype])


def test_it_runs_in_inference_mode():
    model, (x, t, cond) = network("adm"), inputs("adm")
    with torch.inference_mode():
        fast, labels = optimize(model), cond.clone()
        rows = torch.stack([t, t + 1])
        fast.prepare_rows(x, rows, labels)
        first = fast(x, t, labels)
        labels.copy_(cond.flip(0))
        second = fast(x, t, labels)
    assert relative(first.double(), run(model, x, t, cond)) < 1e-5
    assert relative(second.double(), run(model, x, t, cond.flip(0))) < 1e-5


def test_engines_and_threads_do_not_meet():
    jobs = [(optimize(network(name)), inputs(name)) for name in ("ddpm", "adm")]
    jobs += jobs[:1]  # and one engine from two threads
    wanted = [fast(*args) for fast, args in jobs]
    faults = []

    def work(fast, args, truth):
        for _ in range(10):
            if not torch.equal(fast(*args), truth):
                faults.append(args)

    threads = [
        threading.Thread(target=work, args=(*job, truth))
        for job, truth in zip(jobs, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_bad_use_is_refused_with_advice():
    model, (x, t) = network("ddpm"), inputs("ddpm")
    with pytest.raises(TypeError, match="model: got list"):
        optimize([model])
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        optimize(copy.deepcopy(model).train())
    with pytest.raises(ValueError, match=r"dtype='float16': must be"):
        optimize(model, "float16")
    with pytest.raises(ValueError, match="memory='huge': must be"):
        optimize(model, memory="huge")
    with pytest.raises(ValueError, match=r"on meta, must be on the CPU or a GPU.*model\.cpu\(\)"):
        optimize(copy.deepcopy(model).to("meta"))
    fast = optimize(model)
    with pytest.raises(RuntimeError, match="for inference; train the network"):
        fast.train()
    with pytest.raises(RuntimeError, match=r"a gradient is asked for.*\.source"):
        fast(x.clone().requires_grad_(), t)
    with pytest.raises(ValueError, match=r"x of shape .* must be \[B, 3, H, W\]"):
        fast(x[:, :2], t)
    with pytest.raises(ValueError, match="divisible by 2"):
        fast(x[..., :15], t)
    with pytest.raises(ValueError, match="cond: this model is unconditional"):
        fast(x, t, t)
    with pytest.raises(TypeError, match="t: missing"):
        fast(x)
    with pytest.raises(TypeError, match="x: int64 on cpu, must be a floating CPU tensor"):
        fast(x.long(), t)
    with pytest.raises(TypeError):
        optimize(fast)
    assert isinstance(fast, Engine) and fast.eval() is fast and not list(fast.parameters())


def test_state_and_place_are_the_networks(tmp_path):
    model, args = network("ddpm"), inputs("ddpm")
    fast = optimize(model)
    before = fast(*args)
    kept = {name: value.clone() for name, value in fast.state_dict().items()}
    assert kept.keys() == model.state_dict().keys()
    fast.load_state_dict({name: 1.1 * value for name, value in kept.items()})
    assert not torch.equal(fast(*args), before)
    fast.load_state_dict(kept)
    torch.testing.assert_close(fast(*args), before)
    assert fast.to("cpu").float() is fast
    for change in (lambda: fast.to("meta"), fast.half, fast.bfloat16):
        with pytest.raises(RuntimeError, match="stays on the CPU and computes in float32"):
            change()


def test_50_steps_of_the_shipped_model_are_as_near_torchs_as_its_own_layouts_are():
    model = fastdiff.load("fashion-mnist")
    sampler = DDIMSampler(model.schedule, steps=50, prediction=model.prediction)
    how = {"seed": 0, "cond": torch.tensor([9, 3])}
    truth = sampler.sample(model, (2, 1, 32, 32), **how)
    ours = sampler.sample(optimize(model), (2, 1, 32, 32), **how)
    other = sampler.sample(model.to(memory_format=torch.channels_last), (2, 1, 32, 32), **how)
    assert 0 < relative(ours, truth) <= 3 * relative(other, truth)


def test_what_cannot_be_traced_is_said():
    class Moody(nn.Module):
        def forward(self, x, t):
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match=r"torch\.export cannot trace Moody"):
        optimize(Moody().eval())(torch.ones(1, 3, 4, 4), torch.tensor([1]))


@pytest.mark.parametrize("blocks", [False, True], ids=["torch.compile", "compile_blocks"])
def test_what_a_gpu_gets_is_a_compiled_channels_last_copy(monkeypatch, blocks):
    """`optimize` ends in `compiled` for a model on a GPU; the device changes nothing in it."""
    model, (x, t, cond) = network("adm"), inputs("adm")
    done = []
    if blocks:
        monkeypatch.setattr(
            type(model), "compile_blocks", lambda self: done.append(self), raising=False
        )
    elif hasattr(model, "compile_blocks"):
        monkeypatch.delattr(Network, "compile_blocks")
    with torch.compiler.set_stance("force_eager"):  # all but the compiler's minute
        fast = compiled(model, "bfloat16")
        ours = run(fast, x, t, cond, dtype=torch.bfloat16)
    assert done == [fast] * blocks and (fast._compiled_call_impl is None) == blocks
    weight = fast.input_blocks[0][0].weight
    assert weight.dtype == torch.bfloat16 and weight.stride(1) == 1
    assert weight.data_ptr() != model.input_blocks[0][0].weight.data_ptr()
    truth = run(model, x, t, cond)
    assert relative(ours, truth) < 0.05
    with pytest.raises(ValueError, match="dtype='float64': must be"):
        compiled(model, "float64")


def test_it_is_in_the_public_api():
    assert fastdiff.optimize is optimize


class Mixed(nn.Module):
    """Small networks of layers the engine knows and calls that it leaves to torch."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.factor = kind, 1.0
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.out, self.attend = nn.Conv2d(8, 4, 3, padding=1), nn.MultiheadAttention(8, 2)
        self.b, self.b4 = (nn.Parameter(torch.randn(size)) for size in ((8,), (1, 8, 1, 1)))

    def forward(self, x, t, flag=None):
        h = self.conv(x)
        if self.kind == "twice":
            return torch.cat([self.out(h), self.out(h)[:, :2], x[:, :2]], 1)[:, 2:6] * 2
        if self.kind == "guided":
            a, b = self.out(torch.cat([h, h])).chunk(2)
            return a + 2 * (a - b) + t.view(-1, 1, 1, 1)
        if self.kind == "halves":
            return self.out(torch.cat([h[:, :4], h[:, :4]], 1))
        if self.kind == "bias":
            return self.out(h + self.b.view(1, -1, 1, 1)) + self.out(h + self.b4)
        if self.kind == "scale":
            return self.out(self.norm(h) * (1 + self.b4) + self.b.view(1, -1, 1, 1))
        if self.kind == "rows":
            y = h.view(len(h), -1).view_as(h)
            tokens = y.flatten(2).permute(2, 0, 1)
            return self.out(self.attend(tokens, tokens, tokens)[0].permute(1, 2, 0).view_as(h))
        if self.kind == "several":
            return self.out(h), None, h.flatten(1).argmax(1)
        return self.out(h) * (2.0 if flag is True else 3.0)


KINDS = ("twice", "guided", "halves", "bias", "scale", "rows", "several", "flag")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_engine_has_no_kernel_for_is_right_all_the_same(kind, batch):
    model = Mixed(kind).eval().requires_grad_(False)
    fast, x, t = optimize(model), torch.randn(batch, 4, 8, 8), torch.ones(batch)
    for flag in (True, 1, None) if kind == "flag" else (None,):
        right, ours = model(x, t, flag), fast(x, t, flag)
        if kind == "several":
            assert ours[1] is None and ours[2].dtype is torch.int64
            assert torch.equal(ours[2], right[2])
            right, ours = right[0], ours[0]
        assert relative(ours, right) < 1e-5


def test_what_returns_several_values_is_named():
    class Largest(Mixed):
        def forward(self, x, t):
            return self.out(self.conv(x) * self.conv(x).max(1, keepdim=True)[0])

    with pytest.raises(RuntimeError, match=r"aten.max.* returns several values"):
        optimize(Largest("").eval().requires_grad_(False))(torch.randn(1, 4, 8, 8), 3)


def test_a_text_that_changes_in_memory_it_shares_is_noticed():
    class Told(Mixed):
        def forward(self, x, t, text):
            return self.out(self.conv(x)) + torch.tanh(text).mean()

    model = Told("").eval().requires_grad_(False)
    array = np.ones((2, 5), np.float32)
    fast, text, x = optimize(model), torch.from_numpy(array), torch.randn(2, 4, 8, 8)
    for _ in range(2):
        assert relative(fast(x, 1, text), model(x, 1, text)) < 1e-5
        array *= -1


def test_hooks_that_come_and_go_are_noticed():
    model = Mixed("").eval().requires_grad_(False)
    fast, x = optimize(model), torch.randn(2, 4, 8, 8)
    plain = fast(x, 1)
    handle = model.conv.register_forward_hook(lambda module, args, out: 2 * out)
    assert relative(fast(x, 1), model(x, 1)) < 1e-5 < relative(plain, model(x, 1))
    handle.remove()
    assert torch.equal(fast(x, 1), plain)


def test_two_engines_may_be_called_first_at_the_same_time():
    models = [Mixed("guided").eval().requires_grad_(False) for _ in range(4)]
    fast, x, found = [optimize(m) for m in models], torch.randn(2, 4, 8, 8), {}

    def call(k):
        found[k] = fast[k](x, torch.ones(2))

    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    right = models[0](x, torch.ones(2))
    assert all(relative(found[k], right) < 1e-5 for k in range(4))
