"""A model that is guided: it evaluates another on a doubled batch and combines the halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..rollout import Model, check_conditions, placement, unconditional
from .outputs import check_call, joined, parts


class Guided(nn.Module):
    """Classifier-free guidance as a model: m = (w + 1) m_c - w m_u (Ho & Salimans 2022, eq. 6).

    Any sampler runs it, with a table that does not guide, as it runs the model itself. For plain
    guidance `sample(model, ..., guidance=w)` does the same inside the step, and is faster; the
    variants that look at the data inherit from this one, and `DynamicThreshold` goes around it.

    Called as guided(x, t, cond), cond [B, ...]; returns float32, whatever the model's dtype, and
    the model's extra channels (a learned variance), those of the conditional half, as they are.

    Example:
        >>> guided = Guided(lambda x, t, c: x * c.view(-1, 1), w=2.0, null_cond=lambda c: 0 * c)
        >>> guided(torch.ones(2, 3), torch.zeros(2), torch.tensor([1.0, 2.0]))
        tensor([[3., 3., 3.],
                [6., 6., 6.]])

    Args:
        model: called as model(x, t, cond), once, on the doubled batch, conditional half first.
        w: the guidance weight; 0 is plain conditional, s = w + 1 is others' guidance scale.
        null_cond: null_cond(cond) is what stands for no condition; the model's own by default.

    Raises:
        ValueError: w is not finite; at the call, no cond, or nothing that stands for none.
    """

    model: Any
    input_dtype = torch.float32  # takes the state as it is: the model's dtype is the model's alone

    def __init__(
        self, model: Model, w: float, *, null_cond: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        errors.is_callable("model", model)
        if null_cond is not None:
            errors.is_callable("null_cond", null_cond)
        self.model, self.w, self.no_cond = model, errors.number("w", w), null_cond

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        check_call(x, t)
        m, m_u, v = parts(self.model(*self._doubled(x, t, cond)), x, guided=True)
        return joined(self.combine(x, t, m, m_u), v)

    def combine(self, x: Tensor, t: Tensor, m: Tensor, m_u: Tensor) -> Tensor:
        """The guided prediction, of the conditional and the unconditional one; all float32."""
        return m + self.w * (m - m_u)

    def extra_repr(self) -> str:
        return f"w={self.w}"

    @property
    def prediction(self) -> str | None:
        """What the model says that it predicts, as this one does then."""
        return getattr(self.model, "prediction", None)

    @property
    def prepare_rows(self) -> Callable[[Tensor, Tensor, Tensor], None]:
        """An optimized model's, which is told what calls will come; others have none."""
        prepare = self.model.prepare_rows

        def doubled(x: Tensor, t: Tensor, cond: Tensor | None = None) -> None:
            x, _, both = self._doubled(x, t[0], cond)
            prepare(x, torch.cat([t, t], 1), both)

        return doubled

    def _doubled(self, x: Tensor, t: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if cond is not None:
            errors.is_batch("cond", cond)
        check_conditions(len(x), cond=cond)
        given = None if cond is None or self.no_cond is None else self.no_cond(cond)
        uncond = unconditional(self.model, cond, given)
        assert cond is not None
        x = x.to(placement(self.model)[0])
        return torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, uncond])
