"""The device's side of a launch: which elements a program handles, and where things lie."""

import triton
import triton.language as tl


@triton.jit
def tile(shape, BLOCK: tl.constexpr):
    """This program's sample, and its elements: the first, as int64, and which of BLOCK exist."""
    count = shape[0]
    blocks = (count - 1) // BLOCK + 1  # tl.cdiv overflows near 2^31
    program = tl.program_id(0)
    start = (program % blocks).to(tl.int64) * BLOCK
    live = tl.arange(0, BLOCK) < count - start
    return (program // blocks).to(tl.int64), (start, live)


@triton.jit
def address(operand, sample, elements, shape):
    """Pointers to a tile of an operand (tensor, four strides), counted in logical order.

    shape is (elements of a sample,) where each sample is one run of memory, else with d2 and d3.
    """
    pointer, s0, s1, s2, s3 = operand
    start, live = elements
    lane = tl.arange(0, live.shape[0])
    if len(shape) == 1:
        inner = start + lane
    else:
        count, d2, d3 = shape
        index = (start + lane).to(count.dtype)  # a 64-bit division costs many times as much
        rest = index // d3
        i3 = (index % d3).to(tl.int64)
        i2 = (rest % d2).to(tl.int64)
        i1 = (rest // d2).to(tl.int64)
        inner = i1 * s1 + i2 * s2 + i3 * s3
    return pointer + sample * s0 + inner


@triton.jit
def row_of(table, index, rows, width):
    """Row `index` of a table of rows x width: where it lies, and whether there is one.

    Where there is none, the first is read in its place: no memory but the table's, and no mask,
    with which a program's one access would be every thread's.
    """
    known = (index >= 0) & (index < rows)
    return table + tl.where(known, index, 0) * width, known


@triton.jit
def entry(row, column):
    """A row's value in a column; NaN where there is no such row, so that it shows."""
    pointer, known = row
    return tl.where(known, tl.load(pointer + column), float("nan"))


@triton.jit
def load(operand, sample, elements, shape):
    """A tile of an operand as float32."""
    return tl.load(address(operand, sample, elements, shape), elements[1]).to(tl.float32)


@triton.jit
def store(operand, sample, elements, shape, value):
    """Write a float32 tile, rounded to the operand's dtype."""
    tl.store(address(operand, sample, elements, shape), value, elements[1])
