"""The classifier: trained on a toy, kept in a file, and the one that ships."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastdiff.data import ImageSet, fashion_mnist
from fastdiff.evaluate import (
    Judge,
    accuracy,
    describe,
    framed,
    inception_features,
    load_classifier,
    train_classifier,
)
from fastdiff.evaluate.classifier import CONFIG, SHIPPED, WEIGHTS, save_classifier
from fastdiff.evaluate.train_classifier import augment, train
from fastdiff.models.classifier import ClassifierConfig

SHAPE = (1, 32, 32)
SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TINY = ClassifierConfig(image_size=16, widths=(8, 8), depths=(0, 1), num_classes=2)


def stripes(count, seed):
    """Images of horizontal (0) or vertical (1) stripes in noise: no pixel by itself tells."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=g)
    phase = torch.randint(4, (count, 1), generator=g)
    wave = 120 * ((torch.arange(16) + phase) % 4 < 2)[:, None, :, None].expand(-1, 1, -1, 16)
    x = torch.where(labels[:, None, None, None] == 0, wave, wave.mT)
    noise = torch.randint(136, x.shape, generator=g)
    return ImageSet((x + noise).to(torch.uint8), labels, ("across", "down"))


@pytest.fixture(scope="module")
def trained():
    return train(stripes(512, 0), TINY, epochs=6, lr=0.1, batch=32, bf16=False)


def test_it_learns_a_toy_and_its_features_tell_the_classes(trained):
    data = stripes(200, 1)
    assert accuracy(trained, data.images, data.labels) > 0.99
    assert accuracy(trained, data.images, 1 - data.labels) < 0.01
    features, classes = describe(trained, data.images)
    assert features.shape == (200, 8) and classes.dtype == torch.int64
    logits = trained.head(features)
    assert torch.equal(logits.argmax(1), classes)
    x = data.images[:5].float() / 127.5 - 1
    torch.testing.assert_close(logits[:5], trained(x).detach())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"lr": float("nan")}, "lr=nan: must be"),
        ({"lr": -0.1}, "lr=-0.1: must be positive"),
        ({"batch": 65}, "batch=65: must be between 1 and 64, the images"),
        ({"batch": 2.0}, "batch=2.0: must be an integer"),
        ({"seed": 1 << 63}, "seed=9223372036854775808: must be between"),
        ({"data": None}, "data: must be a ImageSet"),
        ({"data": ImageSet(stripes(4, 0).images)}, "data: has no classes"),
        ({"config": replace(TINY, num_classes=1)}, "data's labels: spans 0 to 1, must be within 0"),
    ],
)
def test_training_refuses_before_it_begins(change, said):
    given = {"data": stripes(64, 0), "config": TINY, "epochs": 1, "lr": 0.1, "batch": 32, **change}
    with pytest.raises((TypeError, ValueError), match=said):
        train(**given, bf16=False)


def test_training_takes_any_number_of_steps():
    for epochs in (1, 5, 10):  # of a step each
        train(stripes(8, 0), TINY, epochs, lr=0.1, batch=8, bf16=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "file"], "file: not written: is a file"),
        (["--out", "new", "--epochs", "0"], "epochs=0: must be at least 1"),
        (["--out", "new", "--lr", "inf"], "lr=inf: must be finite"),
        (["--out", "new", "--device", "odd"], "'odd' is no device here"),
        (["--out", "new", "--data", "nowhere"], "nowhere: no such folder of Fashion-MNIST"),
    ],
)
def test_the_command_refuses_before_it_trains(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_classifier, "augment", None)  # a step of training fails
    monkeypatch.setattr(
        sys, "argv", ["train_classifier", "--data", str(SAMPLE), "--batch", "50", *words]
    )
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        train_classifier.main()
    assert said in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_judge_counts_the_images_of_the_class_asked_for(trained):
    data, other = stripes(60, 3), stripes(60, 4)
    judge = Judge(other.images, other.images, trained)
    labels = torch.cat([data.labels[:45], 1 - data.labels[45:]])
    assert judge.row("a quarter wrong", data.images, labels).accuracy == 0.75


def test_a_file_keeps_it(trained, tmp_path):
    save_classifier(tmp_path, trained, ("across", "down"), {"epochs": 6})
    loaded = load_classifier(tmp_path)
    assert loaded.config == TINY and not loaded.training
    images = stripes(50, 2).images
    expected, _ = describe(trained, images)
    features, _ = describe(loaded, images)
    torch.testing.assert_close(features, expected, rtol=5e-3, atol=5e-3)  # float16's, squared


