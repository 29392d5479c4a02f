"""What a run says of itself: lines, curves and events."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data import fashion_mnist
from fastdiff.models import UNet, UNetConfig
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import TrainConfig, Trainer, draw_curves
from fastdiff.train.metrics import Metrics, read

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
CONFIG = TrainConfig(steps=20, batch_size=8, lr=1e-3, warmup=15, save_every=0, sample_steps=2)


def trainer(out, **change):
    torch.manual_seed(0)
    network = UNetConfig(
        image_size=32,
        in_channels=1,
        channels=4,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=2,
    )
    config, data = dataclasses.replace(CONFIG, **change), fashion_mnist(SAMPLE)
    return Trainer(UNet(network), NoiseSchedule.cosine(95), data, config, out)


def test_a_line_is_the_mean_over_its_window(tmp_path):
    run = trainer(tmp_path)
    losses, norms, by_t = [], [], torch.zeros(95, 3)
    add = run.metrics.add

    def spying(loss, norm, sums, bad):
        losses.append(loss.item())
        norms.append(norm.item())
        if len(losses) > 10:
            by_t.add_(sums)
        add(loss, norm, sums, bad)

    run.metrics.add = spying
    run.fit(progress=False)
    first, last = read(tmp_path)
    assert (first["step"], last["step"]) == (10, 20)
    assert last["loss"] == pytest.approx(np.mean(losses[10:]), rel=1e-5)
    assert last["grad_norm"] == pytest.approx(np.mean(norms[10:]), rel=1e-5)
    assert (first["lr"], last["lr"]) == (CONFIG.learning_rate(9), CONFIG.learning_rate(19))
    assert by_t[:, 0].sum() == 80 and 0 < first["seconds"] <= last["seconds"]
    # 95 timesteps in ten parts: five of ten, then five of nine
    edges = [0, 10, 20, 30, 40, 50, 59, 68, 77, 86, 95]
    for k, value in enumerate(last["loss_by_t"]):
        count, error, _ = by_t[edges[k] : edges[k + 1]].sum(0)
        assert (value is None) == (count == 0)
        assert value is None or value == pytest.approx(float(error / count), rel=1e-4)


def test_curves_are_drawn_with_the_samples(tmp_path):
    run = trainer(tmp_path, sample_every=10)
    run.fit(progress=False)
    for name in ("learning_curve.png", "loss_by_timestep.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert pixels.shape[1] > 500 and (pixels < 200).mean() > 0.001
    drawn = (tmp_path / "learning_curve.png").read_bytes()
    lines = read(tmp_path)
    lines[-1]["loss"] *= 3
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 30, "lo')  # killed while writing
    draw_curves(tmp_path)
    assert (tmp_path / "learning_curve.png").read_bytes() != drawn


def test_curves_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        draw_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="has 1 lines of metrics; a curve takes two or more"):
        draw_curves(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "fastdiff.train.curves.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n' * 2)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_curves(tmp_path)
    run = trainer(tmp_path / "run", sample_every=10)
    with pytest.warns(UserWarning, match="no curves are drawn.*pip install matplotlib"):
        run.fit(progress=False)
    assert not list((tmp_path / "run").glob("*curve*"))


def test_tensorboard_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard=True: .*pip install tensorboard"):
        trainer(tmp_path, tensorboard=True)


def test_tensorboard_has_the_lines_and_samples(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(tmp_path, steps=15, tensorboard=True, sample_every=10).fit(progress=False)
    trainer(tmp_path, tensorboard=True, sample_every=10).fit(resume=True, progress=False)
    shown = events.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    shown.Reload()
    for line, loss in zip(read(tmp_path), shown.Scalars("loss"), strict=True):
        assert line["step"] == loss.step and line["loss"] == pytest.approx(loss.value)
    assert [image.step for image in shown.Images("samples")] == [10]


def test_a_window_starts_anew_and_leaves_bad_steps_out():
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.bool)
    metrics = Metrics(Path("unused"), 4, torch.device("cpu"))
    metrics.add(one, 2 * one, torch.ones(4, 3), zero)
    metrics.add(one * torch.nan, one, torch.full((4, 3), torch.nan), ~zero)
    assert metrics.window["totals"].tolist() == [1, 1, 2]
    assert metrics.window["by_t"].sum() == 12
    metrics.reset()
    assert metrics.window["by_t"].sum() == metrics.window["totals"].sum() == 0
