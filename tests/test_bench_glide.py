"""The comparison of guidances: made small, and again from the file; and what its verdict counts."""

import dataclasses
import json

import benches  # noqa: F401, which sets the path
import pytest
import torch
from helpers import needs_data

from bench.claims import glide


@needs_data
def test_both_guidances_are_measured_once(tmp_path, monkeypatch):
    short = {"steps": 1, "batch_size": 8, "bf16": False}
    monkeypatch.setattr(glide, "TRAIN", dataclasses.replace(glide.TRAIN, **short))
    monkeypatch.setattr(glide, "TRAIN_CLIP", dataclasses.replace(glide.TRAIN_CLIP, **short))
    weights = dict.fromkeys(glide.WEIGHTS, (2.0,))
    for name, value in {"RUNS": tmp_path, "WEIGHTS": weights, "STEPS": 2, "BATCH": 15}.items():
        monkeypatch.setattr(glide, name, value)
    words = ["--images", "20", "--seeds", "2", "--out", str(tmp_path)]
    assert glide.CLAIM.main(words) == 0
    path = tmp_path / "results" / "glide.json"
    points = json.loads(path.read_text())["points"]
    shown = {f"picture, {kind}" for kind in glide.PICTURED}
    assert set(points) == {"real test images", "none", "classifier-free 2", "CLIP 2"} | shown
    real = points["real test images"]
    assert real["brightness"] == real["extent"] == 1 and real["all"] == real["accuracy"] > 0.8
    assert len({points[name]["fd"] for name in points.keys() - shown}) == 4  # no two alike
    page = (tmp_path / "results.md").read_text()
    assert "| classifier-free | 2 |" in page and "| CLIP | 2 |" in page
    before = path.read_bytes()
    trained = tmp_path / "glide" / "clip.safetensors"
    stamp = trained.stat().st_mtime_ns
    assert glide.CLAIM.main(words) == 0  # nothing is left to train or to draw
    assert path.read_bytes() == before and trained.stat().st_mtime_ns == stamp


@needs_data
def test_what_images_do_not_show_is_no_agreement():
    judge = glide.Judge(20)
    darker = torch.where(judge.images > 60, 60, judge.images)
    point = judge.of(darker)
    dark = judge.thirds[:, 0] == 0
    assert point["brightness"] == pytest.approx(float(dark.double().mean()), abs=0.051)
    assert point["extent"] == 1


def test_a_point_is_beaten_by_one_that_is_better_in_both():
    rows = [{"fd": fd, "all": agree} for fd, agree in ((1.0, 0.5), (2.0, 0.7))]
    assert glide.beaten(rows, [{"fd": 0.9, "all": 0.6}]) == 1
    assert glide.beaten(rows, [{"fd": 0.9, "all": 0.8}]) == 2
    assert glide.beaten(rows, [{"fd": 1.0, "all": 0.5}]) == 0
