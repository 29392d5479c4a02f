"""Generated input to schedules and tables: right, or a refusal that names the argument."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from generated import (
    SCHEDULE,
    anything,
    changed,
    counts,
    generated,
    junk,
    names,
    numbers,
    refused_clearly,
    tensors,
)
from hypothesis import given

from fastdiff import NoiseSchedule, Table, ops, tables
from fastdiff.table import COLUMNS

fractions = st.floats(0, 1) | anything
levels = st.floats(1e-3, 100) | anything
sizes = st.integers(1, 70) | counts | junk
CONSTRUCTORS = {
    "linear": ({"T": 40}, {"T": sizes}),
    "cosine": ({"T": 40}, {"T": sizes}),
    "scaled_linear": (
        {"T": 40},
        {"T": sizes, "beta_start": fractions, "beta_end": fractions},
    ),
    "logsnr_cosine": ({"T": 40}, {"T": sizes, "logsnr_max": st.floats(1, 30) | anything}),
    "geometric": (
        {"sigma_min": 0.01, "sigma_max": 50.0, "n": 9},
        {"sigma_min": levels, "sigma_max": levels, "n": sizes},
    ),
    "karras": (
        {},
        {"sigma_min": levels, "sigma_max": levels, "n": sizes, "rho": st.floats(1, 9) | anything},
    ),
}


def published(name, T=1000, beta_start=0.00085, beta_end=0.012, logsnr_max=20.0, **range_of):
    """The levels sigma / alpha as the papers have them, one by one."""
    if name in ("linear", "scaled_linear"):
        ends = (0.1 / T, 20 / T) if name == "linear" else (beta_start, beta_end)
        power = 1 if name == "linear" else 2
        low, high = (end ** (1 / power) for end in ends)
        betas = [(low + (high - low) * t / max(1, T - 1)) ** power for t in range(T)]
        kept = np.cumprod([1 - beta for beta in betas])
        return np.sqrt((1 - kept) / kept)
    if name == "cosine":
        kept = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        kept = np.cumprod([max(b / a, 0.001) for a, b in itertools.pairwise(kept)])
        return np.sqrt((1 - kept) / kept)
    if name == "logsnr_cosine":
        b = math.atan(math.exp(-logsnr_max / 2))
        a = math.atan(math.exp(logsnr_max / 2)) - b
        return np.array([math.tan(a * (t + 1) / T + b) for t in range(T)])
    low, high = range_of.get("sigma_min", 0.002), range_of.get("sigma_max", 80.0)
    n, rho = range_of.get("n", 18), range_of.get("rho", 7.0)
    if name == "geometric":
        return np.array([low * (high / low) ** (t / (n - 1)) for t in range(n)])
    low, high = low ** (1 / rho), high ** (1 / rho)
    return np.array([(low + (high - low) * t / (n - 1)) ** rho for t in range(n)])


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_schedules(name):
    usual, odd = CONSTRUCTORS[name]

    @generated
    @given(changed(**odd))
    def tried(changes):
        given = {**usual, **changes}
        said = *changes, "level"  # that two are the same, of what lies too near
        schedule = refused_clearly(lambda: getattr(NoiseSchedule, name)(**given), *said)
        if schedule is None:
            return
        assert NoiseSchedule.from_json(schedule.to_json()) == schedule and repr(schedule)
        given = {k: v if k in ("T", "n") else float(v) for k, v in given.items()}
        with np.errstate(over="ignore", divide="ignore"):
            wanted, found = published(name, **given), schedule.sigma / schedule.alpha
        assert len(wanted) == len(schedule)
        seen = np.isfinite(wanted) & (wanted < 1e6)
        rough = 1e-6 * wanted + 1e-14 / wanted  # of 1 - alphabar there is little left near the data
        assert (np.abs(found - wanted)[seen] <= rough[seen]).all()
        if len(schedule) > 1 and schedule.variance_preserving:
            ended = schedule.zero_terminal_snr()
            assert ended.alpha[-1] == 0 and np.isclose(ended.alpha[0], schedule.alpha[0])

    tried()


timesteps = (
    st.lists(st.integers(0, 49), min_size=1, max_size=4, unique=True).map(
        lambda t: sorted(t, reverse=True)
    )
    | st.lists(st.integers(-2, 60), max_size=4)
    | anything
)
shared = {
    "schedule": junk,
    "timesteps": timesteps,
    "prediction": names | junk,
    "clip": st.floats(0.1, 3) | anything,
}
further = {
    "ddim": {"next_timesteps": timesteps, "eta": fractions, "classifier_scale": anything},
    "ddim_inverse": {},
    "ddpm": {
        "next_timesteps": timesteps,
        "variance": st.sampled_from(["small", "large", "learned_range", "learned"]) | junk,
        "classifier_scale": anything,
        "floor": fractions,
    },
    "dpmpp_2m": {
        "eta": fractions,
        "solver_type": st.sampled_from(["midpoint", "heun", "euler"]) | junk,
    },
    "heun": dict.fromkeys(("S_churn", "S_tmin", "S_tmax", "S_noise"), levels),
    "langevin": {"inner": st.integers(1, 9) | anything, "step_size": st.floats(0, 1) | anything},
}


@pytest.mark.filterwarnings("ignore:step_size")
@pytest.mark.parametrize("solver", further)
def test_builders(solver):
    @generated
    @given(changed(**shared, **further[solver]))
    def tried(changes):
        given = {"schedule": SCHEDULE, "timesteps": [40, 20, 0], **changes}
        # what float32 does not hold is named by the column that would be infinite
        said = *changes, *COLUMNS, "init"
        table = refused_clearly(lambda: getattr(tables, solver)(**given), *said)
        if table is None:
            return
        assert table.tensor().isfinite()[:, 7:].all()
        if len(table) > 10_000:  # as many rows of Langevin's as one asks for
            return
        assert Table.from_json(table.to_json()) == table
        if solver in ("ddim", "dpmpp_2m", "heun") and given.get("next_timesteps") is None:
            # at x = alpha x0 + sigma z, told the truth, a deterministic row keeps to the line
            t = np.asarray(given["timesteps"])[0]
            alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
            if given.get("eta") or given.get("S_churn"):
                return
            to = np.append(np.asarray(given["timesteps"]), -1)[1]
            ahead = (SCHEDULE.alpha[to], SCHEDULE.sigma[to]) if to >= 0 else (1.0, 0.0)
            x0, z = 0.25, -1.5
            x, wanted = alpha * x0 + sigma * z, ahead[0] * x0 + ahead[1] * z
            if solver == "heun":
                x, wanted = x / alpha, wanted / ahead[0]
            found = table.a[0] * x + table.b[0] * x0
            if solver == "heun" and len(table) > 1:  # its second row, told the truth as well
                h = table.d[0] * x + table.e[0] * x0
                found = table.a[1] * found + table.b[1] * x0 + table.c[1] * h
            assert math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-9)

    tried()


USUAL = tables.ddim(SCHEDULE, [40, 20, 0], eta=0.5, prediction="v")
column = st.lists(st.floats(), max_size=4) | anything | tensors()


@generated
@given(changed(name=junk, init=anything, **dict.fromkeys(("sigma", *COLUMNS), column)))
def test_tables_of_columns(changes):
    given = {name: getattr(USUAL, name) for name in ("name", "init", "sigma", *COLUMNS)}
    shapes = [np.shape(given[name]) for name in COLUMNS if name not in changes]
    table = refused_clearly(lambda: Table(**{**given, **changes}), *given)
    if table is not None:
        assert len(table) == 3 and shapes
        for name, value in changes.items():
            if name != "name":
                found = getattr(table, name)
                assert np.array_equal(found, np.broadcast_to(np.float64(value), np.shape(found)))
        assert repr(table) and table.tensor().shape == (3, len(COLUMNS))


pairs = st.tuples(st.floats(), st.floats()) | st.lists(anything, max_size=3) | anything


@generated
@given(st.lists(st.floats(width=32), max_size=4) | anything, pairs)
def test_guidance_of_tables(w, interval):
    table = refused_clearly(lambda: USUAL.with_guidance(w), "w")
    if table is not None:
        assert np.array_equal(table.w, np.broadcast_to(np.asarray(w, np.float64), 3))
    table = refused_clearly(lambda: USUAL.with_guidance(2.0, interval), "interval")
    if table is not None and interval is not None:
        low, high = interval
        assert [bool(v) for v in table.w] == [low < s <= high for s in USUAL.sigma]
    shifted = tables.ddim(SCHEDULE, [40, 20, 0], classifier_scale=1.0)
    table = refused_clearly(lambda: shifted.with_classifier_in(interval), "interval")
    assert table is None or np.isin(table.q, (0, *shifted.q)).all()


@generated
@given(st.lists(st.integers(-2, 4), max_size=5) | st.lists(anything, max_size=2) | anything)
def test_rows_of_tables(rows):
    table = refused_clearly(lambda: USUAL.take(rows), "rows")
    if table is not None:
        assert all(0 <= row < 3 for row in rows)
        assert table.t.tolist() == [[40, 20, 0][row] for row in rows]


@generated
@given(changed(alpha=column, sigma=column, recipe=junk))
def test_schedules_of_levels(changes):
    given = {"alpha": [0.9, 0.1], "sigma": [0.1, 0.9], "recipe": {"name": "mine"}, **changes}
    schedule = refused_clearly(lambda: NoiseSchedule(**given), *changes, "sigma", "level")
    if schedule is not None:
        assert (np.diff(schedule.sigma / np.maximum(schedule.alpha, 1e-300)) > 0).all()
        assert isinstance(repr(schedule), str) and len(schedule.timesteps(1)) == 1
        if (schedule.alpha > 0).all():
            x0 = torch.ones(len(schedule), 1)
            t = torch.arange(len(schedule))
            x_t, _ = ops.noising(x0, t, schedule, noise=torch.zeros_like(x0))
            assert torch.equal(x_t[:, 0], torch.tensor(schedule.alpha, dtype=torch.float32))


@generated
@given(changed(steps=counts | anything, spacing=numbers | junk, offset=counts | anything))
def test_timesteps_of_odd_things(changes):
    given = {"steps": 5, **changes}
    found = refused_clearly(lambda: SCHEDULE.timesteps(**given), *given)
    if found is not None:
        assert found.dtype == np.int64 and len(found) == (given["steps"] or len(found))
