"""The commands as a user types them, on a tiny model with random weights."""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff import commands
from fastdiff.cli import main
from fastdiff.commands import sampling
from fastdiff.data import ShardedImages
from fastdiff.models.distilled import Distilled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = fastdiff.UNetConfig(
        image_size=8, in_channels=1, channels=8, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), num_classes=3, norm_groups=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = fastdiff.UNet(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("model")
    names = ("Shirt", "Bag", "Ankle boot")
    fastdiff.save(folder, model, fastdiff.NoiseSchedule.cosine(100), "v", class_names=names)
    return folder


def sample(folder, out, *arguments):
    return main(["sample", "--model", str(folder), "--steps", "3", "--out", str(out), *arguments])


def test_sample_draws_a_grid_of_ten_a_class(folder, tmp_path, capsys):
    assert sample(folder, tmp_path / "x.png", "--guidance", "1", "--scale", "1") == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (3 * 10 - 2, 10 * 10 - 2)
    assert "30 images" in capsys.readouterr().out


def test_image_k_is_the_same_whatever_the_batch(folder, tmp_path):
    whole, parts = tmp_path / "whole.npz", tmp_path / "parts.npz"
    assert sample(folder, whole, "--num", "7") == 0
    assert sample(folder, parts, "--num", "7", "--batch", "3") == 0
    with np.load(whole) as a, np.load(parts) as b:
        assert a["images"].shape == (7, 8, 8, 1) and a["images"].dtype == np.uint8
        assert a["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert np.array_equal(a["labels"], b["labels"])
        # a convolution may sum in another order at another batch size: one grey level
        assert np.abs(a["images"].astype(int) - b["images"].astype(int)).max() <= 1


def test_classes_go_by_name_or_number(folder, tmp_path):
    assert sample(folder, tmp_path / "x.npz", "--class", "ankle boot", "--class", "0") == 0
    with np.load(tmp_path / "x.npz") as data:
        assert data["labels"].tolist() == [2, 0] * 10


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    config = fastdiff.UNetConfig(
        image_size=8, in_channels=1, channels=8, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), norm_groups=4, vocabulary=6, text_length=5, text_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = fastdiff.UNet(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("captioned")
    words = ("", "", "", "a", "red", "boot")
    fastdiff.save(folder, model, fastdiff.NoiseSchedule.cosine(100), "v", class_names=words)
    return folder


def test_captions_are_told_in_turn(captioned, tmp_path):
    told = "--caption", "a red boot", "--caption", "a boot"
    assert sample(captioned, tmp_path / "x.npz", *told, "--num", "3", "--guidance", "2") == 0
    assert sample(captioned, tmp_path / "set", *told, "--num", "3", "--guidance", "2") == 0
    saved = np.load(tmp_path / "x.npz")
    assert saved["labels"].tolist() == [[1, 3, 4, 5, 2], [1, 3, 5, 2, 0], [1, 3, 4, 5, 2]]
    rows = list(ShardedImages(tmp_path / "set"))
    assert [label.tolist() for _, label in rows] == saved["labels"].tolist()
    assert (torch.stack([x for x, _ in rows])[:, 0].numpy() == saved["images"][..., 0]).all()
    one = "--caption", "a boot", "--guidance", "2", "--num", "3"
    assert sample(captioned, tmp_path / "y.npz", *one) == 0
    same = (saved["images"] == np.load(tmp_path / "y.npz")["images"]).all((1, 2, 3))
    assert same.tolist() == [False, True, False]  # the caption is heard, and the noise is the same
    assert sample(captioned, tmp_path / "z.png") == 0  # told nothing
    assert sample(captioned, tmp_path / "w.png", *told, "--class", "1") == 1


@pytest.mark.parametrize("ending", [".gif", ".png", ".webp"])
def test_trajectory_is_one_frame_a_row(folder, tmp_path, ending):
    out = tmp_path / f"x{ending}"
    assert sample(folder, out, "--trajectory", "--num", "4", "--batch", "3") == 0
    with Image.open(out) as picture:
        assert picture.n_frames == 3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp", "heun"])
def test_every_sampler_runs(folder, tmp_path, sampler):
    assert sample(folder, tmp_path / "x.npz", "--sampler", sampler, "--num", "2") == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "x.jpg"], "--out=x.jpg: must end in .png or .npz"),
        (["--out", "missing/x.png"], "the folder missing does not exist"),
        (["--num", "0"], "--num=0: must be at least 1"),
        (["--class", "hat"], "must be 0 to 2 or one of Shirt, Bag, Ankle boot"),
        (["--eta", "1", "--sampler", "heun"], "--eta=1.0: is for ddim and dpmpp, not heun"),
        (["--steps", "101"], "steps=101: must be between 1 and 100"),
        (["--model", "no-such"], "no-such: no such checkpoint"),
        (["--spacing", "even"], "spacing='even'"),
        (["--out", "x.gif"], "--out=x.gif: must end in .png or .npz, or be a folder's name"),
        (["--out", "x.gif"], ".gif takes --trajectory"),
        (["--scale", "9000"], "--out=samples.png: columns=3, gap=2, scale=9000"),
        (["--scale", "0"], "--scale=0: must be at least 1"),
        (["--scale", "2", "--out", "x.npz"], "--scale=2: is of pictures, x.npz is none"),
        (["--per-shard", "2", "--out", "x.npz"], "--per-shard=2: is of folders, x.npz is none"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    folder, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands.sample, "draw_batches", None)  # before any work
    assert main(["sample", "--model", str(folder), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pictures_go_where_pictures_can_be(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands.sample, "draw_batches", None)
    (tmp_path / "x.png").mkdir()
    assert sample(folder, tmp_path / "x.png") == 1
    assert "x.png: is a folder" in capsys.readouterr().err
    config = dataclasses.replace(fastdiff.load(folder).config, in_channels=2, num_classes=None)
    other = tmp_path / "two"
    fastdiff.save(other, fastdiff.UNet(config), fastdiff.NoiseSchedule.cosine(100), "v")
    assert sample(other, tmp_path / "y.png") == 1
    assert "y.png: x of shape (100, 2, 8, 8): must be [B, 1 or 3" in capsys.readouterr().err


def test_doctor_finds_nothing_wrong(capsys):
    status = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0 and not [line for line in lines if line.startswith("!!")]
    assert any("kernels agree with the reference" in line for line in lines)


def test_without_compiled_kernels_all_runs_on_the_reference_and_doctor_says_so(folder, tmp_path):
    """As on a machine without compiler and Triton: importing either is made to fail."""
    code = (
        "import sys; sys.modules['fastdiff._C'] = sys.modules['triton'] = None\n"
        "from fastdiff.cli import main\n"
        f"status = main(['sample', '--model', {str(folder)!r}, '--steps', '2', '--num', '2',"
        f" '--out', {str(tmp_path / 'x.png')!r}])\n"
        "sys.exit(status or main(['doctor']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no C++ kernels" in run.stdout and "slower" in run.stdout and "no Triton" in run.stdout


def test_help_names_every_command():
    run = subprocess.run(
        [sys.executable, "-m", "fastdiff", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0 and all(c in run.stdout for c in ("sample", "train", "doctor"))


def arguments(words):
    parser = argparse.ArgumentParser()
    sampling.add_arguments(parser)
    parser.add_argument("--guidance", type=float)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "clip"),
    [([], np.inf), (["--clip", "1"], 1.0), (["--spacing", "trailing", "--steps", "3"], 1.0)],
)
def test_a_students_own_steps_are_not_clipped_unless_asked(folder, words, clip):
    student = fastdiff.load(folder)
    student.distilled = Distilled((99, 49), 0.5)
    assert set(sampling.sampler_of(arguments(words), student).table.clip) == {clip}
    for words, said in ((["--steps", "3"], "--steps=3"), (["--sampler", "heun"], "--sampler=heun")):
        with pytest.raises(ValueError, match=f"{said}: .* was distilled to 2 steps of ddim"):
            sampling.sampler_of(arguments(words), student)
    student.distilled = None
    assert set(sampling.sampler_of(arguments([]), student).table.clip) == {1.0}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--steps", "4"], "m-4"),
        (["--steps", "5"], "m"),
        ([], "m"),
        (["--steps", "4", "--guidance", "1"], "m"),
        (["--steps", "4", "--sampler", "dpmpp"], "m"),
        (["--steps", "4", "--eta", "1"], "m"),
    ],
)
def test_the_default_model_is_the_student_of_so_many_steps(
    folder, tmp_path, monkeypatch, words, name
):
    for made in ("m", "m-4"):
        shutil.copytree(folder, tmp_path / made)
    monkeypatch.setattr(sampling, "ASSETS", tmp_path)
    monkeypatch.setattr(fastdiff.checkpoint, "ASSETS", tmp_path)
    monkeypatch.setattr(sampling, "SHIPPED", "m")
    args = arguments(words)
    sampling.model_of(args)
    assert args.model == name


TRAIN = {"model": {}, "schedule": {}, "data": {}, "train": {}}
DISTILL = {"teacher": "fashion-mnist", "data": {}, "distill": {}, "train": {}}


@pytest.mark.parametrize(
    ("command", "content", "said"),
    [
        ("train", {**TRAIN, "train": 3}, "'train' is 3, must be an object, {\"name\": value, ...}"),
        ("train", {**TRAIN, "data": [3]}, "'data' is [3], must be an object"),
        ("train", {**TRAIN, "model": "unet"}, "'model' is \"unet\", must be an object"),
        ("train", {**TRAIN, "schedule": None}, "'schedule' is null, must be an object"),
        ("distill", {**DISTILL, "data": 3}, "'data' is 3, must be an object"),
        ("distill", {**DISTILL, "distill": True}, "'distill' is true, must be an object"),
        ("distill", {**DISTILL, "teacher": 3}, "'teacher' is 3, must be a model's name, folder or"),
        ("train", {"train": {}}, "has ['train']; must have the parts ['model', 'schedule',"),
        ("train", b'{"model": "\xff"}', "not JSON ('utf-8' codec can't decode byte 0xff"),
        ("train", b"[" * 100_000, "not JSON (maximum recursion depth exceeded"),
        ("train", b"", "not JSON (Expecting value"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(tmp_path, capsys, command, content, said):
    path = tmp_path / "recipe.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert main([command, "--config", str(path), "--out", str(tmp_path / "run")]) == 1
    assert f"fastdiff {command}: {path}: {said}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
