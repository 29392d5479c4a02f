"""Networks and their parts made faster in place: the classes that `patch` gives them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .engine.capture import EXPORTING
from .engine.engine import Engine
from .engine.optimize import optimize
from .models.conv import fused, plain

OPTIONS = "_fastdiff"  # of patch, in a patched object's __dict__; a network's engine is there too
HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # that a patched network's own call makes
SIMPLE = int | float | str | None


class Fast:
    """Marks the classes that patched networks and parts have; the last base is what they were."""


class FusedConv2d(Fast, nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1 that trains by Winograd's minimal filtering."""

    def forward(self, x: Tensor) -> Tensor:
        return (plain if torch.compiler.is_compiling() else fused)(self, x)


def faster_parts(network: nn.Module) -> Iterator[tuple[Any, type]]:
    """The parts of a network that train faster as another class, and that class."""
    classes: dict[type, type] = {}
    if "diffusers" in sys.modules:
        from .integrations.diffusers.blocks import FastAttnProcessor, FastResnetBlock2D

        classes = {cls.__bases__[-1]: cls for cls in (FastAttnProcessor, FastResnetBlock2D)}
    for part in _parts(network):
        if type(part) is nn.Conv2d and _is_fusable(part):
            yield part, FusedConv2d
        elif type(part) in classes:
            yield part, classes[type(part)]


def fast_parts(network: nn.Module) -> list[Any]:
    """A patched network and those parts of it."""
    return [part for part in _parts(network) if isinstance(part, Fast)]


def _parts(network: nn.Module) -> list[Any]:
    """Its modules, and what diffusers' attention modules share: their processors."""
    modules = list(network.modules())
    processors = {id(p): p for m in modules if (p := getattr(m, "processor", None)) is not None}
    return [*modules, *processors.values()]


def _is_fusable(conv: nn.Conv2d) -> bool:
    how = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return how == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.padding_mode == "zeros"


@functools.cache
def fast_class(base: Any) -> Any:
    """A subclass that says it is `base`; without gradients a network (x, t) runs in the engine."""
    tells_time = len(inspect.signature(base.forward).parameters) > 2  # self, x, t

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            not tells_time
            or self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or _hooked(self)
        ):
            return base.forward(self, *args, **kwargs)
        engine = _engine(self, base)
        call = engine if isinstance(engine, Engine) else functools.partial(_cast, engine)
        return call(*args, **kwargs)

    def reduce(self: Any, protocol: int) -> Any:
        return _blank, (base,), {**self.__dict__, OPTIONS: _options(self)}

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
    """The network's engine, for the device, dtype and settings it has now."""
    state, first = network.__dict__[OPTIONS], next(network.parameters())
    with EXPORTING:
        now = first.device, first.dtype, _settings(network)
        if state.get("now") != now:
            as_it_was = base.__new__(base)  # the same modules and weights, with its class's call
            as_it_was.__dict__.update(network.__dict__)
            as_it_was.__dict__.update({name: type(network.__dict__[name])() for name in HOOKS})
            del as_it_was.__dict__[OPTIONS]
            state["engine"], state["now"] = optimize(as_it_was, **_options(network)), now
            state["weights"] = _weights(network)
        engine = state["engine"]
        # a GPU's is a copy, compiled, whose weights are to be those of the network
        if not isinstance(engine, Engine) and state["weights"] != (weights := _weights(network)):
            engine.load_state_dict(network.state_dict())
            state["weights"] = weights
        return engine


def _weights(network: Any) -> list[tuple[int, int]]:
    """Where a network's weights lie and how often they have changed: nothing is read from them."""
    tensors = [*network.parameters(), *network.buffers()]
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _cast(engine: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call in the engine's dtype, whose results are in that of the image, which comes first."""
    inside = next(engine.parameters()).dtype
    given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    outside = next((v.dtype for v in given if v.is_floating_point()), inside)

    def to(dtype: torch.dtype, tree: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)

    args, kwargs = to(inside, (args, kwargs))
    return to(outside, engine(*args, **kwargs))


def _hooked(network: Any) -> bool:
    """Whether a part of the network has hooks of its call, which an engine does not make."""
    parts = network.modules()
    next(parts)  # its own are run around its call
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _settings(network: Any) -> list[Any]:
    """The numbers, names and flags of its parts, but for torch's own, which hardly change them."""
    found: list[Any] = []
    for part in _parts(network):
        if type(part).__module__.startswith("torch."):
            continue
        for name, value in vars(part).items():
            if name == "_internal_dict":  # diffusers' configuration
                found.append(dict(value))
            if isinstance(value, list | tuple):
                value = [v for v in value if isinstance(v, SIMPLE)]
            if isinstance(value, SIMPLE | list):
                found.append((name, value))
    return found
