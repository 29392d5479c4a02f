"""Ways to run a network: fastdiff's engine, and those it is compared with at their best setting.

A runtime prepares a float32 network for arguments of given shapes, in a dtype, and returns the
network's call for arguments of exactly these shapes; what that returns may be overwritten by the
next call. Whatever it needs, it copies: the network stays as it was.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fastdiff.engine import optimize

from .records import FASTDIFF, version_of
from .subjects import Bare, Cast, prepared

fp32, bf16 = torch.float32, torch.bfloat16
Call = Callable[..., Tensor]
Prepare = Callable[..., Call]  # (network, example, dtype)


@dataclass(frozen=True)
class Runtime:
    """`how`: the setting it is run at. `takes(network, dtype)`: whether it can run that. `allowed`:
    its error, in those of eager PyTorch in the same dtype. `compiles`: it takes most of a minute.
    """

    name: str
    package: str
    how: str
    prepare: Prepare
    takes: Callable[[nn.Module, torch.dtype], bool] = lambda network, dtype: True
    devices: tuple[str, ...] = ("cpu", "cuda")
    allowed: float = 3.0
    compiles: bool = False

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def setting(self) -> str:
        return f"{version_of(self.package)}, {self.how}"


def _of_torch(network: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> Call:
    def call(x: Tensor, *rest: Tensor) -> Tensor:
        with torch.inference_mode():
            given = (a.to(dtype) if a.is_floating_point() else a for a in rest)
            return network(x.to(dtype, memory_format=layout), *given)

    return call


def _eager(network: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Call:
    mine = prepared(copy.deepcopy(network), dtype, example[0].device.type)
    return _of_torch(Bare(mine), dtype, torch.channels_last)


def _as_it_comes(network: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Call:
    mine = Bare(copy.deepcopy(network).to(example[0].device, dtype))
    return _of_torch(mine, dtype, torch.contiguous_format)


def _frozen(network: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Call:
    mine = Bare(prepared(copy.deepcopy(network), dtype, example[0].device.type))
    call = _of_torch(torch.compile(mine, dynamic=False), dtype, torch.channels_last)
    with torch._inductor.config.patch(freezing=True):  # as an option, it would come too late
        call(*example)
    return call


def _compiled(
    network: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype, mode: str
) -> Call:
    mine = Bare(prepared(copy.deepcopy(network), dtype, example[0].device.type))
    run = _of_torch(torch.compile(mine, mode=mode, dynamic=False), dtype, torch.channels_last)

    def call(*args: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(*args)

    for _ in range(3):  # its CUDA graph is recorded at the second call
        call(*example)
    return call


def _crashes_openvino(network: nn.Module, dtype: torch.dtype) -> bool:
    """With static shapes 2026.4 ends with a segmentation fault on AdaGN in float32."""
    return dtype == fp32 and getattr(getattr(network, "config", None), "scale_shift", False)


def _openvino(
    network: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype, static: bool = True
) -> Call:
    import openvino as ov

    shapes = [tuple(a.shape) for a in example]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing a network whose shapes are static
        if static:
            model = ov.convert_model(Bare(network), example_input=example, input=shapes)
        else:
            model = ov.convert_model(torch.export.export(Bare(network), example))
    hints = {
        "INFERENCE_PRECISION_HINT": {fp32: "f32", bf16: "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    inputs = [torch.empty(a.shape, dtype=a.dtype) for a in example]
    for i, a in enumerate(inputs):
        request.set_input_tensor(i, ov.Tensor(a.numpy(), shared_memory=True))
    result = torch.from_numpy(request.get_output_tensor().data)

    def call(*args: Tensor) -> Tensor:
        for to, a in zip(inputs, args, strict=True):
            to.copy_(a)
        request.infer()
        return result

    return call


def _onnxruntime(network: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Call:
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Bare(network), example, file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads spin during a run, but not on into another contender's turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]

    def call(*args: Tensor) -> Tensor:
        feeds = {name: a.numpy() for name, a in zip(names, args, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return call


def _fastdiff(
    network: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype, memory: str = "high"
) -> Bare:
    name = str(dtype).removeprefix("torch.")
    if example[0].device.type == "cpu":
        return Bare(optimize(network, name, memory))
    return Cast(optimize(copy.deepcopy(network).to(example[0].device), name), dtype)


EAGER = Runtime("PyTorch", "torch", "eager, channels-last", _eager)
OURS = Runtime(FASTDIFF, "torch", "optimized", _fastdiff)
OPENVINO = Runtime(
    "OpenVINO", "openvino", "static shapes", _openvino, devices=("cpu",),
    takes=lambda network, dtype: not _crashes_openvino(network, dtype),
    allowed=6.0,  # in bfloat16 it rounds the angles of the time's embedding too
)  # fmt: skip
RUNTIMES = (
    EAGER,  # first: its error is what others are held to
    OURS,
    OPENVINO,
    replace(
        OPENVINO,
        how="dynamic shapes",
        prepare=partial(_openvino, static=False),
        takes=_crashes_openvino,
    ),
    Runtime("torch.compile", "torch", "frozen, channels-last", _frozen, compiles=True),
    *(
        Runtime(
            f"torch.compile, {name}",
            "torch",
            f"{mode}, CUDA graphs, channels-last",
            partial(_compiled, mode=mode),
            devices=("cuda",),
            compiles=True,
        )
        for name, mode in (("graphs", "reduce-overhead"), ("tuned", "max-autotune"))
    ),
    Runtime(
        "ONNX Runtime",
        "onnxruntime",
        "all graph optimisations",
        _onnxruntime,
        takes=lambda network, dtype: dtype == fp32,
        devices=("cpu",),
    ),
)
PIPELINE = Runtime("diffusers' pipeline", "diffusers", "as it comes, eager", _as_it_comes)
