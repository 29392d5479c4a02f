"""Generated input: what the core calls make of it is right, or a clear error before any work.

`make nightly` tries 10,000 examples a call; otherwise a few hundred.
"""

import copy
import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from generated import (
    REFUSED,
    SCHEDULE,
    alike,
    dtypes,
    generated,
    names,
    numbers,
    refused_clearly,
    right,
    tensors,
)
from hypothesis import given

from fastdiff import DDIMSampler, DDPMSampler, NoiseSchedule, Table, ops, tables


@generated
@given(alike(2), numbers | tensors())
def test_cfg(pair, w):
    try:
        out = ops.cfg(*pair, w)
    except REFUSED as error:
        assert any(name in str(error) for name in ("m_cond", "m_uncond", "w"))
        return
    weights, number = (w.contiguous(), 0.0) if torch.is_tensor(w) else (None, float(w))
    if weights is not None or abs(number) < 1e3:
        right("cfg", (*pair, weights, number), [out])


@generated
@given(alike(2), tensors(), st.integers(-2, 60), names, st.integers(-3, 2**64), st.booleans())
def test_noising(pair, odd, t, prediction, seed, given_noise):
    x0, noise = pair
    batch = len(x0) if torch.is_tensor(x0) and x0.dim() else 1
    steps = torch.full((batch,), t) if t < 55 else odd
    how = {"noise": noise} if given_noise else {"seed": seed}
    out = refused_clearly(lambda: ops.noising(x0, steps, SCHEDULE, prediction, **how))
    if out is None:
        return
    assert all(x.shape == x0.shape and x.dtype == x0.dtype for x in out)
    if given_noise and noise is not None and prediction in ("eps", "v"):
        table = torch.tensor(SCHEDULE.noising_table(prediction))
        right("noising", (x0, steps, table, noise, None, 0), out)


@generated
@given(
    tensors(), st.integers(-3, 8), st.floats(width=32), tensors() | st.none(), tensors() | st.none()
)
def test_group_norm_silu(x, groups, eps, weight, scale):
    out = refused_clearly(lambda: ops.group_norm_silu(x, groups, weight, None, eps, scale))
    if out is not None:
        assert out.shape == x.shape and out.dtype == x.dtype
        given = x.clone().requires_grad_()
        ops.group_norm_silu(given, groups, weight, None, eps, scale).sum().backward()
        assert given.grad.shape == x.shape


@generated
@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=5),
    st.integers(0, 9),
    dtypes,
    st.none() | st.floats(width=32),
    tensors(),
)
def test_attention(shape, keys, dtype, scale, odd):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(shape, generator=generator).to(dtype)
    k = torch.randn([*shape[:-2], keys, shape[-1]], generator=generator).to(dtype)
    v = odd if keys == 9 else torch.randn(k.shape, generator=generator).to(dtype)
    out = refused_clearly(lambda: ops.attention(q, k, v, scale))
    if out is not None:
        assert out.shape == q.shape and out.dtype == q.dtype
        if scale is None or scale < 10:
            used = shape[-1] ** -0.5 if scale is None else scale
            right("attention", (q, k, v, used, False), [out])


sizes = st.lists(st.integers(-2, 6) | st.sampled_from([2**40, 2**63, -(2**63)]), max_size=4)


@generated
@given(sizes, st.integers(-(2**65), 2**65), st.integers(-3, 2**33), st.integers(-3, 2**64))
def test_randn(shape, seed, row, first_index):
    try:
        out = ops.randn(shape, seed, row=row, first_index=first_index)
    except REFUSED as error:
        assert any(name in str(error) for name in ("shape", "seed", "row", "first_index"))
    except (RuntimeError, MemoryError, OverflowError) as error:  # torch cannot make such a tensor
        assert max(shape) >= 2**40, error
    else:
        assert list(out.shape) == list(shape) and out.isfinite().all()
        assert torch.equal(out, ops.randn(shape, seed, row=row, first_index=first_index))


@generated
@given(
    st.none() | st.integers(-3, 70),
    st.sampled_from(["leading", "trailing", "linspace", "quadratic", "ddim5", "ddim7", "3,4", ""])
    | st.lists(st.integers(-3, 60), max_size=6),
    st.integers(-5, 60),
)
def test_timesteps(steps, spacing, offset):
    found = refused_clearly(lambda: SCHEDULE.timesteps(steps, spacing, offset))
    if found is not None:
        assert len(found) and (np.diff(found) < 0).all() and 0 <= found[-1] <= found[0] < 50
        if steps is not None and isinstance(spacing, str):
            assert len(found) == steps
        table = tables.ddim(SCHEDULE, found)
        assert np.isfinite(table.numpy()[:, [3, 4, 7, 8]]).all()


@generated
@given(st.lists(st.floats() | st.integers(-2, 2), max_size=6))
def test_schedules_of_numbers(values):
    for make in (NoiseSchedule.from_betas, NoiseSchedule.from_alphas_cumprod):
        schedule = refused_clearly(lambda make=make: make(values))
        if schedule is not None:
            assert np.allclose(schedule.alpha**2 + schedule.sigma**2, 1) and len(values)
            assert NoiseSchedule.from_json(schedule.to_json()) == schedule


ROWS = tables.ddim(SCHEDULE, [40, 20, 0], eta=0.5, prediction="v").to_json()
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["columns", "name"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@generated
@given(st.sampled_from([*ROWS["columns"], "name", "init", "columns", "other"]), json_values)
def test_tables_of_wrong_json(where, value):
    record = copy.deepcopy(ROWS)
    (record["columns"] if where in ROWS["columns"] else record)[where] = value
    table = refused_clearly(lambda: Table.from_json(record))
    if table is not None:
        assert len(table) and Table.from_json(json.loads(json.dumps(table.to_json()))) == table


@generated
@given(json_values)
def test_anything_that_is_json(value):
    for read in (Table.from_json, NoiseSchedule.from_json):
        refused_clearly(lambda read=read: read(value))


@generated
@given(
    st.sampled_from([DDIMSampler, DDPMSampler]), st.integers(-2, 60), names, numbers | st.none(),
    sizes, st.integers(-3, 9), numbers | st.none(), alike(1),
)  # fmt: skip
def test_samplers(kind, steps, prediction, clip, shape, seed, guidance, start):
    def model(x, t, cond=None):
        return 0.1 * x

    def call():
        sampler = kind(SCHEDULE, steps, prediction=prediction, clip=clip)
        if shape and max(shape) > 6:
            raise ValueError("shape: the test draws none so large")
        cond = torch.zeros(max(0, shape[0]) if shape else 0) if guidance is not None else None
        how = {"uncond": cond, "x_T": start[0] if seed == 3 else None}
        if kind is DDIMSampler and steps > 40:
            with pytest.raises((*REFUSED, IndexError)):
                sampler.step(torch.zeros(1, 1), steps, torch.zeros(1, 1))
        return sampler.sample(model, shape, seed=seed, cond=cond, guidance=guidance, **how)

    out = refused_clearly(call)
    if out is not None:
        assert list(out.shape) == list(shape) and out.dtype == torch.float32
