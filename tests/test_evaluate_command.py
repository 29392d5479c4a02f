"""`fastdiff evaluate` as a user types it, on the sample in tests/data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.cli import main
from fastdiff.data import fashion_mnist
from fastdiff.evaluate import balanced, framed
from fastdiff.evaluate.classifier import save_classifier
from fastdiff.losses import bits_per_dim
from fastdiff.models.classifier import Classifier, ClassifierConfig

SHAPE = (1, 32, 32)
SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, others without classes, and a classifier, all of random weights."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    told = {"vocabulary": 6, "text_length": 5, "text_layers": 1}
    for name, more in (("model", {"num_classes": 10}), ("plain", {}), ("captioned", told)):
        config = fastdiff.UNetConfig(
            image_size=32, in_channels=1, channels=8, channel_mult=(1, 1), num_res_blocks=1,
            attention_resolutions=(), norm_groups=4, **more,
        )  # fmt: skip
        model = fastdiff.UNet(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        fastdiff.save(root / name, model, fastdiff.NoiseSchedule.cosine(100), "v")
    classifier = Classifier(ClassifierConfig(widths=(4, 6), depths=(0, 0))).eval()
    save_classifier(root / "classifier", classifier, (), {})
    return root


def evaluate(made, out, *arguments, model="model", samples="20"):
    command = ["evaluate", "--data", str(SAMPLE), "--classifier", str(made / "classifier")]
    command += ["--samples", samples, "--out", str(out)]
    if "--images" not in arguments:
        command += ["--steps", "2", "--engine", "off", "--model", str(made / model)]
    return main([*command, *arguments])


@pytest.fixture(scope="module")
def swept(made):
    out = made / "swept"
    assert evaluate(made, out, "--guidance", "0", "2", "--batch", "7", "--seed", "5") == 0
    return out


def test_a_sweep_writes_a_row_each_between_real_images_and_noise(swept):
    rows = json.loads((swept / "report.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names[0] == "real test images" and names[-1] == "uniform noise"
    assert names[1:3] == ["guidance 0", "guidance 2"] and len(names) == 4 + 1
    assert all(row["count"] == 20 and row["fd"] >= 0 for row in rows)
    assert rows[1]["fd"] != rows[2]["fd"]
    text = (swept / "report.md").read_text()
    assert all(f"| {name} | {row['fd']:.4g} |" in text for name, row in zip(names, rows))  # noqa: B905
    for picture in ("guidance-0", "guidance-0-nearest", "guidance-2", "guidance-2-nearest"):
        assert f"({picture}.png)" in text
        with Image.open(swept / f"{picture}.png") as opened:
            assert opened.width > 300


def test_the_images_are_those_of_sample(made, swept, tmp_path):
    command = ["sample", "--model", str(made / "model"), "--steps", "2", "--engine", "off"]
    command += ["--num", "20", "--seed", "5", "--guidance", "2", "--out", str(tmp_path / "x.npz")]
    assert main(command) == 0
    with np.load(tmp_path / "x.npz") as theirs, np.load(swept / "guidance-2.npz") as ours:
        assert np.array_equal(theirs["labels"], ours["labels"])
        # a convolution may sum in another order at another batch size: one grey level
        apart = np.abs(theirs["images"].astype(int) - ours["images"].astype(int))
        assert apart.max() <= 1


def test_images_made_elsewhere_get_the_same_figures(made, swept, tmp_path):
    assert evaluate(made, tmp_path, "--images", str(swept / "guidance-2.npz")) == 0
    again = json.loads((tmp_path / "report.json").read_text())["rows"]
    before = json.loads((swept / "report.json").read_text())["rows"]
    assert [again[0], again[2]] == [before[0], before[3]]  # the scale
    # features of other batches, to rounding
    close = pytest.approx(before[2].pop("fd"), rel=1e-5)
    assert again[1] == before[2] | {"name": "guidance-2", "fd": close}


def test_training_images_are_told_to_be_copies(made, tmp_path, capsys):
    data = fashion_mnist(SAMPLE, pad=0)
    np.savez(
        tmp_path / "copied.npz",
        images=framed(data.images, SHAPE).numpy(),
        labels=data.labels.numpy(),
    )
    assert evaluate(made, tmp_path / "out", "--images", str(tmp_path / "copied.npz")) == 0
    floor, copied, *_ = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert copied["close"] == 1 and copied["near"] == 0
    assert copied["precision"] == copied["recall"] == 1 and copied["fd"] < 1e-6
    assert floor["close"] <= 0.05 and floor["near"] > 0.01 and floor["fd"] > copied["fd"]
    assert "| copied | " in capsys.readouterr().out


def test_bits_per_dimension_are_those_of_the_losses(made, tmp_path):
    assert evaluate(made, tmp_path, "--bits-per-dim", "3", "--batch", "2") == 0
    record = json.loads((tmp_path / "report.json").read_text())
    model, data = fastdiff.load(made / "model"), fashion_mnist(SAMPLE, "test", pad=0)
    chosen = balanced(data.labels)[:3]
    expected = bits_per_dim(
        model,
        model.schedule,
        framed(data.images[chosen], SHAPE) / 127.5 - 1,
        "v",
        cond=data.labels[chosen],
    )
    assert record["bits"]["total"] == pytest.approx(expected.total, rel=1e-5)
    assert len(record["bits"]["terms"]) == 100
    assert f"{expected.total:.3f}" in record["bits per dimension"]
    assert "- bits per dimension: " in (tmp_path / "report.md").read_text()


def test_a_model_without_classes(made, tmp_path):
    assert evaluate(made, tmp_path, model="plain", samples="6") == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows[1]["name"] == "samples" and rows[1]["accuracy"] is None
    with np.load(tmp_path / "samples.npz") as arrays:
        assert "labels" not in arrays and arrays["images"].shape == (6, 32, 32, 1)


def test_real_images_of_ones_own(made, tmp_path):
    for name, split in (("train", "train"), ("test", "test")):
        data = fashion_mnist(SAMPLE, split, pad=0)
        np.savez(tmp_path / f"{name}.npz", images=data.images.numpy(), labels=data.labels.numpy())
    own = ("--train", str(tmp_path / "train.npz"), "--test", str(tmp_path / "test.npz"))
    for out, more in (("a", ()), ("b", own)):
        assert evaluate(made, tmp_path / out, *more, samples="10") == 0
    a, b = (json.loads((tmp_path / out / "report.json").read_text())["rows"] for out in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--samples", "3"), "--samples=3: must be at least 4: precision and recall look at 3"),
        (("--batch", "0"), "--batch=0: must be at least 1"),
        (("--guidance", "0", "nan"), "--guidance=nan: must be finite"),
        (("--samples", "21"), "--samples=21: must be at most 20, the real images of each kind"),
        (("--bits-per-dim", "21"), "--bits-per-dim=21: must be 0 to 20"),
        (("--images", "none.npz"), "--images=none.npz: no such file"),
        (("--train", "a.npz"), "--train, --test: give both"),
        (("--inception", "none.pth"), "none.pth: no such file; takes torch-fidelity's"),
        (("--classifier", "nowhere"), "nowhere/config.json: missing"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_work(made, tmp_path, capsys, arguments, said):
    assert evaluate(made, tmp_path / "out", *arguments) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_guidance_needs_classes_and_images_their_array(made, tmp_path, capsys):
    for model, said in (("plain", "has no classes; leave it out"), ("captioned", "told captions")):
        assert evaluate(made, tmp_path / "out", "--guidance", "0", "1", model=model) == 1
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
    np.savez(tmp_path / "x.npz", pictures=np.zeros((4, 8, 8, 1), np.uint8))
    assert evaluate(made, tmp_path / "out", "--images", str(tmp_path / "x.npz")) == 1
    assert "must have `images`" in capsys.readouterr().err
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 24, 24, 3), np.uint8))
    assert evaluate(made, tmp_path / "out", "--images", str(tmp_path / "x.npz")) == 1
    assert "real images (1, 28, 28): must be (3, 24, 24)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "name", "more"),
    [("test", "samples.npz", ()), ("train", "guidance-0.5.npz", ("--guidance", "1", "0.5"))],
)
def test_real_images_are_not_replaced(made, tmp_path, capsys, monkeypatch, flag, name, more):
    real = {"train": tmp_path / "train.npz", "test": tmp_path / "test.npz", flag: tmp_path / name}
    for path in real.values():
        path.write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)
    own = ("--train", real["train"].name, "--test", real["test"].name)
    assert evaluate(made, tmp_path, *own, *more) == 1
    assert f"--{flag}={name}: would be replaced" in capsys.readouterr().err
    assert real[flag].read_bytes() == b"mine"


def test_the_images_that_are_judged_are_left_as_they_are(made, swept, tmp_path):
    mine = tmp_path / "mine.npz"
    np.savez_compressed(mine, **np.load(swept / "guidance-2.npz"), notes=np.arange(3))
    before = mine.read_bytes()
    assert evaluate(made, tmp_path, "--images", str(mine)) == 0
    assert mine.read_bytes() == before
    assert evaluate(made, tmp_path / "out", "--images", str(mine)) == 0
    assert not list((tmp_path / "out").glob("*.npz"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--guidance", "2"),
        ("--seed", "3"),
        ("--engine", "off", "--clip", "0"),
        ("--model", "fashion-mnist", "--steps", "4", "--eta", "0.5"),
        ("--sampler", "heun", "--spacing", "leading", "--batch", "9"),
    ],
)
def test_flags_that_images_drawn_already_leave_nothing_to_say_are_refused(
    made, swept, tmp_path, capsys, flags
):
    images = "--images", str(swept / "guidance-2.npz")
    assert evaluate(made, tmp_path / "out", *images, *flags) == 1
    said = capsys.readouterr().err
    assert all(f"{flag}=" in said for flag in flags[::2]) and "--images" in said
    assert "leave it out" in said and not (tmp_path / "out").exists()


def test_images_that_cannot_be_judged_are_named(made, swept, tmp_path, capsys):
    whole = (swept / "guidance-2.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    at = len(whole) // 3  # of a pixel: mapped, it would be judged
    (tmp_path / "bit.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    images, labels = np.zeros((20, 32, 32, 1), np.uint8), np.arange(20) % 10
    np.savez_compressed(tmp_path / "packed.npz", images=images, labels=labels)
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[90] ^= 0x55
    (tmp_path / "packed.npz").write_bytes(packed)
    np.savez(tmp_path / "words.npz", images=images, labels=np.array(["a dress"] * 20))
    np.savez(tmp_path / "float.npz", images=images, labels=labels + 0.5)
    np.savez(tmp_path / "tokens.npz", images=images, labels=np.ones((20, 6), np.int64))
    np.savez(tmp_path / "few.npz", images=images[:3])
    np.savez(tmp_path / "flat.npz", images=images[..., 0])
    for name, said in (
        ("cut", "cut.npz: cannot be read (File is not a zip file); make or fetch it again"),
        ("bit", "bit.npz: damaged: images.npy does not have its checksum; make or fetch it again"),
        ("packed", "packed.npz: cannot be read ("),
        ("words", "words.npz: labels <U7 (20,); must be integers"),
        ("float", "float.npz: labels float64 (20,); must be integers"),
        ("tokens", "tokens.npz: has labels of 6 tokens, as captions are; must be a class an image"),
        ("few", "few.npz: has 3 images, must have at least 4"),
        ("flat", "flat.npz: images torch.uint8 (20, 32, 32): must be uint8 [N, C, H, W]"),
    ):
        assert evaluate(made, tmp_path / "out", "--images", str(tmp_path / f"{name}.npz")) == 1
        assert said in (found := capsys.readouterr().err), found
    assert not (tmp_path / "out").exists()


def test_an_array_of_images_alone_is_judged(made, swept, tmp_path):
    with np.load(swept / "guidance-2.npz") as drawn:
        np.save(tmp_path / "mine.npy", drawn["images"])
    assert evaluate(made, tmp_path / "out", "--images", str(tmp_path / "mine.npy")) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert rows[1]["name"] == "mine" and rows[1]["accuracy"] is None and rows[1]["count"] == 20


def test_a_folder_that_cannot_be_made_is_named_before_work(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastdiff.commands.evaluate.Judge", None)
    (tmp_path / "out").write_text("mine")
    assert evaluate(made, tmp_path / "out") == 1
    assert f"{tmp_path / 'out'}: not written: is a file" in capsys.readouterr().err


def test_what_cannot_be_written_leaves_what_was_there(made, swept, tmp_path, capsys):
    resource = pytest.importorskip("resource", reason="needs Unix")
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    old = {path.name: path.read_bytes() for path in out.iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, name in ((5000, "guidance-0.npz"), (25_000, "guidance-0.png")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            assert evaluate(made, out, "--guidance", "0", "--seed", "6") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"{name}: not written: File too large" in capsys.readouterr().err
        assert (out / name).read_bytes() == old[name]
    assert {path.name for path in out.iterdir()} == set(old)
