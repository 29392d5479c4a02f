"""Data parallel: two real processes make the steps of one, and none outlives another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastdiff import NoiseSchedule, UNet, UNetConfig, load, save
from fastdiff.files import read_tensors

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RECIPE = {
    "model": {
        "image_size": 32,
        "in_channels": 1,
        "channels": 8,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [16],
        "num_classes": 10,
        "norm_groups": 4,
    },
    "schedule": {"name": "cosine", "T": 3},
    "data": {"name": "fashion-mnist"},
    "train": {
        "steps": 8,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup": 1,
        "timesteps": "loss_aware",  # has seen enough after five steps
        "save_every": 0,
        "keep": 1,
    },
}


def start(folder, *flags, processes=2, verb="train", recipe=RECIPE):
    """`fastdiff train`, or another verb, in so many processes."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    files = ("--config", str(folder / "recipe.json"), "--out", str(folder / "run"))
    command = [sys.executable, *(("-m", *TORCHRUN) if processes > 1 else ()), "-m", "fastdiff"]
    return subprocess.Popen(
        [*command, verb, *files, "--data", str(SAMPLE), "--device", "cpu", *flags],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run):
    """What it said; one that hangs is stopped, its workers too."""
    try:
        return run.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        run.terminate()
        raise


def trained(folder, *flags, processes=2):
    run = start(folder, *flags, processes=processes)
    said = finish(run)
    assert run.returncode == 0, said
    (state,) = (folder / "run").glob("state-*.safetensors")
    return read_tensors(state)[0]


def same(both, alone):
    """Equal to rounding, whose smallest gradients Adam makes as large as any other."""
    assert both.keys() == alone.keys()
    gaps = {k: (both[k].double() - v.double()).norm() for k, v in alone.items()}
    norms = {k: v.double().norm() for k, v in alone.items()}
    for part in ("model", "ema", "window", "timesteps"):
        names = [k for k in alone if k.startswith(part)]
        whole = sum(norms[k] ** 2 for k in names) ** 0.5
        assert sum(gaps[k] ** 2 for k in names) ** 0.5 < 1e-6 * whole
        assert all(gaps[k] < 1e-5 * norms[k] for k in names)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    state = trained(tmp_path_factory.mktemp("alone"), processes=1)
    assert (state["timesteps.seen"] >= 10).all()  # timesteps were drawn by their losses
    return state


@pytest.mark.parametrize(
    "flags", [("--accumulate", "2"), ("--accumulate", "2", "--fsdp")], ids=["ddp", "fsdp"]
)
def test_two_processes_make_the_steps_of_one(tmp_path, alone, flags):
    same(trained(tmp_path, *flags), alone)


def test_a_worker_that_dies_stops_the_others_and_a_restart_resumes(tmp_path):
    run = start(tmp_path, "--steps", "100000", "--save-every", "1")
    begun = time.monotonic()
    while not list((tmp_path / "run").glob("state-*.safetensors")):
        time.sleep(0.05)
        assert run.poll() is None and time.monotonic() - begun < 60
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    killed = time.monotonic()
    said = finish(run)
    assert time.monotonic() - killed < 15 and run.returncode != 0
    assert "if another process died, that is why" in said and "--resume" in said

    state = next((tmp_path / "run").glob("state-*.safetensors"))
    step = json.loads(read_tensors(state)[1]["record"])["step"]
    shutil.copytree(tmp_path, tmp_path / "alone")
    resume = ("--resume", "--steps", str(step + 2))
    same(trained(tmp_path, *resume), trained(tmp_path / "alone", *resume, processes=1))


def test_a_distillation_by_two_processes_is_that_of_one(tmp_path):
    torch.manual_seed(0)
    model = UNet(UNetConfig.from_json(RECIPE["model"]))
    for p in model.parameters():
        p.data.add_(0.03 * torch.randn_like(p))
    save(tmp_path / "teacher", model, NoiseSchedule.cosine(1000), "v")
    recipe = {
        "teacher": str(tmp_path / "teacher"),
        "data": RECIPE["data"],
        "distill": {"start_steps": 4, "end_steps": 1, "guidance": 1.0, "engine": "off"},
        "train": {**RECIPE["train"], "warmup": 0, "ema": 0.0, "label_dropout": 0.0},
    }
    for processes in (1, 2):
        run = start(tmp_path / str(processes), processes=processes, verb="distill", recipe=recipe)
        said = finish(run)
        assert run.returncode == 0 and said.count("students of 2, 1 steps") == 1, said
    for steps in ("2", "1"):
        alone, both = (
            torch.cat([p.flatten() for p in load(tmp_path / n / "run" / steps).parameters()])
            for n in ("1", "2")
        )
        assert (both - alone).norm() < 1e-6 * alone.norm()
        assert (tmp_path / "2" / "run" / steps / "report.json").exists()
