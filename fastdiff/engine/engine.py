"""The inference engine: a U-Net with its own call, run by the program made for its inputs."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .arena import pages
from .capture import EXPORTING, capture
from .fuse import fuse
from .program import Program
from .report import Report
from .simplify import simplify
from .sites import Weights
from .tune import tune
from .watch import Watch


def _hashed() -> bool:
    """Whether the structure of arguments has a hash; in torch 2.6 it has none."""
    try:
        hash(pytree.tree_flatten(((0,), {}))[1])
    except TypeError:
        return False
    return True


HASHED = _hashed()


class Engine(nn.Module):
    """A network for inference on the CPU; made by `fastdiff.optimize`.

    Called like the network, it returns the same. It has no parameters of its own and reads its
    other attributes (config, schedule, ...) from the network. A new shape of inputs is traced,
    and its layers measured, at its first call; a change of the network's modules or weights is
    noticed at the next. Several threads may call it: they take turns.

    Attributes:
        source: the network.
        compute: the dtype between layers.
        memory: "high", or "low" without the largest packed weights.
    """

    source: nn.Module

    def __init__(self, source: nn.Module, compute: torch.dtype, memory: str) -> None:
        super().__init__()
        self.__dict__["source"] = source  # no submodule: it is not ours to move or to train
        self.compute, self.memory = compute, memory
        self._names = list(inspect.signature(source.forward).parameters)
        self._check = getattr(source, "check", None)
        self._lock = threading.RLock()
        self._forget()
        super().train(False)

    def _forget(self) -> None:
        """Start anew, from the network's weights as they are now."""
        self._watch = Watch(self.source)
        weights = list(self.source.parameters())
        self._dtype = weights[0].dtype if weights else torch.float32
        # what is made in one mode cannot be written in another: the weights', not the caller's
        self._inferred = any(p.is_inference() for p in weights)
        self._traced: list[nn.Module] = []  # hidden from nn.Module, as the source
        self._programs: dict[Any, Program] = {}
        self._weights = Weights()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._latest: Program | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "source" or name.startswith("__"):
                raise
            return getattr(self.source, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's prediction for x [B, ...] at timesteps t, a number or [B].

        Raises:
            RuntimeError: a gradient is asked for, or the network cannot be traced.
            TypeError, ValueError: as the network.
        """
        x, t, args, kwargs = self._inputs(args, kwargs)
        if self._check is not None:  # a program knows shapes; labels out of range it would take
            self._check(x.to(self._dtype), t, *args, **kwargs)
        with torch.inference_mode(self._inferred), torch.no_grad(), _own_dtypes(), self._lock:
            program, rest = self._program(x, t, args, kwargs)
            program.load(x, t, rest)
            made = (_returned(value, x.dtype) for value in program.run())
            outputs = [next(made) if isinstance(n, fx.Node) else n for n in program.returned]
        return program.captured.result(outputs)

    def prepare_rows(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> None:
        """Get ready for a run: calls with x's shape, the rows of t [rows, B], and these others.

        What depends on time and class alone is then computed for all the rows together. Samplers
        call it; calls that were not prepared for work as well.
        """
        x, t, args, kwargs = self._inputs((x, t, *args), kwargs)
        with torch.inference_mode(self._inferred), torch.no_grad(), _own_dtypes(), self._lock:
            program, rest = self._program(x, t[0], args, kwargs)
            program.embedding.prepare(t, rest)

    def report(self, rounds: int = 5) -> Report:
        """Where each layer of the last call's program runs, and how long it takes: measured now.

        Raises:
            RuntimeError: it has not been called yet.
        """
        if self._latest is None:
            raise RuntimeError("report: nothing has run yet; call the network first")
        with torch.inference_mode(self._inferred), torch.no_grad(), _own_dtypes(), self._lock:
            return Report.of(self._latest, rounds)

    def train(self, mode: bool = True) -> Engine:
        """Raises RuntimeError for mode=True: an optimized network is for inference."""
        if mode:
            raise RuntimeError(
                "train: an optimized network is for inference; train the network it was made "
                "from (its .source): a change of the weights is noticed at the next call"
            )
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's."""
        return self.source.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the network."""
        return self.source.load_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Engine:
        """What .to(), .half() and the like end in: raises where it would change something."""
        probe = torch.empty(0)
        moved = fn(probe)
        if (moved.device, moved.dtype) != (probe.device, probe.dtype):
            raise RuntimeError(
                f"to: an optimized network stays on the CPU and computes in "
                f"{_name(self.compute)}; make another with fastdiff.optimize(model, dtype), or "
                "move the network it was made from (.source)"
            )
        return self

    def __reduce__(self) -> Any:
        """Copied and pickled with its network, and without what it packed and measured."""
        return Engine, (self.source, self.compute, self.memory)

    def extra_repr(self) -> str:
        lines = [f"{type(self.source).__name__}, {_name(self.compute)}, memory={self.memory!r}"]
        for program in self._programs.values():
            size = tuple(program.values[program.image].shape)
            lines.append(f"{size}: {program.summary()}")
        packed, arena = self._weights.bytes / 2**20, len(self._arena) / 2**20
        lines.append(f"packed weights {packed:.0f} MB, activations {arena:.0f} MB")
        return "\n".join(lines)

    def _inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]]:
        with self._lock, EXPORTING:
            if self._watch.changed():
                self._forget()
        given = list(args[:2])
        for name in self._names[len(given) : 2]:
            if name not in kwargs:
                raise TypeError(f"{name}: missing; call it as {type(self.source).__name__}")
            given.append(kwargs.pop(name))
        x, t = given
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.device.type != "cpu":
            raise TypeError(f"{self._names[0]}: {_describe(x)}, must be a floating CPU tensor")
        if not isinstance(t, Tensor) or t.dim() == 0:
            t = torch.as_tensor(t).expand(len(x))
        if torch.is_grad_enabled():
            for leaf in pytree.tree_leaves((x, t, args[2:], kwargs)):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    raise RuntimeError(
                        f"{self._names[0]}: a gradient is asked for, and an optimized network has "
                        "none; use the network it was made from (.source), or torch.no_grad()"
                    )
        ordered = {name: kwargs[name] for name in self._names if name in kwargs}
        return x, t, args[2:], ordered | kwargs

    def _program(
        self, x: Tensor, t: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, tuple[Tensor, ...]]:
        """The program for such inputs, bound to the arena, and the tensors after x and t."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        rest = tuple(
            leaf.float() if leaf.is_floating_point() else leaf
            for leaf in leaves
            if isinstance(leaf, Tensor)
        )
        signs = tuple((v.shape, v.dtype) if isinstance(v, Tensor) else (type(v), v) for v in leaves)
        nesting = structure if HASHED else repr(structure)
        key = (x.shape, t.shape, t.dtype, signs, nesting, torch.get_num_threads())
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._make(x, t, leaves, structure)
        elif program.arena is not self._arena:
            program.place(self._arena)
            program.bind(program.choices)
        self._latest = program
        return program, rest

    def _make(self, x: Tensor, t: Tensor, leaves: list[Any], structure: Any) -> Program:
        leaves = [
            v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        x = torch.zeros(x.shape)
        with EXPORTING:
            captured = capture(self._float_source(), (x, torch.zeros_like(t), *args), kwargs)
        simplify(captured)
        fuse(captured)
        program = Program(captured, self.compute, self.memory, self._weights)
        if program.bytes > len(self._arena):
            self._arena = pages(program.bytes)
        program.place(self._arena)
        program.bind(tune(program))
        others = (p.keys for p in self._programs.values())
        self._weights.settle(program.keys.union(*others))
        program.bind(program.choices)
        return program

    def _float_source(self) -> nn.Module:
        if not self._traced:
            plain = all(p.dtype == torch.float32 for p in self.source.parameters())
            self._traced.append(self.source if plain else copy.deepcopy(self.source).float())
        return self._traced[0]


def _returned(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A result as a tensor of its own, in the input's dtype if it is a floating one."""
    dtype = dtype if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=dtype).copy_(value)


def _own_dtypes() -> Any:
    """What an engine computes in, it says itself: a training loop's autocast is not for it."""
    return torch.autocast("cpu", enabled=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} on {value.device}"
    return type(value).__name__
