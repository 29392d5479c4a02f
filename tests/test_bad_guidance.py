"""Generated input to guidance: right, or a refusal that names the argument."""

import math

import hypothesis.strategies as st
import pytest
import torch
from generated import SCHEDULE, anything, changed, generated, junk, names, refused_clearly, tensors
from hypothesis import given

from fastdiff import UNetConfig
from fastdiff.guidance import (
    APG,
    ClassifierGuidance,
    CLIPGuidance,
    DynamicThreshold,
    GuidanceRescale,
    Guided,
)
from fastdiff.models.clip import CLIP

objects = junk.filter(lambda value: not callable(value))
fractions = st.floats(0, 1) | anything
MADE = {
    Guided: {"w": anything},
    GuidanceRescale: {"w": anything, "phi": fractions},
    APG: {
        "w": anything,
        "eta": fractions,
        "radius": st.floats(0, 99) | anything,
        "momentum": fractions,
        "schedule": junk,
        "prediction": names | junk,
    },
    DynamicThreshold: {"percentile": fractions, "schedule": junk, "prediction": names | junk},
}
X = torch.linspace(-2, 2, 24).reshape(2, 3, 4)
C = torch.tensor([0.5, -1.0])
CALLED = {
    "x": tensors(st.just((2, 3, 4)), st.just(torch.float32)) | tensors() | junk,
    "t": tensors(st.just((2,))) | tensors() | st.sampled_from([torch.tensor([3, 50])]) | junk,
    "cond": tensors(st.just((2,)), st.just(torch.float32)) | tensors() | junk,
}


def conditional(x, t, cond=None):
    if cond is None:
        return x / 2
    told = cond.reshape(len(x), cond.shape[1:].numel()).real.float().sum(1)
    return x / 2 + told.reshape(-1, *[1] * (x.dim() - 1))


def moved(kind, options, x, t, cond):
    """The papers' formulas for one sample, in float64."""
    m, m_u = x / 2 + cond, x / 2
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    w = float(options.get("w", 2.0))
    if kind is Guided:
        return m + w * (m - m_u)
    if kind is GuidanceRescale:
        guided = m + w * (m - m_u)
        phi = float(options.get("phi", 0.7))
        return phi * guided * m.std() / guided.std() + (1 - phi) * guided
    data = alpha * x - sigma * m  # of v
    if kind is DynamicThreshold:
        s = max(1.0, data.abs().quantile(float(options.get("percentile", 0.995))).item())
        return (alpha * x - data.clamp(-s, s) / s) / sigma
    update = data - (alpha * x - sigma * m_u)
    if norm := update.norm().item():
        update = update * min(1.0, float(options.get("radius", math.inf)) / norm)
    along = (update * data).sum() / data.square().sum() * data
    update = update - (1 - float(options.get("eta", 0.0))) * along
    return (alpha * x - (data + w * update)) / sigma


