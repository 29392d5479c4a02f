"""A network made faster in place: the class that `patch` gives it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .engine.optimize import optimize

OPTIONS = "_fastdiff"  # of patch, in the network's __dict__; with the engine once it is made


class Fast:
    """Marks the classes that `fast_class` makes."""


@functools.cache
def fast_class(base: Any) -> Any:
    """A subclass that says it is `base`, and runs in the engine where no gradient is recorded."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        return _engine(self, base)(*args, **kwargs)

    def reduce(self: Any, protocol: int) -> Any:
        state = {**self.__dict__, OPTIONS: _options(self)}
        return _blank, (base,), state

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
        "__reduce_ex__": reduce,
    }
    return type(base.__name__, (Fast, base), members)


def _blank(base: Any) -> Any:
    cls = fast_class(base)
    return cls.__new__(cls)


def _options(network: Any) -> dict[str, Any]:
    return {name: network.__dict__[OPTIONS][name] for name in ("dtype", "memory")}


def _engine(network: Any, base: Any) -> Any:
    """The network's engine, for the device it is on now."""
    state = network.__dict__[OPTIONS]
    device = next(network.parameters()).device
    if state.get("device") != device:
        plain = base.__new__(base)  # the same modules and weights, with the call as it was
        plain.__dict__.update(network.__dict__)
        del plain.__dict__[OPTIONS]
        state["engine"], state["device"] = optimize(plain, **_options(network)), device
    return state["engine"]
