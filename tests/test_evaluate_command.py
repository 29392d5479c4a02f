"""`fastdiff evaluate` as a user types it, on the sample in tests/data."""

import json
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
    """A folder with a model, one without classes, and a classifier, all of random weights."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    for name, classes in (("model", 10), ("plain", None)):
        config = fastdiff.UNetConfig(
            image_size=32, in_channels=1, channels=8, channel_mult=(1, 1), num_res_blocks=1,
            attention_resolutions=(), num_classes=classes, norm_groups=4,
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
    command += ["--samples", samples, "--steps", "2", "--engine", "off", "--out", str(out)]
    return main([*command, "--model", str(made / model), *arguments])


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
        (("--samples", "0"), "--samples=0: must be at least 1"),
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
    assert evaluate(made, tmp_path / "out", "--guidance", "1", model="plain") == 1
    assert "has no classes; leave it out" in capsys.readouterr().err
    np.savez(tmp_path / "x.npz", pictures=np.zeros((4, 8, 8, 1), np.uint8))
    assert evaluate(made, tmp_path / "out", "--images", str(tmp_path / "x.npz")) == 1
    assert "must have `images`" in capsys.readouterr().err
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 24, 24, 3), np.uint8))
    assert evaluate(made, tmp_path / "out", "--images", str(tmp_path / "x.npz")) == 1
    assert "real images (1, 28, 28): must be (3, 24, 24)" in capsys.readouterr().err
