"""Table: what it accepts, refuses, derives, prints and writes."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fastdiff import tables
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import COLUMNS, Table

SCHEDULE = NoiseSchedule.cosine(100)


def plain(**columns) -> Table:
    """Three rows with every column given or at its default."""
    given = {"t": [9, 5, 1], "sigma": [4.0, 1.0, 0.2], "px": 1, "pm": -0.5, "a": 0.3, "b": 0.7}
    return Table(**{"name": "plain", **given, **columns})


def test_columns_are_float64_of_one_length_and_in_order() -> None:
    table = plain(s=[0.1, 0.2, 0.0])
    assert len(table) == 3
    assert table.numpy().shape == (3, 15)
    assert table.numpy().dtype == np.float64
    for i, name in enumerate(COLUMNS):
        np.testing.assert_array_equal(table.numpy()[:, i], getattr(table, name))
    narrow = table.tensor()
    assert narrow.dtype == torch.float32 and narrow.is_contiguous()
    np.testing.assert_array_equal(narrow.numpy(), table.numpy().astype(np.float32))
    defaults = {"c_in": 1, "clip": math.inf, "w": 0, "q": 0, "c": 0, "n": 0, "l": 0, "d": 0, "e": 0}
    for name, value in defaults.items():
        np.testing.assert_array_equal(getattr(table, name), np.full(3, value))


@pytest.mark.parametrize(
    ("flag", "column", "value"),
    [
        ("guided", "w", -1.0),
        ("clipped", "clip", 1.0),
        ("history", "d", 0.5),
        ("history", "e", -1.0),
        ("noisy", "s", 0.1),
        ("learned_variance", "l", -0.3),
        ("classifier", "q", 2.0),
        ("direct", "n", 0.2),
    ],
)
def test_flags_come_from_any_row_of_their_column(flag: str, column: str, value: float) -> None:
    assert not getattr(plain(), flag)
    default = math.inf if column == "clip" else 0.0
    table = plain(**{column: [default, value, default]})
    flags = ("guided", "clipped", "history", "noisy", "learned_variance", "classifier", "direct")
    assert [name for name in flags if getattr(table, name)] == [flag]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"s": [0.1, math.nan, 0.0]}, r"s\[1\]=nan: must be finite"),
        ({"px": [1, 1, math.inf]}, r"px\[2\]=inf: must be finite"),
        ({"clip": [1.0, -1.0, 1.0]}, r"clip\[1\]=-1.0: must be positive, or inf"),
        ({"clip": 0.0}, r"clip\[0\]=0.0: must be positive"),
        ({"clip": -math.inf}, r"clip\[0\]=-inf"),
        ({"sigma": [math.nan, 1, 1]}, r"sigma\[0\]=nan"),
        ({"s": [0.1, 0.2]}, r"s: has shape \(2,\); must be a number or \[3\]"),
        ({"s": [[0.1, 0.2, 0.3]]}, r"s: has shape \(1, 3\)"),
        ({"t": [], "sigma": []}, "must be a number or"),
        ({"init": 0.0}, "init=0.0: must be finite and positive"),
        ({"init": math.inf}, "init=inf"),
    ],
)
def test_impossible_rows_are_refused_by_column_and_row(columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(**columns)


def test_a_table_cannot_be_changed() -> None:
    table = plain()
    with pytest.raises(ValueError, match="read-only"):
        table.a[0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.init = 2.0
    given = np.array([9.0, 5.0, 1.0])
    copied = plain(t=given)
    given[0] = -1
    assert copied.t[0] == 9


TABLES = [
    plain(clip=[1.0, math.inf, 0.3], init=80.0),
    tables.ddim(SCHEDULE, SCHEDULE.timesteps(7), eta=0.3, clip=1.0),
    tables.ddpm(SCHEDULE, SCHEDULE.timesteps(100), variance="learned_range"),
    tables.heun(SCHEDULE, SCHEDULE.timesteps(9), S_churn=2).with_guidance(0.1 + 0.2),
    tables.ddim(SCHEDULE.zero_terminal_snr(), SCHEDULE.timesteps(5, "trailing"), prediction="v"),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_json_round_trips_exactly(table: Table) -> None:
    text = json.dumps(table.to_json(), allow_nan=False)
    again = Table.from_json(json.loads(text))
    assert again == table
    assert hash(again) == hash(table)
    assert json.dumps(again.to_json()) == text


def test_tables_differ_by_any_number() -> None:
    assert plain() == plain()
    assert plain() != plain(a=np.nextafter(0.3, 1))
    assert plain() != plain(init=1.5)
    assert plain() != plain(name="other")
    assert plain() != "plain"


def test_json_that_is_not_a_table_is_refused() -> None:
    good = plain().to_json()

    def columns(**changed) -> dict:
        return {**good, "columns": {**good["columns"], **changed}}

    missing = columns()
    del missing["columns"]["px"]
    for data, message in [
        ([], "must be an object with exactly name, init and columns"),
        ({**good, "extra": 1}, "must be an object with exactly"),
        ({**good, "columns": []}, "columns: "),
        (missing, r"columns: \['px'\] unknown or missing"),
        (columns(pz=[1, 2, 3]), r"columns: \['pz'\] unknown or missing"),
        (columns(px=[1, 2]), "lengths differ.*'px': 2"),
        (columns(px=[1, math.nan, 3]), r"px\[1\]=nan: must be finite"),
        (columns(px=[1, None, 3]), r"px\[1\]=inf: must be finite"),
        (columns(px=[1, "two", 3]), "px: must be a list of numbers"),
        (columns(px=[1, [2], 3]), "px: must be a list of numbers"),
        (columns(px=[1, True, 3]), "px: must be a list of numbers"),
        (columns(px=1.0), "px: must be a list of numbers"),
        ({**good, "init": "one"}, "init='one': must be a number"),
        ({**good, "init": None}, "init=None: must be a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Table.from_json(data)


def test_repr_shows_what_is_not_default_and_cuts_the_middle() -> None:
    text = repr(plain(s=[0.1, 0.25, 0.0]))
    assert text.splitlines()[0] == "Table plain: 3 rows, init=1"
    assert text.splitlines()[1].split() == ["row", "sigma", "t", "px", "pm", "a", "b", "s"]
    assert text.splitlines()[3].split() == ["1", "1", "5", "1", "-0.5", "0.3", "0.7", "0.25"]
    long = repr(tables.ddim(SCHEDULE, SCHEDULE.timesteps(50))).splitlines()
    assert len(long) == 9
    assert [line.split()[0] for line in long[2:]] == ["0", "1", "2", "...", "47", "48", "49"]
    assert len({len(line) for line in long[1:]}) == 1


def test_guidance_weights() -> None:
    table = tables.ddim(SCHEDULE, SCHEDULE.timesteps(50))
    assert np.all(table.with_guidance(2.0).w == 2)
    assert np.all(table.with_guidance(2.0).with_guidance(0).w == 0)
    per_row = np.linspace(0, 1, 50)
    np.testing.assert_array_equal(table.with_guidance(per_row).w, per_row)
    inside = (table.sigma > 0.3) & (table.sigma <= 4)
    np.testing.assert_array_equal(table.with_guidance(2.0, (0.3, 4)).w, np.where(inside, 2.0, 0))
    np.testing.assert_array_equal(
        table.with_guidance(per_row, (0.3, math.inf)).w, np.where(table.sigma > 0.3, per_row, 0)
    )
    assert 0 < inside.sum() < 50
    changed = {
        name
        for name in COLUMNS
        if np.any(getattr(table.with_guidance(1), name) != getattr(table, name))
    }
    assert changed == {"w"}
    for w, interval, message in [
        (1.0, (4, 0.3), r"interval=\(4, 0.3\): must be \(lo, hi\)"),
        (1.0, (-1, 2), "interval="),
        ([1.0, 2.0], None, r"w: has shape \(2,\)"),
        (math.nan, None, r"w\[0\]=nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            table.with_guidance(w, interval)
