"""Checkpoints: what is saved comes back, and nothing damaged loads."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdiff import DDIMSampler, DistillConfig, checkpoint, files
from fastdiff.checkpoint import load, save
from fastdiff.data import fashion_mnist
from fastdiff.evaluate import describe, load_classifier
from fastdiff.losses import DiffusionLoss
from fastdiff.models import UNet, UNetConfig
from fastdiff.models.distilled import Distilled
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIG = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_classes=3,
    norm_groups=4,
)
SCHEDULE = NoiseSchedule.cosine(100)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = UNet(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def folder(tmp_path, model):
    save(tmp_path / "run", model, SCHEDULE, "v", ("a", "b", "c"), {"step": 7})
    return tmp_path / "run"


def test_comes_back_whole(folder, model):
    back = load(folder)
    assert not back.training and back.config == CONFIG
    assert back.schedule == SCHEDULE and back.prediction == "v"
    assert back.class_names == ("a", "b", "c")
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0, 99]), torch.tensor([2, -1])
    with torch.inference_mode():
        assert torch.equal(back(x, t, cond), model.eval()(x, t, cond))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["training"] == {"step": 7}


def test_a_file_carries_its_own_configuration(tmp_path, model):
    path = save(tmp_path / "deep" / "a.safetensors", model, SCHEDULE, "eps")
    save(tmp_path / "deep" / "b.safetensors", model, SCHEDULE, "v")
    assert path == tmp_path / "deep" / "a.safetensors"
    assert load(path).prediction == "eps"
    assert load(str(tmp_path / "deep" / "b.safetensors")).prediction == "v"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_storage_loads_as_fp32(tmp_path, model, dtype):
    path = save(tmp_path, model, SCHEDULE, "v", dtype=dtype)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("out.2.weight").dtype == getattr(torch, dtype)
    back = load(tmp_path)
    for name, value in model.state_dict().items():
        assert back.state_dict()[name].dtype == torch.float32
        assert torch.equal(back.state_dict()[name], value.to(getattr(torch, dtype)).float())


def test_layout_in_memory_does_not_matter(tmp_path, model):
    save(tmp_path, model.to(memory_format=torch.channels_last), SCHEDULE, "v")
    for name, value in load(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_overwriting_is_whole_or_not_at_all(folder, model, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(folder, UNet(CONFIG), SCHEDULE, "v")
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(list(folder.iterdir())) == 2  # no temporary file stays


def test_shipped_names_are_found(tmp_path, model, monkeypatch):
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)
    monkeypatch.chdir("/")
    save(tmp_path / "shoes", model, SCHEDULE, "v")
    assert load("shoes").schedule == SCHEDULE
    with pytest.raises(FileNotFoundError, match=r"hats: no such checkpoint.*shipped name: shoes"):
        load("hats")


def without_stamp(path):
    """As another program, or an early version of this one, would write it."""
    save_file(load_file(path), path)


def test_a_crash_between_weights_and_configuration_loses_neither(folder, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    old = load(folder)
    other = UNet(dataclasses.replace(CONFIG, channels=16))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_tensors", crash)
        save(folder, other, SCHEDULE, "x0")
    assert load(folder).config == old.config and load(folder).prediction == "v"
    for there in (folder, folder / "new"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "write_bytes", crash)
            save(there, other, SCHEDULE, "x0")
        wrong = "of other weights than" if there == folder else "missing"
        message = f"{there / 'config.json'}: {wrong}"
        with pytest.warns(UserWarning, match=re.escape(message)):
            back = load(there)
        assert back.config == other.config and back.prediction == "x0"
        for name, value in other.state_dict().items():
            assert torch.equal(back.state_dict()[name], value)


def test_a_configuration_of_other_weights_is_refused(folder):
    without_stamp(folder / "model.safetensors")
    config = folder / "config.json"
    with pytest.raises(ValueError, match=re.escape(f"{config}: of other weights than model.safe")):
        load(folder)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"weights": None}))
    assert load(folder).config == CONFIG  # as those of early versions


@pytest.mark.parametrize("part", [b"fastdiff", b"crc32", b"bytes"])
def test_a_damaged_stamp_is_not_taken_for_none(folder, part):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(part, part[:-1] + b"_", 1))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"safetensors: its checksum's place is damaged"):
            load(folder)
        (folder / "config.json").unlink(missing_ok=True)


def test_an_edited_configuration_is_the_one_that_counts(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"class_names": ["A", "B", "C"]}))
    assert load(folder).class_names == ("A", "B", "C")


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_missing_parts_are_named(folder, part):
    without_stamp(folder / "model.safetensors")
    (folder / part).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / part}: missing")):
        load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: raw[:100],
        lambda raw: b"",
        lambda raw: b"\x80\x04" + raw[2:],  # a pickle's first bytes
        lambda raw: raw + b"x",
    ],
)
def test_damaged_weights_are_named(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + "(truncated|damaged)"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("out.2.bias"), "1 tensors missing: out.2.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 tensors unexpected: extra"),
        (
            lambda t: t.update({"out.2.bias": torch.zeros(2)}),
            "1 tensors of another shape: out.2.bias (2,) (must be (1,))",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"weights": None}))
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: does not fit its configuration; {message}")
    ):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("schedule"), "lacks 'schedule'"),
        (lambda r: r.update(prediction="noise"), "prediction='noise'"),
        (lambda r: r["model"].update(depth=3), "has no fields ['depth']"),
        (lambda r: r["model"].update(channels="8"), "channels='8': must be int"),
        (lambda r: r["schedule"].update(name="sine"), "name='sine'"),
    ],
)
def test_bad_configurations_are_named(folder, change, message):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        load(folder)


def test_text_that_is_not_a_configuration_is_named(folder):
    path = folder / "config.json"
    for text in ("{", "[]", "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
            load(folder)


def test_bad_arguments_are_refused_before_writing(tmp_path, model):
    with pytest.raises(ValueError, match="prediction='noise'"):
        save(tmp_path / "a", model, SCHEDULE, "noise")
    with pytest.raises(ValueError, match="dtype='int8': must be one of 'float32'"):
        save(tmp_path / "a", model, SCHEDULE, "v", dtype="int8")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'file'}: not written") + ".*choose"):
        save(tmp_path / "file", model, SCHEDULE, "v")


def test_another_size_does_not_fit(folder):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["model"] = dataclasses.replace(CONFIG, channels=16).to_json()
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="tensors of another shape"):
        load(folder)


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-iddpm"])
def test_the_shipped_model_is_the_recipes_and_has_learned(monkeypatch, name):
    monkeypatch.chdir("/")
    model = load(name)
    recipe = json.loads((ROOT / "recipes" / f"{name}.json").read_text())
    assert model.config == UNetConfig.from_json(recipe["model"])
    assert model.schedule == NoiseSchedule.from_json(recipe["schedule"])
    folder = checkpoint.ASSETS / name
    training = json.loads((folder / "config.json").read_text())["training"]
    drawn = {"sample_every": recipe["train"]["sample_every"]}  # pictures along the way
    assert TrainConfig.from_json({**training["config"], **drawn}) == TrainConfig.from_json(
        recipe["train"]
    )
    assert (folder / "model.safetensors").stat().st_size < 12_000_000

    data = fashion_mnist(ROOT / "tests" / "data" / "fashion-mnist", "test")
    x0 = data.load(torch.arange(len(data)))
    t = torch.full((len(x0),), 700)
    learned = model.config.learned_variance
    weighting = "hybrid" if learned else "simple"
    loss = DiffusionLoss(model.schedule, model.prediction, weighting, learned)

    def held_out(labels):
        torch.manual_seed(0)
        with torch.inference_mode():
            return loss(model, x0, t, labels).item()

    # v has a mean square of about 1; the right label must help, a wrong one must harm
    right, none, wrong = map(
        held_out, (data.labels, model.null_cond(data.labels), (data.labels + 5) % 10)
    )
    assert right < none < wrong and right < 0.15


def test_the_shipped_students_are_the_recipes_and_draw(monkeypatch):
    monkeypatch.chdir("/")
    recipe = json.loads((ROOT / "recipes/fashion-mnist-students.json").read_text())
    plan, train = DistillConfig.from_json(recipe["distill"]), TrainConfig.from_json(recipe["train"])
    teacher = load(recipe["teacher"])
    classifier, labels = load_classifier(), torch.arange(50) % 10
    size = 0
    for k, steps in enumerate(plan.stages):
        if steps > 8:
            continue
        student = load(f"fashion-mnist-{steps}")
        assert (student.config, student.schedule) == (teacher.config, teacher.schedule)
        trailing = tuple(teacher.schedule.timesteps(plan.start_steps, "trailing").tolist())
        assert student.distilled == Distilled(trailing[:: plan.start_steps // steps], plan.guidance)
        folder = checkpoint.ASSETS / f"fashion-mnist-{steps}"
        made = json.loads((folder / "config.json").read_text())["training"]["config"]
        own = {"steps": plan.updates[k], "lr": plan.lrs[k], "prediction": teacher.prediction}
        assert TrainConfig.from_json(made) == dataclasses.replace(train, **own)
        size += sum(file.stat().st_size for file in folder.iterdir())

        sampler = DDIMSampler(
            student.schedule, spacing=student.distilled.timesteps, prediction=student.prediction
        )
        x = sampler.sample(student, (50, 1, 32, 32), seed=0, cond=labels)
        _, classes = describe(classifier, ((x.clamp(-1, 1) + 1) * 127.5).round().byte())
        assert (classes == labels).double().mean() > 0.85
    assert size < 40_000_000
