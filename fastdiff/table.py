"""Table: a sampler as data, one row per model evaluation.

A row turns the state x, the model's output and the register h into the next state:

    m  = m_u + (w + 1) (m_c - m_u)                    classifier-free guidance
    D  = clamp(px x + pm m, -clip, +clip) + q r^2 g   predicted x0; r = exp(l v)
    x' = a x + b D + c h + n m + s r z                next state, z ~ N(0, I)
    h' = d x + e D                                    the register; it starts at zero

The model is called with (c_in x, t). m_c and m_u are its outputs with and without the condition,
g a classifier's gradient at x, v its extra channels (a learned variance). `fastdiff.ops.step`
executes a row; `fastdiff.tables` builds tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from . import errors

Array = NDArray[np.float64]
Column = Any  # a number or [R] when given; a float64 array [R] once the table is made

COLUMNS = ("t", "c_in", "w", "px", "pm", "clip", "q", "a", "b", "c", "n", "s", "l", "d", "e")
_INFINITE = ("clip", "sigma")  # columns in which +inf has a meaning
_LARGEST = float(np.finfo(np.float32).max)  # a row is run in float32


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """One float64 [R] array a column; scalars are broadcast to R. Immutable.

    name   what it is, for people: "ddim(eta=0.5)"
    init   the first state is init times a standard normal
    sigma  noise level sigma_t / alpha_t of each row (inf at alpha = 0), for guidance intervals
           and for printing; no arithmetic of a row uses it

    Raises ValueError, naming column and row, for unequal lengths, NaN, an infinite entry (clip
    and sigma may be +inf), clip <= 0 or init <= 0.
    """

    name: str
    t: Column
    sigma: Column
    px: Column
    pm: Column
    a: Column
    b: Column
    init: float = 1.0
    c_in: Column = 1.0
    w: Column = 0.0
    clip: Column = math.inf
    q: Column = 0.0
    c: Column = 0.0
    n: Column = 0.0
    s: Column = 0.0
    l: Column = 0.0  # noqa: E741 - the row formula's symbol
    d: Column = 0.0
    e: Column = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: must be a str, got {type(self.name).__name__}")
        columns = {
            name: errors.numbers(name, getattr(self, name)).astype(np.float64) for name in ARRAYS
        }
        rows = max(array.size for array in columns.values())
        for name, array in columns.items():
            if array.ndim > 1 or (array.ndim == 1 and array.size != rows) or rows == 0:
                raise ValueError(
                    f"{name}: has shape {array.shape}; must be a number or [{rows}], one a row"
                )
            array = np.broadcast_to(array, rows) + 0.0  # a copy, and -0 becomes 0
            good = np.abs(array) <= _LARGEST
            good |= (array == np.inf) & (name in _INFINITE)
            good &= (array > 0) | (name != "clip")
            if not good.all():
                row = int((~good).argmax())
                wanted = "positive, or inf for no clip" if name == "clip" else "finite, in float32"
                raise ValueError(f"{name}[{row}]={array[row]}: must be {wanted}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if not 0 < errors.number("init", self.init) <= _LARGEST:
            raise ValueError(f"init={self.init}: must be finite and positive, in float32")
        object.__setattr__(self, "init", float(self.init))

    def __len__(self) -> int:
        return self.t.size

    def numpy(self) -> Array:
        """float64 [R, 15], columns in the order of COLUMNS."""
        return np.stack([getattr(self, name) for name in COLUMNS], axis=1)

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 [R, 15], contiguous, on a device: what `ops.step` reads."""
        return torch.from_numpy(self.numpy().astype(np.float32)).to(device, non_blocking=True)

    # Which operands the rows use at all; each decides what a kernel is compiled to read.

    @property
    def guided(self) -> bool:
        return bool(np.any(self.w))

    @property
    def clipped(self) -> bool:
        return bool(np.isfinite(self.clip).any())

    @property
    def history(self) -> bool:
        return bool(np.any(self.d) or np.any(self.e))

    @property
    def noisy(self) -> bool:
        return bool(np.any(self.s))

    @property
    def learned_variance(self) -> bool:
        return bool(np.any(self.l))

    @property
    def classifier(self) -> bool:
        return bool(np.any(self.q))

    @property
    def direct(self) -> bool:
        return bool(np.any(self.n))

    def with_guidance(self, w: ArrayLike, interval: tuple[float, float] | None = None) -> Table:
        """The same table with guidance weight w: a number, or one a row; 0 is plain conditional.

        interval = (lo, hi) guides only rows with lo < sigma <= hi and gives the others w = 0,
        where sigma is the noise level sigma_t / alpha_t (Kynkaanniemi et al. 2024, "Applying
        Guidance in a Limited Interval"). hi may be inf.
        """
        w = errors.numbers("w", w)
        if w.shape not in ((), self.t.shape):
            raise ValueError(
                f"w: has shape {w.shape}; must be a number or [{len(self)}], one a row"
            )
        table = replace(self, w=w)
        if interval is None:
            return table
        return replace(self, w=np.where(self._inside(interval), table.w, 0.0))

    def with_classifier_in(self, interval: tuple[float, float]) -> Table:
        """The same table, whose classifier shifts only rows with lo < sigma <= hi."""
        return replace(self, q=np.where(self._inside(interval), self.q, 0.0))

    def _inside(self, interval: tuple[float, float]) -> NDArray[np.bool_]:
        try:
            low, high = interval
        except (TypeError, ValueError):
            raise TypeError(f"interval={interval!r}: must be a pair (lo, hi)") from None
        low = errors.number("interval's lo", low)
        high = errors.number("interval's hi", high, infinite=True)
        if not 0 <= low < high:
            raise ValueError(f"interval={interval}: must be (lo, hi) with 0 <= lo < hi")
        return (self.sigma > low) & (self.sigma <= high)

    def take(self, rows: ArrayLike) -> Table:
        """The table of these rows, in this order; a row may come more than once."""
        index = errors.numbers("rows", rows, "iu")
        if index.ndim != 1 or not index.size or index.min() < 0 or index.max() >= len(self):
            raise ValueError(f"rows={rows!r}: must be a list of numbers in [0, {len(self)})")
        return replace(self, **{name: getattr(self, name)[index] for name in ARRAYS})

    def to_json(self) -> dict[str, Any]:
        """JSON types only; infinity is null. `from_json` gives back an equal table."""
        columns = {
            name: [None if value == np.inf else value for value in getattr(self, name).tolist()]
            for name in ARRAYS
        }
        return {"name": self.name, "init": self.init, "columns": columns}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        """The table that `to_json` wrote. Raises ValueError that says what is wrong with it."""
        if not isinstance(data, Mapping) or set(data) != {"name", "init", "columns"}:
            raise ValueError("table: must be an object with exactly name, init and columns")
        columns = data["columns"]
        if not isinstance(columns, Mapping) or set(columns) != set(ARRAYS):
            given = set(columns) if isinstance(columns, Mapping) else set()
            odd = sorted(given ^ set(ARRAYS))
            raise ValueError(f"columns: {odd} unknown or missing; must be exactly {list(ARRAYS)}")
        for name, values in columns.items():
            if not isinstance(values, list) or any(not _storable(v) for v in values):
                raise ValueError(f"{name}: must be a list of numbers, with null for infinity")
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns: lengths differ: {lengths}")
        if data["init"] is None or not _storable(data["init"]):
            raise ValueError(f"init={data['init']!r}: must be a number")
        arrays = {
            name: np.array([np.inf if v is None else v for v in values], np.float64)
            for name, values in columns.items()
        }
        return cls(name=str(data["name"]), init=data["init"], **arrays)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table):
            return NotImplemented
        return (self.name, self.init) == (other.name, other.init) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ARRAYS
        )

    def __hash__(self) -> int:
        return hash((self.name, self.init, self.numpy().tobytes()))

    def __repr__(self) -> str:
        """Name, size and the columns that are not at their default; long tables are cut."""
        shown = [
            n for n in ARRAYS if n not in _DEFAULTS or np.any(getattr(self, n) != _DEFAULTS[n])
        ]
        rows = (
            range(len(self))
            if len(self) <= 8
            else [0, 1, 2, None, *range(len(self) - 3, len(self))]
        )
        cells = [["row", *shown]]
        for row in rows:
            values = (
                ["..."] * len(shown)
                if row is None
                else [f"{getattr(self, name)[row]:.6g}" for name in shown]
            )
            cells.append(["..." if row is None else str(row), *values])
        widths = [max(len(line[i]) for line in cells) for i in range(len(shown) + 1)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        ]
        return "\n".join([f"Table {self.name}: {len(self)} rows, init={self.init:g}", *lines])


def _storable(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


ARRAYS = ("sigma", *COLUMNS)
_DEFAULTS = {name: getattr(Table, name) for name in COLUMNS if hasattr(Table, name)}
