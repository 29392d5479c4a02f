"""An op is a record: one name for its schema, reference, cases and backends.

An op is registered twice with torch's dispatcher, from the same record: a functional form that
allocates its outputs, and an `out` form that writes into tensors it is given. Both end in one
launcher, `launch(*inputs, *outputs)`, which the active backend provides.
"""

from __future__ import annotations

import contextvars
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch.autograd import forward_ad

from . import errors

BACKENDS = ("reference", "cpp", "triton", "cuda")
_MODULES = {
    "cpp": "fastdiff._C",
    "triton": "fastdiff.kernels.launch",
    "cuda": "fastdiff._cuda",
}
_SPELLED = {"triton": "Triton", "cuda": "CUDA"}
_BEST = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}  # then the reference

_library = torch.library.Library("fastdiff", "DEF")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raise where forward-mode differentiation would take a derivative for zero."""
    for value in args:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{name}: has no forward-mode derivative, which torch.func.jvp asks for; use "
                "torch's own functions"
            )


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of this thread on one backend: one of BACKENDS; "reference" is plain torch.

    Without it the tensors' device decides: cpp on the CPU; on a GPU cuda for the ops that it has,
    triton for the others; and the reference where these are not to be had (`fastdiff doctor` says
    why). ValueError for any other name, RuntimeError if that backend cannot be loaded here.
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
    module = _MODULES.get(name)
    if module is None:
        return None
    try:
        loaded = importlib.import_module(module)
        if name == "triton" and torch.cuda.is_available():
            # what imports may still fail: its driver is made here, by the C compiler
            importlib.import_module("triton").runtime.driver.active.get_current_target()
    except ModuleNotFoundError as error:
        if error.name != "fastdiff._cuda":
            return f"{module} cannot be imported ({error})"
        return (
            "fastdiff._cuda is not built: there was no nvcc that works when fastdiff was "
            "installed; install the CUDA toolkit, then fastdiff again"
        )
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        return f"{module} does not work here ({type(error).__name__}: {said})"
    if name == "cuda" and not torch.cuda.is_available():
        return "torch can use no GPU here"
    if name == "cuda" and (problem := loaded.problem()):
        return (
            f"fastdiff._cuda cannot run ({problem}); it needs an NVIDIA GPU of compute capability "
            f"7.5 or more and a driver for CUDA {loaded.CUDA}, with which it was built"
        )
    return None


@cache
def _usable(name: str) -> bool:
    return not missing(name)


@cache
def _warn_of_reference() -> None:
    """Once: that a GPU is used without kernels for it."""
    reasons = "; ".join(f"{name}: {missing(name)}" for name in _BEST["cuda"])
    warnings.warn(
        "fastdiff has no kernels for this GPU, so its ops run as plain torch there: right, but "
        f"several times slower. {reasons}. `pip install triton` is enough; `fastdiff doctor` says "
        "more",
        stacklevel=2,
    )


def _queue(tensor: torch.Tensor) -> tuple[int, int]:
    """The number of a tensor's GPU, and the stream that is current there."""
    device = tensor.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


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
    `moved(*inputs)` is the fewest bytes the op can move, `flops(*inputs)` the products and sums of
    its matrix products, for ops that have some. The launcher of backend "triton" is `launch` in
    `fastdiff.kernels.<name>`. `described(*inputs, *outputs)` are the arguments of
    `_C.<name>` and `_C.bind_<name>`, and of `_cuda.<name>` if there is one, which takes the
    address of `scratch(*inputs)` as well, the device's number and a stream; or None where the
    kernels do not take such tensors: then `otherwise(*inputs, *outputs)` runs, or the reference.
    `cpp(*inputs, *outputs)` goes before these on the CPU.
    `backward` is torch.library's pair (setup_context, backward). Once registered, `call(*inputs)`
    is the functional form and `write(*inputs, **outputs)` the one that writes into its outputs.
    The record itself, called, is `call`, but for forward-mode differentiation, which it refuses.
    """

    name: str
    inputs: str
    outputs: tuple[str, ...]
    reference: Callable[..., tuple[torch.Tensor | None, ...]]
    allocate: Callable[..., tuple[torch.Tensor | None, ...]]
    cases: Callable[[], list[Case]]
    moved: Callable[..., int]
    flops: Callable[..., int] | None = None
    backward: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    described: Callable[..., tuple[Any, ...] | None] | None = None
    otherwise: Callable[..., None] | None = None
    scratch: Callable[..., torch.Tensor] | None = None
    cpp: Callable[..., None] | None = None
    call: Callable[..., Any] = field(init=False)
    write: Callable[..., None] = field(init=False)
    _launchers: dict[tuple[str | None, str], Callable[..., None]] = field(
        init=False, default_factory=dict
    )

    def __call__(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(self.name, args)
        return self.call(*args)

    def launcher(self, device: str) -> Callable[..., None]:
        """The launcher of the active backend for tensors on `device` ("cpu" or "cuda")."""
        key = _forced.get(), device
        launch = self._launchers.get(key)
        if launch is None:
            launch = self._launchers[key] = self._load(self.backend(device))
        return launch

    def bind(self, *args: Any) -> Callable[[], Any]:
        """A call without arguments that runs the op on CPU tensors `(*inputs, *outputs)`.

        Checks and addresses are settled here, once; the tensors must stay alive and in place.
        """
        described = None
        if self.described and not self.cpp and self.backend("cpu") == "cpp":
            described = self.described(*args)
        if described is None:
            return partial(self.launcher("cpu"), *args)
        return getattr(importlib.import_module("fastdiff._C"), f"bind_{self.name}")(*described)

    def has_triton(self) -> bool:
        """Whether there is a Triton kernel, installed with the package, of this op."""
        return importlib.util.find_spec(f"{__package__}.kernels.{self.name}") is not None

    def has_cuda(self) -> bool:
        """Whether there is a CUDA kernel of this op, where the backend is not missing."""
        return hasattr(importlib.import_module("fastdiff._cuda"), self.name)

    def backend(self, device: str) -> str:
        """The active backend for tensors on `device` ("cpu" or "cuda"), or the best there is."""
        has = {"triton": self.has_triton, "cuda": self.has_cuda}
        name = _forced.get()
        if name is None:
            for name in _BEST[device]:
                if _usable(name) and (name not in has or has[name]()):
                    return name
            if device == "cuda" and not any(map(_usable, _BEST[device])):
                _warn_of_reference()
            return "reference"
        takes = {"cpp": "cpu", "cuda": "cuda"}.get(name, device)
        if takes != device:
            raise RuntimeError(
                f"backend={name!r}: the tensors are on a {device} device, it takes {takes} "
                "tensors; move them, or leave the choice to fastdiff"
            )
        if name in has and not has[name]():
            raise RuntimeError(
                f'backend="{name}": {self.name} has no {_SPELLED[name]} kernel; leave the choice '
                'to fastdiff, or use backend="reference" for it'
            )
        return name

    def _load(self, name: str) -> Callable[..., None]:
        if name == "triton":
            return importlib.import_module(f"{__package__}.kernels.{self.name}").launch
        if name == "cuda":
            module = importlib.import_module("fastdiff._cuda")
            return partial(self._run_cuda, getattr(module, self.name), _queue)
        if name == "cpp" and self.cpp:
            return self.cpp
        if name == "cpp" and self.described:
            module = importlib.import_module("fastdiff._C")
            return partial(self._run_cpp, getattr(module, self.name))
        return self._copy_reference

    def _run_cpp(self, kernel: Callable[..., None], *args: Any) -> None:
        described = self.described(*args)  # type: ignore[misc]
        if described is None:
            (self.otherwise or self._copy_reference)(*args)
        else:
            kernel(*described)

    def _run_cuda(self, kernel: Callable[..., None], queue: Callable[..., Any], *args: Any) -> None:
        described = self.described(*args)  # type: ignore[misc]
        if described is None:
            return (self.otherwise or self._copy_reference)(*args)
        first = len(args) - len(self.outputs)
        if self.scratch is None:
            return kernel(*described, *queue(args[first]))
        scratch = self.scratch(*args[:first])  # alive until the kernel is on its stream
        return kernel(*described, scratch.data_ptr(), *queue(args[first]))

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
