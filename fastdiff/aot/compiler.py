"""Triton without a GPU: what its launcher would compile for a target, compiled."""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ..op import Op
from .targets import Target


def plan_of(op: Op, inputs: tuple[Any, ...]) -> list[Any]:
    """The launches of an op's Triton kernels."""
    kernels = importlib.import_module(f"fastdiff.kernels.{op.name}")
    return list(kernels.plan(*inputs, *op.allocate(*inputs)))


class _Kernel(ASTSource):  # type: ignore[misc]
    """Read by one thread at a time: in CPython 3.11 two that parse at once fail (issue 106905)."""

    _reads = threading.Lock()

    def make_ir(self, *how: Any) -> Any:
        with self._reads:
            return super().make_ir(*how)


@dataclass(frozen=True)
class Source:
    """A kernel, specialised as its launch would be, for one target in one configuration."""

    target: Target
    config: Any
    ast: ASTSource

    @staticmethod
    def of(launch: Any, target: Target, config: Any | None = None) -> Source:
        """Told by Triton's own binder: the same signature, constants and divisibility."""
        config, kernel = config or launch.configs[0], launch.kernel
        backend = make_backend(_gpu(target))
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(**launch.args, **config.blocks)
        _, signature, constants, attributes = kernel._pack_args(
            backend, config.options(target.warp), bound, specialization, None
        )
        return Source(target, config, _Kernel(kernel, signature, constants, attributes))

    @property
    def key(self) -> Any:
        options = self.config.options(self.target.warp)
        return self.target, self.ast.hash(), tuple(options.items())

    def compile(self) -> Any:
        """Triton's compiled kernel: `asm` by language, and `metadata`."""
        return triton.compile(self.ast, _gpu(self.target), self.config.options(self.target.warp))


def check() -> None:
    """RuntimeError in Triton's interpreter, and for one that does not tell what it compiles."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter cannot compile; unset it")
    if not hasattr(triton.JITFunction, "_pack_args"):
        raise RuntimeError(f"Triton {triton.__version__} is too old for this; 3.9 is known to do")


def _gpu(target: Target) -> GPUTarget:
    return GPUTarget(target.backend, target.arch, target.warp)
