"""A run that is killed, again and again, at any moment, ends as one that never was."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from fastdiff.checkpoint import load
from fastdiff.data import fashion_mnist
from fastdiff.models import UNet, UNetConfig
from fastdiff.schedule import NoiseSchedule
from fastdiff.store import Store
from fastdiff.train import TrainConfig, Trainer

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
TINY = UNetConfig(
    image_size=32,
    in_channels=1,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    dropout=0.1,
    num_classes=10,
    norm_groups=4,
)
STEPS, DEATHS = 60, 14
# a state at every step, so that much of the time is a save
CONFIG = TrainConfig(steps=STEPS, batch_size=2, lr=1e-3, warmup=2, decay="cosine", save_every=1)


def train(out):
    tqdm.set_lock(threading.RLock())  # its own, of processes, would outlive a killed one
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = fashion_mnist(SAMPLE)
    trainer = Trainer(UNet(TINY), NoiseSchedule.cosine(100), data, CONFIG, out)
    trainer.fit(resume=Store(out).exists(), progress=False)


def start(out):
    # a fresh process that needs not import torch again, nor what optimizers import
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", __name__])
    process = context.Process(target=train, args=(out,))
    process.start()
    return process


def newest(out):
    return max((int(p.name[6:15]) for p in out.glob("state-*")), default=0)


def wait(process, condition):
    end = time.monotonic() + 60
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.0005)


def stop_within(process, out, pattern):
    """Stop the process while a file of this pattern is being written; return that file."""
    while True:
        wait(process, lambda: any(out.glob(pattern)))
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.005)  # until it has stopped
        if found := list(out.glob(pattern)):
            return found[0]
        os.kill(process.pid, signal.SIGCONT)


def result(out):
    """All that a run leaves, but for times."""
    tensors, record = Store(out).load()
    record.pop("seconds")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    losses = [(line["step"], line["loss"]) for line in lines]
    config = json.loads((out / "config.json").read_text())
    config.pop("weights")  # the weights carry the seconds, too
    config["training"].pop("seconds")
    return tensors, load(out).state_dict(), record, losses, config


def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = start(whole)
    rng = random.Random(0)
    within = 0
    for death in range(DEATHS):
        process = start(parts)
        target = newest(parts) + rng.randrange(1, 5)
        if death % 3 == 2:  # while it starts
            time.sleep(rng.uniform(0, 0.3))
        else:
            wait(process, lambda: newest(parts) >= target)  # noqa: B023
        if death == DEATHS - 1:  # while the model is written, after the last state
            stop_within(process, parts, ".model.safetensors.*.tmp")
            assert newest(parts) == STEPS
        elif death % 3 == 0:  # while a state is written
            stop_within(process, parts, ".state-*.tmp")
            within += 1
        else:
            time.sleep(rng.uniform(0, 0.03))
        assert process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if death in (4, 8):  # and the disk has lost the end of the last state, or a bit of it
            path = max(parts.glob("state-*"))
            raw = bytearray(path.read_bytes())
            place = rng.randrange(len(raw))
            raw[place] ^= 1
            path.write_bytes(raw[:place] if death == 4 else raw)
    for process in (start(parts), uninterrupted):
        process.join(60)
        assert process.exitcode == 0
    assert within >= 3

    assert not list(parts.glob(".*.tmp"))
    assert sorted(p.name for p in parts.iterdir()) == sorted(p.name for p in whole.iterdir())
    (state, model, *rest), (state_, model_, *rest_) = result(parts), result(whole)
    assert rest == rest_ and len(rest[1]) == STEPS // 10
    for found, expected in ((state, state_), (model, model_)):
        assert found.keys() == expected.keys() and len(found) > 50
        assert all(torch.equal(found[k], expected[k]) for k in expected)