@pytest.mark.parametrize("kind", MADE)
def test_guided_models(kind):
    at_the_call = {k: v for k, v in CALLED.items() if kind is not DynamicThreshold or k != "cond"}

    @generated
    @given(changed(model=objects, **MADE[kind], **at_the_call))
    def tried(changes):
        made = {"model": conditional, "schedule": SCHEDULE, "prediction": "v", "w": 2.0}
        made |= {"null_cond": torch.zeros_like}
        if kind in (Guided, GuidanceRescale):
            made = {k: made[k] for k in ("model", "w", "null_cond")}
        if kind is DynamicThreshold:
            made = {k: made[k] for k in ("model", "schedule", "prediction")}
            made["model"] = lambda x, t: x / 2
        made |= {k: v for k, v in changes.items() if k not in CALLED}
        called = {"x": X, "t": torch.tensor([10, 40]), "cond": C}
        called |= {k: v for k, v in changes.items() if k in CALLED}
        if kind is DynamicThreshold:
            called.pop("cond")
        model = refused_clearly(lambda: kind(**made), *made)
        if model is None:
            return
        out = refused_clearly(lambda: model(*called.values()), *called, "output", "uncond")
        if out is None:
            return
        assert out.shape == called["x"].shape and out.dtype == torch.float32
        x, t = called["x"].double(), called["t"]
        cond = called.get("cond", torch.zeros(2))
        sizes = (v.to(torch.complex128).abs() for v in (x, cond))  # of any dtype
        ordinary = all(size.isfinite().all() and not size.gt(50).any() for size in sizes)
        ordinary &= abs(float(made.get("w", 0))) < 50
        plain = made.get("prediction", "v") == "v" and not t.is_floating_point()
        plain = plain and not (t.numel() and (t.min() < 0 or t.max() >= len(SCHEDULE)))
        if x.shape == (2, 3, 4) and cond.dim() == 1 and ordinary and plain:
            for k in range(2):
                wanted = moved(kind, made, x[k], int(t[k]), float(cond[k].real))
                if wanted.isfinite().all():
                    torch.testing.assert_close(out[k].double(), wanted, rtol=1e-3, atol=1e-3)

    tried()


labels = (
    st.lists(st.integers(-3, 4), max_size=3).map(lambda v: torch.tensor(v, dtype=torch.int64))
    | tensors(st.just((2,)))
    | junk
)


@generated
@given(changed(classifier=objects, labels=labels, x=CALLED["x"], t=CALLED["t"], cond=labels))
def test_classifier_guidance(changes):
    made = {"classifier": lambda x, t: torch.stack((x.sum((1, 2)), 0 * x[:, 0, 0]), 1)}
    made |= {k: v for k, v in changes.items() if k in ("classifier", "labels")}
    called = {"x": X, "t": torch.tensor([1, 2]), "cond": torch.tensor([0, 1])}
    called |= {k: v for k, v in changes.items() if k not in made}
    guide = refused_clearly(lambda: ClassifierGuidance(**made), *made)
    if guide is None:
        return
    if torch.is_tensor(called["x"]) and called["x"].dim() != 3:
        return  # the classifier here takes three dimensions
    g = refused_clearly(lambda: guide(*called.values()), *called, "labels", "output")
    if g is not None and called["x"].numel():
        y = called["cond"] if made.get("labels") is None else made["labels"]
        s = called["x"].sum((1, 2)).double()
        p = torch.sigmoid(s)
        wanted = torch.where(y == 0, 1 - p, -p)[:, None, None].expand_as(g)
        assert g.dtype == called["x"].dtype
        if s.isfinite().all() and g.dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(g.double(), wanted, rtol=1e-4, atol=1e-5)


@generated
@given(
    changed(
        clip=junk,
        tokens=st.lists(st.integers(-1, 9), min_size=6, max_size=6).map(
            lambda v: torch.tensor([[1, *v[:3], 2, 0], [1, *v[3:], 2, 0]])
        )
        | tensors()
        | junk,
        x=tensors(st.just((2, 1, 4, 4)), st.just(torch.float32)) | tensors() | junk,
        t=CALLED["t"],
    )
)
def test_clip_guidance(changes):
    torch.manual_seed(0)
    made = {"clip": SMALL, "tokens": torch.tensor([[1, 3, 2, 0, 0, 0], [1, 4, 5, 2, 0, 0]])}
    called = {"x": torch.zeros(2, 1, 4, 4), "t": torch.tensor([1, 2])}
    for name, value in changes.items():
        (made if name in made else called)[name] = value
    guide = refused_clearly(lambda: CLIPGuidance(**made), *made)
    if guide is None:
        return
    g = refused_clearly(lambda: guide(*called.values()), *called, "tokens")
    assert g is None or (g.shape == called["x"].shape and g.dtype == torch.float32)


SMALL = CLIP(
    UNetConfig(
        image_size=4, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), norm_groups=2, vocabulary=8, text_length=6, text_layers=1,
    ), 4,
).eval()  # fmt: skip
