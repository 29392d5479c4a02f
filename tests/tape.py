"""A stand-in for a GPU's stream: a tape of the operators that ran, played again without Python.

All else is real: the operators, the buffers and what is in them. As on a GPU, capturing does
nothing yet, memory made while capturing holds anything before a replay, a replay reads and writes
the addresses of the capture, and reading a value back is not permitted.
"""

from contextlib import contextmanager
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

READ_BACK = torch.ops.aten._local_scalar_dense.default
NOT_PERMITTED = "operation not permitted when stream is capturing"


class Tape(TorchDispatchMode):
    """Records the operators that run in it, and the memory they write as it was before."""

    def __init__(self):
        super().__init__()
        self.entries, self.made, self.before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is READ_BACK:
            raise RuntimeError(f"{NOT_PERMITTED}\nand more lines")
        # aliases: a parameter that moves later does not take the tape along
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.detach(), (args, kwargs))
        schema = {a.name: a for a in func._schema.arguments}
        given = dict(zip(schema, args, strict=False)) | kwargs
        for name, value in given.items():
            if schema[name].alias_info and schema[name].alias_info.is_write and value is not None:
                memory = value.untyped_storage()
                if memory._cdata not in self.made:
                    self.before.setdefault(memory._cdata, (memory, memory.clone()))
        out = func(*args, **kwargs)
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        new = [t for t in _tensors(out) if t.untyped_storage()._cdata not in inputs]
        self.made |= {t.untyped_storage()._cdata: t for t in new}
        self.entries.append((func, args, kwargs, out, bool(new)))
        return out

    def undo(self):
        for memory, before in self.before.values():
            memory.copy_(before)
        for tensor in self.made.values():
            tensor.untyped_storage().fill_(0xFF)  # NaN, or -1

    def play(self):
        for func, args, kwargs, out, writes_new in self.entries:
            again = func(*args, **kwargs)
            if writes_new:
                for mine, new in zip(_tensors(out), _tensors(again), strict=True):
                    mine.copy_(new)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Counts the values that are read back."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is READ_BACK
        return func(*args, **(kwargs or {}))


class TapeLane:
    captures: ClassVar[int] = 0

    def __init__(self, device):
        pass

    @staticmethod
    def unavailable():
        return None

    @contextmanager
    def turn(self):
        yield

    def rehearse(self, work):
        with Watch() as watch:
            work()
        return "it waits for the GPU" if watch.count else None

    def capture(self, work):
        tape = Tape()
        try:
            with tape:
                work()
        finally:
            tape.undo()
        type(self).captures += 1

        def replay():
            with torch.no_grad():
                tape.play()

        return replay
