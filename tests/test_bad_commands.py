"""Generated command lines: done, or a message of one line that says what is wrong; no traceback."""

import json
from itertools import chain

import hypothesis.strategies as st
import pytest
import torch
from generated import SCHEDULE, slowly
from hypothesis import given

import fastdiff
from fastdiff.cli import COMMANDS, main

DONE, REFUSED, MISUSED = 0, 1, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, in which the commands run."""
    config = fastdiff.UNetConfig(
        image_size=4, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), num_classes=3, norm_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("commands")
    fastdiff.save(folder / "model", fastdiff.UNet(config), SCHEDULE, "v")
    (folder / "list.json").write_text("[1, 2]")
    recipe = {"model": {}, "schedule": {}, "data": {}, "train": {}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "file").write_text("x")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        yield folder


number = st.integers(-2, 9).map(str) | st.sampled_from(
    ["1.5", "nan", "inf", "-inf", "1e400", "odd", "", "²", "99999999999999999999", "-0", "0x1"]
)
path = st.sampled_from(
    [
        *("model", "file", "list.json", "recipe.json", "nowhere", "nowhere/x.png", "", "x" * 300),
        *("x.png", "x.npz", "x.gif", "folder", "x.jpg", ".png", "a\0b"),
    ]
)
device = st.sampled_from(["cpu", "cuda", "odd", "meta", "", "cpu:7", "mps"])
FLAGS = {
    "sample": {
        "--model": path,
        "--sampler": st.sampled_from(["ddim", "ddpm", "dpmpp", "heun", "odd"]),
        "--steps": number,
        "--spacing": st.sampled_from(["trailing", "ddim5", "3,2", "odd", "", "ddim²"]),
        "--eta": number,
        "--clip": number,
        "--seed": number,
        "--engine": st.sampled_from(["off", "odd"]),
        "--device": device,
        "--guidance": number,
        "--class": number,
        "--num": st.integers(-2, 9).map(str) | st.sampled_from(["odd", "nan", "", "1.5"]),
        "--batch": number,
        "--out": path,
        "--per-shard": number,
        "--scale": number,
        "--trajectory": st.none(),
        "--odd": number,
    },
    "evaluate": {
        "--model": path,
        "--images": path,
        "--samples": number,
        "--guidance": number,
        "--bits-per-dim": number,
        "--batch": number,
        "--data": path,
        "--train": path,
        "--test": path,
        "--classifier": path,
        "--inception": path,
        "--out": path,
        "--device": device,
    },
    "train": {
        "--config": path, "--task": st.sampled_from(["generate", "classifier", "odd"]),
        "--data": path, "--out": path, "--resume": st.none(), "--device": device, "--lr": number,
        "--steps": number, "--ema": number, "--prediction": st.sampled_from(["v", "odd"]),
    },
    "distill": {
        "--config": path, "--teacher": path, "--data": path, "--out": path, "--device": device,
        "--start-steps": number, "--guidance": number, "--engine": st.sampled_from(["off", "odd"]),
    },
    "verify": {"": path},
    "export": {"": path, "--out": path},
}  # fmt: skip


def told(command, odd):
    """The command with some flags of any value: a list of words."""
    flag = st.sampled_from([*FLAGS[command]]).flatmap(
        lambda name: FLAGS[command][name].map(
            lambda value: [word for word in (name, value) if word not in ("", None)]
        )
    )
    return st.lists(flag, max_size=odd).map(lambda flags: [command, *chain(*flags)])


def run(argv, capsys):
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as stop:  # argparse's, of what it cannot read
        status = stop.code
    said = capsys.readouterr()
    assert status in (DONE, REFUSED, MISUSED)
    if status != DONE:
        said_by_us = any(line.startswith("fastdiff") for line in said.err.split("\n"))
        assert said_by_us or argv[0] == "verify", said.err
        assert "Traceback" not in said.err
    return status, said


USUAL = {
    "sample": [
        "--model",
        "model",
        "--steps",
        "2",
        "--num",
        "2",
        "--engine",
        "off",
        "--out",
        "y.npz",
    ],
    "evaluate": ["--model", "model", "--samples", "4", "--out", "report", "--train", "y.npz"],
    "train": ["--config", "recipe.json", "--out", "run"],
    "distill": ["--config", "recipe.json", "--out", "run"],
    "verify": [],
    "export": ["--out", "pictures"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", FLAGS)
def test_commands(command, place, capsys):
    @slowly
    @given(told(command, 2))
    def tried(words):
        argv = [command, *USUAL[command], *words[1:]]
        status, said = run(argv, capsys)
        if status == DONE and command == "sample":
            assert "2 images" in said.out or "--num" in argv[10:]

    tried()


@slowly
@given(st.lists(st.sampled_from([*COMMANDS, "odd", "-h", "--version", ""]) | st.text(), max_size=3))
def test_words(place, capsys, argv):
    if "doctor" not in argv[:1]:
        run([*argv, "--odd"], capsys)  # which nothing takes
