"""Generated input to the ops: what the reference says in float64, or a refusal by name."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from generated import (
    MODEL_DTYPES,
    SCHEDULE,
    anything,
    changed,
    counts,
    dtypes,
    generated,
    junk,
    refused_clearly,
    right,
    tensors,
)
from hypothesis import given

from fastdiff import backend, ops, tables
from fastdiff.ops import OPS

seeds = st.integers(-3, 2**64) | st.lists(st.integers(0, 9) | anything, max_size=4) | anything


def like(*size, dtype=dtypes):
    """Mostly as the usual argument is, of any layout; else of another shape; else no tensor."""
    return tensors(st.just(size), dtype) | tensors(st.just(size), dtype) | tensors() | junk


@generated
@given(
    changed(
        x=like(2, 3, 4),
        m=like(2, 3, 4),
        table=like(3, 15),
        row=st.integers(-2, 4).map(torch.tensor) | tensors() | anything,
        m_u=like(2, 3, 4),
        v=like(2, 3, 4),
        g=like(2, 3, 4),
        h=like(2, 3, 4),
        z=like(2, 3, 4),
        streams=tensors(st.just((2, 2)), st.just(torch.int64)) | junk,
    )
)
def test_step(changes):
    table = tables.ddim(SCHEDULE, [40, 20, 0], eta=0.5, prediction="v").tensor()
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    given = {"x": x, "m": x.flip(0), "table": table, "row": torch.tensor(1), **changes}
    out = refused_clearly(lambda: ops.step(**given), *given, "strides")
    if out is None:
        return
    optional = [given.get(name) for name in ("m_u", "v", "g", "h", "z", "streams")]
    positional = [given[name] for name in ("x", "m", "table", "row")]
    if given.get("streams") is not None and given.get("z") is None:
        assert out is not None  # the reference's noise is of float32 words
        return
    outs = out if isinstance(out, tuple) else (out,)
    assert len(outs) == 1 + (given.get("h") is not None)
    right("step", (*positional, *optional, 0), outs)


@generated
@given(
    changed(
        z=like(2, 3, 4),
        m=like(2, 3, 4),
        table=like(3, 5),
        i=st.lists(st.integers(-1, 3), max_size=3).map(lambda i: torch.tensor(i).long()) | junk,
        z_t=like(2, 3, 4),
        m_uncond=like(2, 3, 4),
        w=like(2) | anything,
    )
)
def test_teacher_step(changes):
    z = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    table = torch.linspace(-1, 1, 15).reshape(3, 5)
    given = {"z": z, "m": z.flip(0), "table": table, "i": torch.tensor([2, 0]), **changes}
    if ("w" in changes) != ("m_uncond" in changes):
        given.setdefault("w", 0.5)
        given.setdefault("m_uncond", z / 3)
    out = refused_clearly(lambda: ops.teacher_step(**given), *given, "strides")
    if out is not None:
        w = given.get("w")
        weights, number = (w, 0.0) if torch.is_tensor(w) else (None, float(w or 0))
        rest = given.get("z_t"), given.get("m_uncond"), weights, number
        inputs = (*[given[k] for k in ("z", "m", "table", "i")], *rest)
        known = [v.abs().max().item() for v in inputs if torch.is_tensor(v) and v.numel()]
        if max(abs(number), *known) < 4:  # what cancels is a product of four of them
            right("teacher_step", inputs, [out])


@generated
@given(
    changed(
        output=like(2, 3, 4),
        target=like(2, 3, 4),
        weights=like(5),
        t=st.lists(st.integers(-1, 5), max_size=3).map(lambda i: torch.tensor(i).long()) | junk,
    )
)
def test_weighted_mse(changes):
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    given = {
        "output": x, "target": x.flip(0), "weights": torch.arange(5.0), "t": torch.tensor([4, 1]),
        **changes,
    }  # fmt: skip
    out = refused_clearly(lambda: ops.weighted_mse(**given), *given, "strides")
    if out is not None:
        right("weighted_mse", tuple(given.values()), out)
        if given["output"].numel():
            leaf = given["output"].clone().requires_grad_()
            losses, _ = ops.weighted_mse(leaf, *list(given.values())[1:])
            losses.sum().backward()
            assert leaf.grad.shape == leaf.shape


@generated
@given(
    changed(
        shape=st.lists(st.integers(-1, 4), max_size=4) | anything,
        seed=seeds,
        row=counts | anything,
        first_index=counts | anything,
    )
)
def test_random_numbers(changes):
    given = {"shape": (3, 5), "seed": 7, **changes}
    bits = refused_clearly(lambda: ops.randbits(**given), *given)
    z = refused_clearly(lambda: ops.randn(**given), *given)
    assert (bits is None) == (z is None)
    if z is not None and z.dim() > 1 and z.numel():
        words = bits.long().reshape(len(bits), -1).double()
        pairs = F.pad(words, (0, words.shape[1] % 2))
        radius = (-2 * ((pairs[:, ::2] * 2**-32 + 2**-33).float().double()).log()).sqrt()
        angle = pairs[:, 1::2] * (2 * torch.pi / 2**32)
        even = (radius * angle.cos()).float()
        count = words.shape[1] // 2  # of pairs whose second is there
        torch.testing.assert_close(z.flatten(1)[:, ::2][:, :count], even[:, :count])


@generated
@given(changed(seed=seeds, batch=st.integers(-2, 9) | junk, first_index=counts | anything))
def test_streams(changes):
    given = {"seed": 3, "batch": 2, **changes}
    streams = refused_clearly(lambda: ops.streams_of(**given), *given)
    if streams is not None:
        seed, first, batch = given["seed"], given.get("first_index", 0), given["batch"]
        one = not hasattr(seed, "__len__")
        wanted = [[int(seed), first + k] for k in range(batch)] if one else [[s, 0] for s in seed]
        assert streams.tolist() == wanted


@generated
@given(
    changed(
        images=like(4, 2, 3, 5, dtype=st.sampled_from([torch.uint8] * 4 + [torch.float32])),
        index=st.lists(st.integers(-1, 4), max_size=4).map(lambda i: torch.tensor(i).long()) | junk,
        flips=like(3, dtype=st.just(torch.bool)),
        pad=st.integers(0, 3) | counts | junk,
        dtype=dtypes | junk,
        channels_last=st.booleans(),
    )
)
def test_load_images(changes):
    images = torch.arange(120, dtype=torch.uint8).reshape(4, 2, 3, 5)
    given = {"images": images, "index": torch.tensor([3, 0, 1]), **changes}
    x = refused_clearly(lambda: ops.load_images(**given), *given)
    if x is not None:
        wanted = given["images"][given["index"]].double() / 127.5 - 1
        flips = given.get("flips")
        if flips is not None:
            wanted = torch.where(flips[:, None, None, None], wanted.flip(3), wanted)
        wanted = F.pad(wanted, [given.get("pad", 0)] * 4, value=-1.0)
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(x.double(), wanted, rtol=eps, atol=eps)


@generated
@given(
    changed(
        x=like(2, 4, 3, 5, dtype=st.sampled_from(MODEL_DTYPES)),
        groups=st.integers(-1, 5) | counts | junk,
        norm_weight=like(4),
        norm_bias=like(4),
        eps=st.floats(0, 1) | anything,
        weight=like(6, 4),
        bias=like(6),
    )
)
def test_group_norm_linear(changes):
    given = {
        "x": torch.linspace(-1, 1, 120).reshape(2, 4, 3, 5), "groups": 2, "norm_weight": None,
        "norm_bias": None, "eps": 1e-5, "weight": torch.linspace(-1, 1, 24).reshape(6, 4),
        "bias": None, **changes,
    }  # fmt: skip
    out = refused_clearly(lambda: ops.group_norm_linear(**given), *given)
    if out is not None and given["eps"] >= 1e-6:
        inputs = tuple(given.values())
        right("group_norm_linear", inputs, [out], twice_plain=True)
    norm = {"x": given["x"], "groups": given["groups"], "eps": given["eps"]}
    norm |= {"weight": given["norm_weight"], "bias": given["norm_bias"]}
    out = refused_clearly(lambda: ops.group_norm_silu(**norm), *norm)
    if out is not None and norm["eps"] >= 1e-6:
        rest = norm["groups"], norm["weight"], norm["bias"], norm["eps"], None, None, True
        inputs = norm["x"], *rest
        right("group_norm_silu", inputs, [out], twice_plain=True)


packed = st.sampled_from([(32, 16, 3, 3), (16, 32, 3, 3), (31, 16, 3, 3), (32, 16, 1, 1)])
kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64])


@generated
@given(
    changed(
        weight=tensors(packed, dtypes) | tensors() | junk,
        tile=st.sampled_from([2, 4, 3]) | junk,
        dtype=kinds | junk,
        transposed=st.booleans(),
        x=like(2, 16, 4, 5, dtype=kinds),
        bias=like(32) | like(2, 32),
        residual=like(2, 32, 4, 5),
        upsample=st.booleans(),
    )
)
def test_conv3x3(changes):
    made = {"weight": torch.linspace(-1, 1, 32 * 16 * 9).reshape(32, 16, 3, 3), "tile": 2}
    called = {"x": torch.linspace(-1, 1, 640).reshape(2, 16, 4, 5)}
    for name, value in changes.items():
        (made if name in ("weight", "tile", "dtype", "transposed") else called)[name] = value
    if torch.is_tensor(called["x"]) and called["x"].dim() == 4:
        called["x"] = called["x"].contiguous(memory_format=torch.channels_last)
    weight = refused_clearly(lambda: ops.pack_conv3x3(**made), *made)
    if weight is None:
        return
    out = refused_clearly(lambda: ops.conv3x3(weight=weight, **called), *called, "weight")
    if out is None or made.get("transposed") or not called["x"].numel():
        return
    x, full = called["x"].double(), made["weight"].double()
    x = F.interpolate(x, scale_factor=2.0) if called.get("upsample") else x
    wanted = F.conv2d(x, full, padding=1)
    if (bias := called.get("bias")) is not None:
        wanted = wanted + bias.double().reshape(-1, 32, 1, 1)
    if (residual := called.get("residual")) is not None:
        wanted = wanted + residual.double()
    if wanted.isfinite().all() and wanted.abs().max() < 1e4:
        rough = (0.3 if made["tile"] == 4 else 0.06) if out.dtype == torch.bfloat16 else 1e-4
        scale = 1 + x.abs().max().item() * full.abs().sum((1, 2, 3)).max().item()
        torch.testing.assert_close(out.double(), wanted, rtol=rough, atol=rough * scale)


@generated
@given(
    changed(
        weight=like(32, 16),
        dtype=kinds | junk,
        x=like(3, 16, dtype=kinds) | like(2, 3, 16, dtype=kinds),
        bias=like(32),
        residual=like(3, 32),
    )
)
def test_linear(changes):
    made = {"weight": torch.linspace(-1, 1, 32 * 16).reshape(32, 16)}
    called = {"x": torch.linspace(-1, 1, 48).reshape(3, 16)}
    for name, value in changes.items():
        (made if name in ("weight", "dtype") else called)[name] = value
    weight = refused_clearly(lambda: ops.pack_linear(**made), *made)
    if weight is None:
        return
    out = refused_clearly(lambda: ops.linear(weight=weight, **called), *called, "weight")
    if out is not None and called["x"].numel():
        rest = called.get("bias"), called.get("residual")
        right("linear", (called["x"], weight.double(), *rest), [out])


@pytest.mark.parametrize("name", ["attention", "noising", "cfg", "step", "linear", "conv3x3"])
def test_records_have_the_cases_that_the_tests_are_of(name):
    assert OPS[name].name == name and OPS[name].cases()


@generated
@given(anything)
def test_what_runs_here_is_asked_by_name(value):
    for available in (ops.conv3x3_available, ops.linear_available):
        assert refused_clearly(lambda f=available: f(value), "dtype") in (None, False)

    def chosen():
        with backend(value):
            return 1

    assert refused_clearly(chosen, "backend") is None
