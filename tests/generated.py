"""Generated input: how it is drawn, and what a refusal must say.

`make nightly` tries 10,000 examples a call; otherwise a few hundred.
"""

import math
import os
import re

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, settings

from fastdiff import NoiseSchedule
from fastdiff.ops import OPS

settings.register_profile("usual", max_examples=200)
settings.register_profile("nightly", max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))
generated = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
slowly = settings(generated, max_examples=generated.max_examples // 4)  # networks, commands

REFUSED = ValueError, TypeError
SCHEDULE = NoiseSchedule.cosine(50)
MODEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
dtypes = st.sampled_from([*MODEL_DTYPES * 4, *OTHERS])
shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
numbers = st.floats(width=32) | st.integers(-(2**70), 2**70) | st.sampled_from([0.0, 1.0, -1.0])
counts = st.integers(-3, 70) | st.sampled_from([2**40, 2**63, -(2**63), 2**70])
names = st.sampled_from(["eps", "x0", "v", "score", "edm", "", "V"])
junk = st.sampled_from(
    [
        *(None, "odd", "", (), [1.0, 2.0], {}, {"a": 1}, True, 1j, b"odd", object(), len, list),
        *(np.ones(2), np.float32(0.5), np.int64(1), torch.ones(2), torch.tensor(0.5)),
    ]
)
anything = numbers | junk


@st.composite
def tensors(draw, shape=shapes, dtype=dtypes):
    """Of any layout: as it comes, transposed, every other element, expanded, off by one."""
    size, kind = draw(shape), draw(dtype)
    seed = draw(st.integers(0, 99))
    x = torch.randn([2 * n for n in size], generator=torch.Generator().manual_seed(seed))
    special = draw(st.sampled_from([None, None, None, math.nan, math.inf, -math.inf, 1e30]))
    x = x[tuple(slice(None, None, 2) for _ in size)]
    layout = draw(st.sampled_from(["dense", "strided", "transposed", "expanded", "shifted"]))
    if layout == "dense":
        x = x.contiguous()
    elif layout == "transposed" and len(size) > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded" and size and size[0]:
        x = x[:1].expand(size)
    elif layout == "shifted":
        x = torch.cat((torch.zeros(1), x.flatten()))[1:].reshape(size)
    x = x.clone() if layout == "expanded" and special is not None else x
    if special is not None and x.numel():
        x = x.contiguous()
        x.view(-1)[seed % x.numel()] = special
    return x.to(kind)


@st.composite
def alike(draw, count):
    """Tensors of one shape and dtype, mostly; and what is no tensor, now and then."""
    shape, dtype = draw(shapes), draw(dtypes)
    found = []
    for _ in range(count):
        odd = draw(st.integers(0, 19))
        if odd == 0:
            found.append(draw(st.sampled_from([None, 3, "x", [1.0], np.ones(3)])))
        elif odd == 1:
            found.append(draw(tensors()))
        else:
            found.append(draw(tensors(st.just(shape), st.just(dtype))))
    return found


@st.composite
def changed(draw, **odd):
    """One or two arguments in place of the usual ones, {name: value}."""
    chosen = draw(st.lists(st.sampled_from(sorted(odd)), min_size=1, max_size=2, unique=True))
    return {name: draw(odd[name]) for name in chosen}


def right(op, inputs, outputs, twice_plain=False):
    """Held to the reference in float64, within what the outputs' dtype can say.

    `twice_plain`: or within twice the error of plain PyTorch in that dtype, if that is more.
    """
    wide = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]
    truths, plains = (OPS[op].reference(*given)[: len(outputs)] for given in (wide, inputs))
    for out, truth, plain in zip(outputs, truths, plains, strict=True):
        assert out.shape == truth.shape
        wanted = truth.to(out.dtype) if out.dtype in MODEL_DTYPES else truth
        eps = torch.finfo(out.dtype).eps
        largest = max((x.abs().max().item() for x in wide if torch.is_tensor(x) and x.numel()
                       and x.is_floating_point()), default=0.0)  # fmt: skip
        if math.isfinite(largest) and largest < 1e4:
            off = (plain.double() - truth.double()).abs().max().item() if out.numel() else 0.0
            torch.testing.assert_close(
                out.double(),
                wanted.double(),
                rtol=8 * eps,
                atol=max(8 * eps * (1 + largest) ** 2, 2 * off if twice_plain else 0.0),
                equal_nan=True,
            )


def refused_clearly(call, *arguments):
    """The result; None where the call raises, and then it says of which of the arguments."""
    try:
        return call()
    except REFUSED as error:
        said = str(error)
        if arguments:
            assert any(re.search(rf"\b{name}\b", said) for name in arguments), said
        else:
            assert ":" in said or "=" in said or "argument" in said, said
        return None
