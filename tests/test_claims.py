"""The scripts that put the literature's claims to the test: their frame, and their page."""

import importlib
import json

import benches  # noqa: F401, which sets the path
import pytest
import torch
from helpers import needs_data

from bench.claims import claim, consistency, quality, strided
from bench.claims.claim import CLAIMS, DOCS, Claim, Points, document

FACTS = {"images": 3, "seeds": 1}


def test_points_are_measured_once_and_kept(tmp_path):
    path, calls = tmp_path / "results" / "x.json", []

    def measured():
        calls.append(1)
        return {"fd": 0.25}

    first = Points(path, FACTS).measure("a", measured)
    again = Points(path, FACTS).measure("a", measured)
    assert first == again and first["fd"] == 0.25 and first["seconds"] >= 0 and calls == [1]
    with pytest.raises(SystemExit, match=r"unfinished\.json: holds points of"):
        Points(path, {**FACTS, "images": 4})


def test_what_is_measured_anew_replaces_the_old_when_it_is_finished(tmp_path):
    path = tmp_path / "x.json"
    for images in (3, 4):
        points = Points(path, {**FACTS, "images": images})
        assert not points.found
        points.measure("a", lambda images=images: {"fd": images})
        assert not path.is_file() or json.loads(path.read_text())["points"]["a"]["fd"] == 3
        points.finish()
        points.finish()  # nothing is new
    assert json.loads(path.read_text())["points"]["a"]["fd"] == 4
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_stopped_script_goes_on(tmp_path, monkeypatch, capsys):
    done, broken = [], [True]

    def measure(points, images, seeds):
        for k in range(3):
            if k == 2 and broken.pop() is True:
                broken.append(False)
                raise KeyboardInterrupt
            points.measure(str(k), lambda k=k: done.append(k) or {"value": k})

    made = Claim("x", "A title", "What it says.", measure, lambda points: [f"{len(points)} points"])
    monkeypatch.setattr(claim, "CLAIMS", ())
    with pytest.raises(KeyboardInterrupt):
        made.main(["--images", "3", "--out", str(tmp_path)])
    assert made.main(["--images", "3", "--out", str(tmp_path)]) == 0 and done == [0, 1, 2]
    page = made.section(tmp_path)
    assert page[1] == "## A title" and "3 points" in page and "3 images of 5 seeds" in "".join(page)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_is_what_its_page_says(name):
    made = importlib.import_module(f"bench.claims.{name}").CLAIM
    assert made.name == name
    if section := made.section(DOCS):
        assert "\n".join(section) in (DOCS / "results.md").read_text()
        assert made.draw is None or (DOCS / "results" / f"{name}.png").is_file()


def test_the_page_is_the_claims(tmp_path):
    (tmp_path / "results").mkdir()
    for name in CLAIMS:
        if (path := DOCS / "results" / f"{name}.json").is_file():
            (tmp_path / "results" / path.name).write_text(path.read_text())
    document(tmp_path)
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()


@needs_data
def test_a_claim_measured_for_real(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(consistency, "STEPS", (5, 20))
    monkeypatch.setattr(consistency, "PUBLISHED", (0.1, 0.01))
    monkeypatch.setattr(consistency, "SHOWN", 3)
    monkeypatch.setattr(claim, "CLAIMS", ())
    how = ["--images", "6", "--out", str(tmp_path)]
    assert consistency.CLAIM.main(how) == 0
    points = json.loads((tmp_path / "results" / "consistency.json").read_text())["points"]
    few, many = points["5 steps"]["error"], points["20 steps"]["error"]
    assert 0 < many < few < 0.1
    assert (tmp_path / "results" / "consistency.png").stat().st_size > 1000


@needs_data
def test_quality_knows_real_images_from_noise():
    judge = quality.quality(100)
    noise = torch.randint(256, (100, 1, 32, 32), dtype=torch.uint8)
    assert judge.of(noise)["fd"] > 10
    real = quality.fashion_mnist(split="test", pad=2)
    order = quality.balanced(real.labels)[:100]
    good = judge.of(real.images[order])
    assert good["fd"] < 2 and good["accuracy"] > 0.8
    half = {0: real.images[order][:50], 1: real.images[order][50:], 2: noise[:50]}
    alike, apart = (judge.over(k, lambda seed, *_: half[seed]) for k in ([0, 1], [0, 2]))
    assert 0 < alike["fd_sd"] < 1 < apart["fd_sd"]
    assert alike["fd"] == judge.of(real.images[order])["fd"]


@needs_data
def test_a_stopped_point_draws_no_seed_again(tmp_path):
    path, drawn, stop = tmp_path / "x.json", [], [True]
    noise = {seed: torch.randint(256, (50, 1, 32, 32), dtype=torch.uint8) for seed in (3, 4)}

    def draw(seed, labels, count):
        assert len(labels) == count == 50
        if seed == 4 and stop.pop():
            stop.append(False)
            raise KeyboardInterrupt
        drawn.append(seed)
        return noise[seed]

    judge = quality.quality(100)
    with pytest.raises(KeyboardInterrupt):
        judge.measure(Points(path, FACTS), "of a/b", [3, 4], draw, steps=7)
    (kept,) = tmp_path.rglob("*.safetensors")
    images, _ = quality.read_tensors(kept, stamped=True)
    quality.write_tensors(kept, images, {"seconds": "60.0"})
    points = Points(path, FACTS)
    judge.measure(points, "of a/b", [3, 4], draw, steps=7)
    found = points.found["of a/b"]
    assert drawn == [3, 4] and found["steps"] == 7 and 60 < found["seconds"] < 120
    expected = judge.over([3, 4], lambda seed, *_: noise[seed])
    assert {key: found[key] for key in expected} == expected
    assert not list(tmp_path.rglob("*.safetensors"))
    judge.measure(points, "of a/b", [3, 4], draw, steps=7)
    points.finish()
    assert drawn == [3, 4] and [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_what_lies_within_two_errors_is_undecided():
    def kinds(**distances):
        return {name: {10: {"fd": fd, "fd_sd": 0.3}} for name, fd in distances.items()}

    for fd, standing, said in (
        (1.0, "holds", "below"),
        (2.5, "is und", "above"),
        (4, "does", "ab"),
    ):
        gap, rival = strided.apart(kinds(a=fd, b=2.0, c=9.0), 10, "a", min)
        assert rival == "b" and standing in gap.standing and f"0.4 {said}" in gap.said
    gap, rival = strided.apart(kinds(a=8.0, b=2.0, c=3.0), 10, "a", max)
    assert rival == "c" and gap.said == "5 ± 0.4 above" and "holds" in gap.standing


def test_the_jackknife_of_a_mean_is_its_standard_error():
    sets = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    without = [(sets.sum() - part.sum()).item() / 160 for part in sets]
    _, error = claim.jackknifed(sets.mean().item(), without)
    assert error == pytest.approx(sets.mean(1).std().item() / 5**0.5)
    assert claim.jackknifed(1.5, []) == (1.5, 0.0)
