"""Generated input to networks, their records and their files: right, or a refusal by name."""

import contextlib
import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from generated import (
    SCHEDULE,
    anything,
    changed,
    counts,
    generated,
    junk,
    names,
    refused_clearly,
    slowly,
    tensors,
)
from hypothesis import given

from fastdiff import (
    DistillConfig,
    TrainConfig,
    Trainer,
    UNet,
    UNetConfig,
    distill,
    load,
    optimize,
    patch,
    save,
    unpatch,
)
from fastdiff.data import ImageSet
from fastdiff.guidance import load_classifier
from fastdiff.models.clip import CLIP, contrastive_loss
from fastdiff.models.encoder import EncoderUNet
from fastdiff.train import draw_curves, posthoc

RECORDS = UNetConfig, TrainConfig, DistillConfig
small = st.integers(-2, 9) | st.sampled_from([16, 32, 64, 2**40]) | st.floats(0, 2) | anything
values = small | st.lists(small, max_size=3).map(tuple) | names


def says(value):
    """NaN is not equal to itself; a record of it says nothing."""
    parts = value if isinstance(value, tuple) else (value,)
    return not any(isinstance(part, float) and math.isnan(part) for part in parts)


@pytest.mark.parametrize("record", RECORDS)
def test_records(record):
    fields = [field.name for field in dataclasses.fields(record)]

    @generated
    @given(st.lists(st.tuples(st.sampled_from(fields), values), min_size=1, max_size=3).map(dict))
    def tried(changes):
        # what does not fit together may be named by the other of the two
        made = refused_clearly(lambda: record(**changes), *fields)
        if made is not None:
            assert record.from_json(made.to_json()) == made
            assert all(says(value) for value in dataclasses.astuple(made))
        refused_clearly(lambda: record.from_json(changes), *fields)

    tried()

    @slowly
    @given(anything | st.dictionaries(st.sampled_from([*fields, "odd", 3]), values, max_size=3))
    def read(value):
        refused_clearly(lambda: record.from_json(value), *fields, record.__name__)

    read()


SIZES = {
    "image_size": 4, "in_channels": 1, "channels": 4, "channel_mult": (1,), "num_res_blocks": 1,
    "attention_resolutions": (), "norm_groups": 2,
}  # fmt: skip
torch.manual_seed(0)
CLASSES = UNet(UNetConfig(**SIZES, num_classes=3, guidance_max=4.0)).eval()
ENCODER = EncoderUNet(UNetConfig(**SIZES), 3).eval()
WORDS = CLIP(UNetConfig(**SIZES, vocabulary=8, text_length=3, text_layers=1), 4).eval()
for network in (CLASSES, ENCODER, WORDS):
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
INT = st.sampled_from([torch.int64] * 4 + [torch.float32, torch.bool, torch.complex64])
FLOAT = st.sampled_from([torch.float32] * 6 + [torch.float16, torch.float64, torch.int64])
times = tensors(st.just((2,)), INT) | tensors() | junk
called = {
    "x": tensors(st.just((2, 1, 4, 4)), FLOAT)
    | tensors(st.tuples(*[st.integers(0, 5)] * 4), FLOAT)
    | tensors()
    | junk,
    "t": times,
    "cond": st.lists(st.integers(-3, 4), max_size=3).map(lambda v: torch.tensor(v).long()) | times,
    "w": tensors(st.just((2,)), FLOAT) | times,
    "tokens": st.lists(st.integers(-1, 8), min_size=6, max_size=6).map(
        lambda v: torch.tensor(v).reshape(2, 3)
    )
    | times,
}
USUAL = {
    "x": torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4),
    "t": torch.tensor([3, 40]),
    "cond": torch.tensor([0, 2]),
    "w": torch.tensor([0.5, 3.0]),
    "tokens": torch.tensor([[1, 2, 0], [1, 5, 2]]),
}


@pytest.mark.parametrize(
    "network, takes",
    [(CLASSES, ("x", "t", "cond", "w")), (ENCODER, ("x", "t")), (WORDS, ("x", "t", "tokens"))],
)
def test_networks_see_each_sample_by_itself(network, takes):
    @slowly
    @given(changed(**{name: called[name] for name in takes}))
    def tried(changes):
        given = {**{name: USUAL[name] for name in takes}, **changes}
        with torch.no_grad():
            out = refused_clearly(lambda: network(*given.values()), *given)
            if out is None or network is WORDS:
                assert out is None or out.shape[0] == len(given["x"])
                return
            assert len(out) == len(given["x"]) and out.dtype == torch.float32
            for k in range(len(out)):
                alone = network(*(None if v is None else v[k : k + 1] for v in given.values()))
                if out.isfinite().all():
                    rough = 1e-3 * (1 + out.abs().max().item())
                    torch.testing.assert_close(out[k], alone[0], rtol=1e-3, atol=rough)

    tried()


@slowly
@given(changed(scores=tensors(st.just((2, 2)), FLOAT) | tensors() | junk, tokens=called["tokens"]))
def test_the_contrastive_loss(changes):
    given = {"scores": torch.eye(2), "tokens": USUAL["tokens"], **changes}
    loss = refused_clearly(lambda: contrastive_loss(**given), *given)
    assert loss is None or loss.shape == ()


