"""An op is a record: one name for its schema, reference, cases and backends.

An op is registered twice with torch's dispatcher, from the same record: a functional form that
allocates its outputs, and an `out` form that writes into tensors it is given. Both end in one
launcher, `launch(*inputs, *outputs)`, which the active backend provides.
"""

from __future__ import annotations

import contextvars
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from . import errors

BACKENDS = ("reference", "cpp", "triton")

_library = torch.library.Library("fastdiff", "DEF")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of this thread on one backend: "reference" (plain torch), "cpp" or "triton".

    Without it the tensors' device decides: cpp on the CPU, triton on a GPU, and the reference
    where these are not to be had (`fastdiff doctor` says why). ValueError for any other name,
    RuntimeError if that backend cannot be loaded here.
    """
    errors.one_of("backend", name, BACKENDS)
    if reason := missing(name):
        raise RuntimeError(f"backend={name!r}: {reason}; run `fastdiff doctor`")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def missing(name: str) -> str | None:
    """Why a backend cannot be used here, or None if it can."""
    module = {"cpp": "fastdiff._C", "triton": "fastdiff.kernels.launch"}.get(name)
    try:
        if module:
            importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    return None


@cache
def _best(device: str) -> str:
    name = {"cpu": "cpp", "cuda": "triton"}[device]
    return "reference" if missing(name) else name


@dataclass(frozen=True)
class Case:
    """Inputs an op must get right: `inputs(device)` returns its positional arguments.

    `large` cases are sizes of real work: they are timed by the benchmark, not run by the tests.
    """

    name: str
    inputs: Callable[[str], tuple[Any, ...]]
    large: bool = False


@dataclass(frozen=True)
class Op:
    """The record of one op.

    `inputs` is the schema of the arguments and `outputs` names the tensors returned; an output
    whose name ends in "?" is there only when the inputs ask for it. `reference(*inputs)` returns
    the outputs and is readable, differentiable torch for any floating dtype and device.
    `allocate(*inputs)` returns the outputs uninitialised, None where one is not asked for.
    `moved(*inputs)` is the fewest bytes the op can move. The launcher of backend "cpp" is
    `cpp(*inputs, *outputs)`, that of "triton" is `launch` in `fastdiff.kernels.<name>`.
    `described(*inputs, *outputs)` are the arguments of `_C.<name>` and `_C.bind_<name>`, or None
    where the kernel does not take such tensors: then `cpp` runs, or the reference if that is None.
    `backward` is torch.library's pair (setup_context, backward). Once registered, `call(*inputs)`
    is the functional form and `write(*inputs, **outputs)` the one that writes into its outputs.
    """

    name: str
    inputs: str
    outputs: tuple[str, ...]
    reference: Callable[..., tuple[torch.Tensor | None, ...]]
    allocate: Callable[..., tuple[torch.Tensor | None, ...]]
    cases: Callable[[], list[Case]]
    moved: Callable[..., int]
    backward: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    cpp: Callable[..., None] | None = None
    described: Callable[..., tuple[Any, ...] | None] | None = None
    call: Callable[..., Any] = field(init=False)
    write: Callable[..., None] = field(init=False)
    _launchers: dict[str, Callable[..., None]] = field(init=False, default_factory=dict)

    def launcher(self, device: str) -> Callable[..., None]:
        """The launcher of the active backend for tensors on `device` ("cpu" or "cuda")."""
        name = _forced.get() or _best(device)
        if name == "triton" and not self.has_triton():
            if _forced.get():
                raise RuntimeError(
                    f'backend="triton": {self.name} has no Triton kernel; leave the choice to '
                    'fastdiff, or use backend="reference" for it'
                )
            name = "reference"
        if name not in self._launchers:
            self._launchers[name] = self._load(name)
        return self._launchers[name]

    def bind(self, *args: Any) -> Callable[[], Any]:
        """A call without arguments that runs the op on CPU tensors `(*inputs, *outputs)`.

        Checks and addresses are settled here, once; the tensors must stay alive and in place.
        """
        launcher = self.launcher("cpu")
        if launcher != self._run_described or not self.described:
            return partial(launcher, *args)
        described = self.described(*args)
        if described is None:
            return partial(launcher, *args)
        return getattr(importlib.import_module("fastdiff._C"), f"bind_{self.name}")(*described)

    def has_triton(self) -> bool:
        """Whether there is a Triton kernel, installed with the package, of this op."""
        if "triton" not in self._launchers:
            return importlib.util.find_spec(f"{__package__}.kernels.{self.name}") is not None
        return True

    def _load(self, name: str) -> Callable[..., None]:
        if name == "triton":
            return importlib.import_module(f"{__package__}.kernels.{self.name}").launch
        if name == "cpp" and self.described:
            return self._run_described
        return self.cpp if name == "cpp" and self.cpp else self._copy_reference

    def _run_described(self, *args: Any) -> None:
        described = self.described(*args) if self.described else None
        if described is not None:
            getattr(importlib.import_module("fastdiff._C"), self.name)(*described)
        elif self.cpp is not None:
            self.cpp(*args)
        else:
            self._copy_reference(*args)

    def _copy_reference(self, *args: Any) -> None:
        inputs, outputs = args[: -len(self.outputs)], args[-len(self.outputs) :]
        for out, value in zip(outputs, self.reference(*inputs), strict=True):
            if out is not None:
                out.copy_(value)

    def register(self) -> Op:
        """Define the op in torch's dispatcher, with both forms, fakes and autograd."""
        optional = any(o.endswith("?") for o in self.outputs)
        returns = "Tensor[]" if optional else ", ".join("Tensor" for _ in self.outputs)
        written = ", ".join(
            f"Tensor({chr(97 + i)}!){'?' if o.endswith('?') else ''} {o.rstrip('?')}"
            for i, o in enumerate(self.outputs)
        )
        _library.define(f"{self.name}({self.inputs}) -> ({returns})")
        _library.define(f"{self.name}.out({self.inputs}, *, {written}) -> ()")

        def pack(outputs: tuple[torch.Tensor | None, ...]) -> Any:
            if optional:
                return [o for o in outputs if o is not None]
            return outputs if len(outputs) > 1 else outputs[0]

        def functional(device: str) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                outputs = self.allocate(*args)
                self.launcher(device)(*args, *outputs)
                return pack(outputs)

            return run

        def out(device: str) -> Callable[..., None]:
            names = [o.rstrip("?") for o in self.outputs]

            def run(*args: Any, **outputs: Any) -> None:
                self.launcher(device)(*args, *(outputs.get(n) for n in names))

            return run

        for device, key in {"cpu": "CPU", "cuda": "CUDA"}.items():
            _library.impl(self.name, functional(device), key)
            _library.impl(f"{self.name}.out", out(device), key)
        torch.library.register_fake(
            f"fastdiff::{self.name}", lambda *args: pack(self.allocate(*args)), lib=_library
        )
        torch.library.register_fake(
            f"fastdiff::{self.name}.out", lambda *args, **outputs: None, lib=_library
        )
        if self.backward:
            setup_context, backward = self.backward
            torch.library.register_autograd(
                f"fastdiff::{self.name}", backward, setup_context=setup_context, lib=_library
            )
        # plain attributes: torch.compile cannot trace a cached_property's lock
        object.__setattr__(self, "call", getattr(torch.ops.fastdiff, self.name).default)
        object.__setattr__(self, "write", getattr(torch.ops.fastdiff, self.name).out)
        return self
