"""Whether a network is still the one that was read."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_version = attrgetter("_version")


class Watch:
    """Notices, in some 30 microseconds, that a network has changed since this was made.

    That is: another module, parameter, buffer or attention processor (diffusers'); a weight moved,
    cast, or changed by an operation on it or, as optimizers and averages do, through its `.data`,
    which shows in its first number; hooks of a module's call. Not: another plain attribute of a
    module.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        self._members: list[dict[str, Any]] = [m._modules for m in modules]
        for module in modules:
            self._members += filter(None, (module._parameters, module._buffers))
        self._calls = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks = list(chain.from_iterable(self._calls))
        self._parts = self._now()
        self._attending = [m.__dict__ for m in modules if "processor" in m.__dict__]
        self._processors = [own["processor"] for own in self._attending]
        weights = [part for part in self._parts if isinstance(part, Tensor)]
        self._counted = [w for w in weights if not w.is_inference()]
        self._weights, self._first = weights, [_first(w) for w in weights if w.numel()]
        self._values = self._values_now()

    def changed(self) -> bool:
        parts = self._now()
        return not (
            len(parts) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and [own.get("processor") for own in self._attending] == self._processors
            and list(chain.from_iterable(self._calls)) == self._hooks
            and self._values_now() == self._values
        )

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._members)))

    def _values_now(self) -> tuple[Any, ...]:
        return (
            sum(map(_version, self._counted)),
            list(map(Tensor.data_ptr, self._weights)),
            [first.item() for first in self._first],
        )


def _first(weight: Tensor) -> NDArray[np.int64]:
    """The bits of a weight's first number, in its own memory."""
    bits = getattr(torch, f"int{8 * weight.element_size()}")
    return weight.detach().as_strided((1,), (1,)).view(bits).numpy()