def test_a_frame_is_black_and_even():
    images = torch.full((2, 3, 4, 6), 9, dtype=torch.uint8)
    whole = framed(images, (3, 8, 6))
    assert whole.shape == (2, 3, 8, 6) and whole.sum() == images.sum()
    assert torch.equal(whole[:, :, 2:6], images)
    for shape in ((3, 7, 6), (3, 2, 6), (1, 4, 6)):
        with pytest.raises(ValueError, match=r"images \(3, 4, 6\): must be"):
            framed(images, shape)


def test_damaged_files_are_named(trained, tmp_path):
    save_classifier(tmp_path, trained, (), {})
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json: missing"):
        load_classifier(tmp_path / "nowhere")
    record = json.loads((tmp_path / CONFIG).read_text())
    record["classifier"]["widths"] = [8, 9]
    (tmp_path / CONFIG).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: does not fit"):
        load_classifier(tmp_path)
    for text in ("{}", "{", '{"classifier": {"widhts": [8]}}'):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=CONFIG):
            load_classifier(tmp_path)
    shutil.copy(SHIPPED / CONFIG, tmp_path)
    (tmp_path / WEIGHTS).write_bytes((SHIPPED / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: truncated"):
        load_classifier(tmp_path)


def test_images_of_another_shape_are_refused(trained):
    with pytest.raises(ValueError, match=r"images \(3, 16, 16\): the classifier takes \(1, 16, 16"):
        describe(trained, torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("change", [{"depths": (1,)}, {"widths": ()}, {"widths": (8, 0)}])
def test_configurations_that_make_no_network_are_refused(change):
    with pytest.raises(ValueError, match=r"widths|depths"):
        ClassifierConfig(**change)


def test_augmented_images_are_moved_or_mirrored_and_nothing_else():
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    padded = F.pad(images.float() / 127.5 - 1, [2] * 4, value=-1.0)
    seen = set()
    for x, frame in zip(augment(images), padded, strict=True):
        views = {
            (down, right, mirrored): crop.flip(2) if mirrored else crop
            for down in range(5)
            for right in range(5)
            for crop in [frame[:, down : down + 8, right : right + 8]]
            for mirrored in (False, True)
        }
        (which,) = [k for k, view in views.items() if torch.allclose(x, view, atol=1e-6)]
        seen.add(which)
    assert {k[0] for k in seen} == {k[1] for k in seen} == set(range(5))
    assert len({k[2] for k in seen}) == 2 and len({k[:2] for k in seen}) > 10


def test_the_shipped_one_knows_the_sample():
    data = fashion_mnist(SAMPLE, "test", pad=0)
    assert accuracy(load_classifier(), framed(data.images, SHAPE), data.labels) >= 0.9


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_shipped_one_is_as_good_as_its_card_says():
    data = fashion_mnist(split="test", pad=0)
    training = json.loads((SHIPPED / CONFIG).read_text())["training"]
    found = accuracy(load_classifier(), framed(data.images, SHAPE), data.labels)
    assert found >= 0.925 and abs(found - training["test_accuracy"]) < 0.0005
    assert f"{found:.2%}".replace("%", " %") in (SHIPPED / "README.md").read_text()


def test_inception_says_what_it_needs(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file; takes torch-fidelity's"):
        inception_features(tmp_path / "none.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    (tmp_path / "some.pth").touch()
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        inception_features(tmp_path / "some.pth")


def test_inception_features_are_torch_fidelitys(tmp_path, monkeypatch):
    """With random weights, in a file like the published one."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = theirs.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # without a file it would be downloaded
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_: None)
        random = network("any", ["2048"])
    torch.save(random.state_dict(), tmp_path / "weights.pth")
    features = inception_features(tmp_path / "weights.pth")
    images = torch.randint(256, (3, 1, 32, 32), dtype=torch.uint8)
    (expected,) = random(images.repeat(1, 3, 1, 1))
    assert torch.equal(features(images), expected) and expected.shape == (3, 2048)
    for content in (b"", b"junk" * 9, (tmp_path / "weights.pth").read_bytes()[:5000]):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.pth: is damaged"):
            inception_features(tmp_path / "bad.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth: holds other weights"):
        inception_features(tmp_path / "bad.pth")