@slowly
@given(
    changed(config=junk, outputs=counts | anything, pool=st.sampled_from(["adaptive"]) | junk),
    anything,
)
def test_what_networks_are_made_of(changes, w):
    given = {"config": UNetConfig(**SIZES), "outputs": 3, **changes}
    made = refused_clearly(lambda: EncoderUNet(**given), *given)
    assert made is None or made.outputs == given["outputs"]
    assert refused_clearly(lambda: UNet(changes.get("config")), "config") is None
    settled = refused_clearly(lambda: CLASSES.at_guidance(w), "w")
    if settled is not None:
        with torch.no_grad():
            x, t, cond = (USUAL[name] for name in ("x", "t", "cond"))
            wanted = CLASSES(x, t, cond, torch.full((2,), float(w)))
            torch.testing.assert_close(settled(x, t, cond), wanted)


IMAGES = ImageSet(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
PLAIN = UNet(UNetConfig(**SIZES, num_classes=3))
LARGER = ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), IMAGES.labels)
QUICK = {"steps": 1, "batch_size": 2}


@slowly
@given(
    changed(
        model=junk,
        schedule=junk,
        data=junk | st.just(ImageSet(IMAGES.images)),
        config=junk,
        out=junk,
        loss=junk,
        distilled=junk,
    )
)
def test_trainers(tmp_path_factory, changes):
    out = tmp_path_factory.getbasetemp() / "run"
    given = {
        "model": PLAIN, "schedule": SCHEDULE, "data": IMAGES, "config": TrainConfig(**QUICK),
        "out": out, **changes,
    }  # fmt: skip
    trainer = refused_clearly(lambda: Trainer(**given), *given, "labels")
    assert trainer is None or trainer.step == 0


@slowly
@given(
    changed(
        teacher=junk,
        schedule=junk,
        start_steps=counts | anything,
        end_steps=counts | anything,
        data=junk,
        out=junk.filter(lambda value: not isinstance(value, str)),
        train=junk,
        prediction=names.filter(lambda name: name != "v") | junk,
        guidance=anything,
        engine=junk,
    )
)
def test_distillation_is_refused_before_it_starts(tmp_path_factory, changes):
    """Nothing is trained: the images are of another size."""
    given = {
        "teacher": PLAIN, "schedule": SCHEDULE, "start_steps": 4, "end_steps": 2, "data": LARGER,
        "out": tmp_path_factory.getbasetemp() / "students", "prediction": "v", **changes,
    }  # fmt: skip
    said = *given, "images", "labels", "pixels", "model"
    assert refused_clearly(lambda: distill(**given), *said) is None


@slowly
@given(changed(model=junk, dtype=junk, memory=junk), st.lists(junk, min_size=1, max_size=3))
def test_what_is_made_faster(changes, objects):
    given = {"model": CLASSES, **changes}
    made = refused_clearly(lambda: optimize(**given), *given)
    assert made is None or isinstance(made, torch.nn.Module)
    for call in (patch, unpatch):
        assert refused_clearly(lambda call=call: call(*objects), "objects", "scheduler") is None


@slowly
@given(
    changed(
        folder=junk,
        model=junk,
        schedule=junk,
        prediction=names | junk,
        class_names=junk | st.just(("a", "b", "c")),
        training=st.dictionaries(st.text(max_size=3), anything, max_size=2) | junk,
        dtype=st.sampled_from(["float16", "float32", "float64"]) | junk,
        distilled=junk,
    )
)
def test_saving(tmp_path_factory, monkeypatch_module, changes):
    folder = tmp_path_factory.mktemp("saved")
    monkeypatch_module.chdir(folder)  # of names like "odd"
    given = {
        "folder": folder, "model": CLASSES, "schedule": SCHEDULE, "prediction": "v", **changes,
    }  # fmt: skip
    path = refused_clearly(lambda: save(**given), *given)
    if path is None:
        assert not list(folder.rglob("*.safetensors"))
        return
    found = load(given["folder"])
    assert found.schedule == SCHEDULE and found.prediction == given["prediction"]
    assert found.class_names == tuple(given.get("class_names", ()))
    for name, value in CLASSES.state_dict().items():
        dtype = getattr(torch, given.get("dtype", "float32"))
        assert torch.equal(found.state_dict()[name], value.to(dtype).float())


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patched:
        yield patched


@slowly
@given(st.text(max_size=8) | anything)
def test_names_of_models(name):
    for call, argument in (
        (load, "source"),
        (load_classifier, "source"),
        (draw_curves, "folder"),
        (lambda folder: posthoc(folder, 0.1), "folder"),
    ):
        try:
            assert refused_clearly(lambda call=call: call(name), argument, "null") is None
        except OSError as error:
            assert isinstance(name, str) and (name in str(error) or repr(name)[1:-1] in str(error))
    with contextlib.suppress(FileNotFoundError):  # of a name that is a right sigma_rel
        assert refused_clearly(lambda: posthoc("/nowhere", name), "sigma_rel") is None
