"""FD against steps: the points, the table and the picture, made small; and again from the file."""

import json
from pathlib import Path

import benches  # noqa: F401, which sets the path
import pytest

from bench import fewer_steps
from fastdiff import load, save
from fastdiff.models.distilled import Distilled

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_every_sampler_and_student_is_measured_once(tmp_path, capsys):
    model = load("fashion-mnist")
    for n in fewer_steps.STUDENTS:
        made = Distilled(tuple(model.schedule.timesteps(n, "trailing").tolist()), 0.5)
        save(tmp_path / str(n), model, model.schedule, "v", model.class_names, distilled=made)
    words = ["--images", "40", "--batch", "20", "--students", str(tmp_path), "--out", str(tmp_path)]
    assert fewer_steps.main([*words, "--steps", "2"]) == 0
    record = json.loads((tmp_path / "steps.json").read_text())
    found = {(p["method"], p["steps"]): p for p in record["points"]}
    samplers = {(name, 2) for name in fewer_steps.SAMPLERS}
    students = {(fewer_steps.STUDENT, n) for n in fewer_steps.STUDENTS}
    assert set(found) == samplers | students | {(fewer_steps.REAL, 0)}
    assert record["facts"]["guidance"] == 0.5
    # two guided steps are four evaluations, Heun's (whose last step is Euler's) six
    assert [found[name, 2]["evaluations"] for name in fewer_steps.SAMPLERS] == [4, 4, 4, 4, 6]
    assert found[fewer_steps.STUDENT, 4]["evaluations"] == 4
    # the model as it is, in one step: a blur
    assert 2 * found[fewer_steps.REAL, 0]["fd"] < found[fewer_steps.STUDENT, 1]["fd"]
    text = (tmp_path / "steps.md").read_text()
    assert "| 2 | " in text and "9.12" in text and (tmp_path / "steps.png").stat().st_size > 10_000
    before = (tmp_path / "steps.json").read_bytes()
    assert fewer_steps.main([*words, "--steps", "2"]) == 0  # nothing is left to draw
    assert (tmp_path / "steps.json").read_bytes() == before
    with pytest.raises(SystemExit, match="holds points of"):
        fewer_steps.main([*words, "--guidance", "1"])
