"""Tensors that end, or begin, at a page nobody may touch: a read past them is a crash."""

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def fenced(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of x, of its strides, whose memory abuts a page without access.

    The last element is the last before the page, or the first is the first after it: then the other
    end is aligned to the element alone, not to any vector.
    """
    if not isinstance(x, torch.Tensor) or not x.numel():
        return x
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = extent * x.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (address, address + (pages + 1) * PAGE):
        assert LIBC.mprotect(fence, PAGE, 0) == 0, ctypes.get_errno()
    place = (pages + 1) * PAGE - size if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=x.dtype, count=extent, offset=place)
    flat.copy_(x.as_strided((extent,), (1,)))
    return flat.as_strided(x.shape, x.stride())


def outputs_within(op, inputs, at_end: bool) -> tuple[torch.Tensor | None, ...]:
    """What the op writes, inputs and outputs all fenced."""
    inside = tuple(fenced(x, at_end) for x in inputs)
    outputs = [None if x is None else fenced(x, at_end) for x in op.allocate(*inputs)]
    for out in outputs:
        if out is not None and out.is_floating_point():
            out.fill_(torch.nan)
    names = [name.rstrip("?") for name in op.outputs]
    op.write(*inside, **dict(zip(names, outputs, strict=True)))
    return tuple(outputs)
