"""A row of a run as a CUDA graph: captured once for each kind of row, replayed for all.

A graph works on buffers that stay (`Rollout`): the table, the row's number, the streams, the state
and the conditions. So another seed, guidance weight, eta, spacing, number of steps, condition or
start is only other numbers in them. Captured anew is what changes the work itself: shapes, dtypes,
which of the table's columns are in use, a callback, a gradient, autocast, the backend, and where
the model's parameters and buffers lie, and its modules, their hooks, which of them train, and what
settings those that are not torch's own say they have (`extra_repr`). Rows with guidance and rows
without are two graphs.

A graph replays what the model did when it was captured. Of a change to anything else that the
model reads (a flag that it does not tell, a tensor that is no buffer) it learns nothing: call
`forget`.

Memory: for each model the latest KEPT kinds of run stay, each with a copy of the run's buffers;
their graphs share one pool, which grows to the activations of the largest. They go with the model.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from . import op
from .rollout import Model, Rollout

KEPT = 4
FEWEST_ROWS = 1024  # what a table has room for at least, so that other steps fit the buffers

Gradient = Callable[..., Tensor] | None
Work = Callable[[], None]


class Lane:
    """What the graphs of a model share on a device: a memory pool, and their order.

    They may share it, as nothing that a replay leaves in it is read by another: results go to the
    buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()

    @staticmethod
    def unavailable() -> str | None:
        """Why nothing can be captured now, or None."""
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        if torch.cuda.is_current_stream_capturing():
            return "the current stream is being captured already"
        return None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """After the run before, which may have been on another stream."""
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self.done)
            try:
                yield
            finally:
                self.done.record()

    def rehearse(self, work: Work) -> str | None:
        """Do the work, and say where it waits for the GPU, which no graph can."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "called a synchronizing" in str(warning.message):
                place = f"{Path(warning.filename).name}, line {warning.lineno}"
                return f"it waits for the GPU ({place}: .item(), .cpu(), a mask as an index, ...)"
        return None

    def capture(self, work: Work) -> Work:
        """The work as a graph, not done yet; what is returned does it."""
        graph = torch.cuda.CUDAGraph()
        try:
            # torch.cuda.graph leaves its stream current when a capture ends in an error
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(
                    graph,
                    pool=self.pool,
                    stream=self.stream,
                    capture_error_mode="thread_local",  # other threads may go on using the GPU
                ),
            ):
                work()
        except BaseException:
            # and in many versions the allocator in its pool; this raises where it has left it
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
                torch._C._cuda_releasePool(self.stream.device_index, self.pool)
            self.pool = torch.cuda.graph_pool_handle()
            raise
        return graph.replay


LANES: dict[str, type[Lane]] = {"cuda": Lane}


class Captured:
    """The buffers that the graphs of one kind of run work on, and the graphs."""

    def __init__(self, rollout: Rollout, lane: Lane) -> None:
        self.lane, self.rollout = lane, copy.copy(rollout)
        for name, (shape, dtype) in _sizes(rollout).items():
            setattr(self.rollout, name, torch.empty(shape, dtype=dtype, device=rollout.x.device))
        if rollout.input is rollout.x:
            self.rollout.input = self.rollout.x
        self.row = torch.zeros(1, dtype=torch.int64, device=rollout.x.device)
        self.t = torch.empty_like(self.rollout.t[:1])
        self.t_now = self.t[0]
        self.warm: set[bool] = set()
        self.replays: dict[bool, Work] = {}

    def load(self, rollout: Rollout) -> None:
        """Take over the numbers of a run that starts; what is beyond its last row is not used."""
        for name in _sizes(rollout):
            new = getattr(rollout, name)
            getattr(self.rollout, name)[: len(new)].copy_(new)
        self.row.zero_()

    def work(self, model: Model, gradient: Gradient, guided: bool) -> None:
        """The next row: on a device, the same work whatever row it is."""
        torch.index_select(self.rollout.t, 0, self.row, out=self.t)
        self.rollout.step(model, gradient, guided, self.t_now, self.row)
        self.row.add_(1)

    def advance(self, model: Model, gradient: Gradient, guided: bool) -> str | None:
        """Do the next row; return why its kind cannot be captured, if it was tried and cannot.

        The first row of a kind is done plainly: it compiles, measures and fills caches. The second
        is watched, then captured, which does nothing yet; from the third on the graph is replayed.
        """
        if replay := self.replays.get(guided):
            replay()
            return None
        work = partial(self.work, model, gradient, guided)
        if guided not in self.warm:
            work()
            self.warm.add(guided)
            return None
        reason = self.lane.rehearse(work)
        if reason is None:
            # autocast's copies of the weights must be made in the graph, and not outlive it
            torch.clear_autocast_cache()
            try:
                self.replays[guided] = self.lane.capture(work)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            finally:
                torch.clear_autocast_cache()
        return reason


class Graphs:
    """What is kept for one model."""

    def __init__(self) -> None:
        self.kinds: OrderedDict[Any, Captured] = OrderedDict()
        self.lanes: dict[torch.device, Lane] = {}
        self.turn = threading.Lock()  # the buffers serve one run at a time
        self.reason: str | None = None

    def captured(self, key: Any, rollout: Rollout) -> Captured:
        device = rollout.x.device
        if device not in self.lanes:
            self.lanes[device] = LANES[device.type](device)
        if key not in self.kinds:
            self.kinds[key] = Captured(rollout, self.lanes[device])
        self.kinds.move_to_end(key)
        while len(self.kinds) > KEPT:
            self.kinds.popitem(last=False)
        return self.kinds[key]


_kept: WeakKeyDictionary[Model, Graphs] = WeakKeyDictionary()


def forget(model: Model) -> None:
    """Drop the graphs captured of a model, with their memory; the next run captures anew."""
    _kept.pop(model, None)


@contextmanager
def stepping(
    model: Model, rollout: Rollout, gradient: Gradient, graph: bool | None
) -> Iterator[Callable[[int], Rollout]]:
    """A function that does row i and returns the rollout that holds the state after it.

    Rows are done in order, from 0. Once all are, `rollout.x` is the result. `graph` as
    `Sampler.sample` says it.
    """
    reason = None if graph is False else _obstacle(model, rollout, gradient, graph)
    if graph and reason:
        raise RuntimeError(f"graph=True: {reason}; leave graph out to run without")
    kept = None if graph is False or reason else _kept.setdefault(model, Graphs())
    if kept is None or not kept.turn.acquire(blocking=False):
        yield _plainly(model, rollout, gradient)
        return
    try:
        captured = kept.captured(_key(model, rollout, gradient), rollout)
        with captured.lane.turn():
            captured.load(rollout)
            kept.reason = None  # graph=True tries again

            def step(i: int) -> Rollout:
                guided = rollout.guided[i]
                if kept.reason is not None:
                    captured.work(model, gradient, guided)
                elif reason := captured.advance(model, gradient, guided):
                    kept.reason = f"the model cannot be captured as a CUDA graph: {reason}"
                    kept.kinds.clear()
                    if graph:
                        raise RuntimeError(f"graph=True: {kept.reason}; leave graph out")
                    warnings.warn(
                        f"{kept.reason}; it runs without, which is slower where the model is "
                        "small (graph=False is silent, graph=True tries again)",
                        stacklevel=4,
                    )
                return captured.rollout

            yield step
            rollout.x.copy_(captured.rollout.x)
    finally:
        kept.turn.release()


def _plainly(model: Model, rollout: Rollout, gradient: Gradient) -> Callable[[int], Rollout]:
    rollout.prepare(model)
    guided, t = rollout.guided, rollout.t.unbind()
    rows = torch.arange(len(t), device=rollout.x.device).unbind()
    row = rollout.step

    def step(i: int) -> Rollout:
        row(model, gradient, guided[i], t[i], rows[i])
        return rollout

    return step


def _obstacle(model: Model, rollout: Rollout, gradient: Gradient, graph: bool | None) -> str | None:
    """Why no graph is to be tried, or None."""
    device = rollout.x.device.type
    if device not in LANES:
        return f"CUDA graphs need a GPU, this run is on the {device}"
    if reason := LANES[device].unavailable():
        return reason
    if not isinstance(rollout.cond, Tensor | None):
        return f"cond is a {type(rollout.cond).__name__}, no tensor"
    if graph is None:
        if model in _kept and (reason := _kept[model].reason):
            return reason
        for name, part in (("model", model), ("gradient", gradient)):
            if part is not None and not isinstance(part, nn.Module):
                return f"{name} is no nn.Module, so nobody sees whether its tensors move"
    return None


def _sizes(rollout: Rollout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the buffers that a kind of run keeps, by name."""
    sizes = {}
    for name in rollout.BUFFERS:
        buffer = getattr(rollout, name)
        if buffer is None or (name == "input" and buffer is rollout.x):
            continue
        length = len(buffer)
        if name in rollout.BY_ROW:
            length = max(FEWEST_ROWS, 1 << (length - 1).bit_length())
        sizes[name] = ((length, *buffer.shape[1:]), buffer.dtype)
    return sizes


def _key(model: Model, rollout: Rollout, gradient: Gradient) -> Any:
    """Everything that decides what work a row is."""
    device = rollout.x.device.type
    return (
        tuple(_sizes(rollout).items()),
        rollout.x.device,
        rollout.learned_variance,
        None if gradient is None else ref(gradient),
        *(_state(part) for part in (model, gradient) if isinstance(part, nn.Module)),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        op._forced.get(),
    )


def _state(module: nn.Module) -> Any:
    """Where a network's tensors lie, and how its modules are set; not what the tensors hold."""
    tensors = [*module.parameters(), *module.buffers()]
    return (
        tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors),
        tuple(
            (
                id(m),
                type(m),
                m.training,
                # torch's layers, whose settings hardly change, take longest to say them
                "" if type(m).__module__.startswith("torch.") else m.extra_repr(),
                *m._forward_hooks,
                *m._forward_pre_hooks,
            )
            for m in module.modules()
        ),
    )
