"""Do contenders compute the same? A check takes a result and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Check = Callable[[Any], str | None]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value
STANDARD_ERRORS = 6.0  # that fresh noise may be off in mean and in spread


def equal(true: Callable[[], Tensor], dtype: torch.dtype) -> Check:
    """The result is `true()`, as well as operands of `dtype` allow."""

    def check(result: Tensor) -> str | None:
        wanted = true()
        error = float((result - wanted).abs().max() / wanted.abs().max())
        if error <= TOLERANCE[dtype]:
            return None
        return f"relative error {error:.1e}, allowed {TOLERANCE[dtype]:.0e}"

    return check


def normal(law: Callable[[], tuple[Any, Any]]) -> Check:
    """The result is normal, with the mean and deviation that `law()` returns."""

    def check(result: Tensor) -> str | None:
        mean, deviation = law()
        z = (result.double() - mean) / deviation
        off = float(z.mean().abs()) * z.numel() ** 0.5
        wide = float((z.std() - 1).abs()) * (2 * z.numel()) ** 0.5
        if max(off, wide) <= STANDARD_ERRORS:
            return None
        return f"its noise is off by {off:.1f} standard errors in mean, {wide:.1f} in spread"

    return check


def noised(x0: Tensor, alpha: Tensor, sigma: Tensor) -> Check:
    """The result is (x_t, v): x_t = alpha x0 + sigma z and v = alpha z - sigma x0, z normal."""

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        x_t, v = (r.double() for r in result)
        a, s = alpha.double(), sigma.double()
        clean, z = a * x_t - s * v, s * x_t + a * v
        return equal(x0.double, torch.float32)(clean) or normal(lambda: (0.0, 1.0))(z)

    return check
