"""The processes of a run, started by torchrun: gloo on CPUs, nccl on GPUs."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.blocks import Block

# how long the others wait for one that draws or saves, or that hangs; one that dies is noticed
# at once
TIMEOUT = timedelta(minutes=30)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class LostWorker(RuntimeError):
    """A step failed in one of several processes."""


def several() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def processes(device: str, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this one's device.

    Args:
        device: "cpu" or "cuda"; with torchrun, each process takes the GPU of its local rank.
        timeout: how long they wait for each other.
    """
    if not several():
        yield torch.device(device)
        return
    _end_with_launcher()
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timeout)
    yield own
    dist.destroy_process_group()  # not after an error: it might wait for a process that died


def _end_with_launcher() -> None:
    """Have this process asked to stop when torchrun dies, however it does: on Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class World:
    """This process among those of the run; alone, every exchange is the identity.

    Attributes:
        rank: this process's number; 0 writes and speaks.
        size: how many there are.
    """

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1

    def gather(self, x: Tensor) -> Tensor:
        """The [k, B] that joins all processes' [k, B / size] in order of rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' x."""
        if self.size > 1:
            dist.all_reduce(x := x.clone())
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process's flag is set."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor([flag], device=device).int()))

    def share(self, value: Any) -> Any:
        """Process 0's value, which may hold tensors on the CPU; the others give None."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def wrapped(model: nn.Module, world: World, fsdp: bool) -> Any:
    """The network whose backward pass averages gradients over the processes.

    With `fsdp` its parameters, in place, become this process's parts of them (FSDP2), block by
    block; otherwise each process holds all of them, and those of process 0 are taken.
    """
    if world.size == 1:
        return model
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module)
    return fully_shard(model)


@contextmanager
def synchronised(network: Any, wanted: bool) -> Iterator[None]:
    """Whether backward passes inside exchange gradients: only a step's last one needs to."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not wanted:
        with network.no_sync():
            yield
        return
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(wanted)
    yield


def local(x: Any) -> Tensor:
    """This process's part of a parameter or gradient, in the same memory."""
    return x.to_local().detach() if hasattr(x, "to_local") else x


def cut(full: Tensor, like: Any) -> Tensor:
    """This process's part of a full tensor, cut as `like` is; all must call it."""
    if not hasattr(like, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements).to_local()


def joined(part: Tensor, like: Any) -> Tensor:
    """The full tensor of which this process holds a part, cut as `like` is; all must call it."""
    if not hasattr(like, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return whole.full_tensor()
