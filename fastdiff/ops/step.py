"""One row of a sampler's table: the whole update of the state, in one pass.

    m  = m_u + (w + 1) (m - m_u)               where m_u is given
    D  = clamp(px x + pm m, -clip, +clip) + q r^2 g,      r = exp(l v), 1 without v
    x' = a x + b D + c h + n m + s r z         z: given, or made from the samples' streams
    h' = d x + e D
    model_input = c_in x'                      c_in of the next row; `copies` times along the batch

What is absent (m_u, v, g, h, z and streams) takes no part, so a sampler passes what its table's
flags say. The state is float32 whatever the model's dtype: a bfloat16 state loses 1000 steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import errors
from ..op import Case, Op
from ..table import COLUMNS
from .layout import _C, DTYPES, describe, element_bytes
from .randn import check_streams, streams_of
from .randn import reference as randn_reference

_WIDTH, _ROW_STRIDE = len(COLUMNS), (len(COLUMNS), 1)
_is_compiling = torch.compiler.is_compiling
_listeners = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state


def reference(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    row: Tensor,
    m_u: Tensor | None = None,
    v: Tensor | None = None,
    g: Tensor | None = None,
    h: Tensor | None = None,
    z: Tensor | None = None,
    streams: Tensor | None = None,
    copies: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    row = row.reshape(1)  # as an index, a tensor without dimensions would be read back
    k = dict(zip(COLUMNS, table.index_select(0, row)[0].to(x.dtype).unbind(), strict=True))
    m = m.to(x.dtype)
    if m_u is not None:
        m = m_u.to(x.dtype) + (k["w"] + 1) * (m - m_u.to(x.dtype))
    r = torch.exp(k["l"] * v.to(x.dtype)) if v is not None else 1.0
    D = (k["px"] * x + k["pm"] * m).clamp(-k["clip"], k["clip"])
    if g is not None:
        D = D + k["q"] * r**2 * g
    x_next = k["a"] * x + k["b"] * D + k["n"] * m
    if h is not None:
        x_next = x_next + k["c"] * h
    if z is None and streams is not None:
        z = randn_reference(x.shape, streams, row, False)[0]
    if z is not None:
        x_next = x_next + k["s"] * r * z
    h_next = k["d"] * x + k["e"] * D if h is not None else None
    if not copies:
        return x_next, h_next, None
    following = (row + 1).clamp(max=len(table) - 1)
    c_in = table.index_select(0, following)[0, COLUMNS.index("c_in")].to(x.dtype)
    return x_next, h_next, torch.cat([c_in * x_next] * copies)  # cast where it is stored


def _allocate(
    x: Tensor, m: Tensor, table: Tensor, row: Tensor, *rest: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    h, copies = rest[3], rest[6]
    model_input = None
    if copies:
        model_input = torch.empty_like(x, dtype=m.dtype)
        if copies > 1:
            model_input = torch.cat([model_input] * copies)
    return torch.empty_like(x), torch.empty_like(h) if h is not None else None, model_input


def _described(x: Tensor, m: Tensor, table: Tensor, row: Tensor, *rest: Any) -> tuple[Any, ...]:
    m_u, v, g, h, z, streams, copies, x_next, h_next, model_input = rest
    first = None if model_input is None else model_input[: len(x)]
    return (
        table.data_ptr(),
        len(table),
        row.data_ptr(),
        0 if streams is None else streams.data_ptr(),
        copies,
        *describe(x, m, m_u, v, g, h, z, x_next, h_next, first),
    )


def _cpp(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    row: Tensor,
    m_u: Tensor | None,
    v: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    z: Tensor | None,
    streams: Tensor | None,
    copies: int,
    x_next: Tensor,
    h_next: Tensor | None,
    model_input: Tensor | None,
) -> None:
    if (  # nothing but addresses to tell then, which takes a third of the time
        x.is_contiguous()
        and m.is_contiguous()
        and x_next.is_contiguous()
        and (m_u is None or m_u.is_contiguous())
        and (v is None or v.is_contiguous())
        and (g is None or g.is_contiguous())
        and (h is None or (h.is_contiguous() and h_next.is_contiguous()))  # type: ignore[union-attr]
        and (z is None or z.is_contiguous())
        and (model_input is None or (model_input.is_contiguous() and model_input.dtype is m.dtype))
    ):
        _C.step_dense(
            x.size(0),
            x.numel(),
            table.data_ptr(),
            table.size(0),
            row.data_ptr(),
            0 if streams is None else streams.data_ptr(),
            copies,
            DTYPES[m.dtype],
            x.data_ptr(),
            m.data_ptr(),
            0 if m_u is None else m_u.data_ptr(),
            0 if v is None else v.data_ptr(),
            0 if g is None else g.data_ptr(),
            0 if h is None else h.data_ptr(),
            0 if z is None else z.data_ptr(),
            x_next.data_ptr(),
            0 if h_next is None else h_next.data_ptr(),
            0 if model_input is None else model_input.data_ptr(),
        )
        return
    rest = m_u, v, g, h, z, streams, copies, x_next, h_next, model_input
    _C.step(*_described(x, m, table, row, *rest))


def _table() -> Tensor:
    """Three rows with every column in use; the clip bites."""
    #      t  c_in    w    px     pm clip    q    a    b     c     n    s    l    d      e
    row = (9, 0.5, 1.5, 1.25, -0.75, 0.9, 0.1, 0.3, 0.6, -0.2, 0.15, 0.4, 0.2, 0.7, -0.35)
    return torch.tensor([1.0, 0.9, 1.1])[:, None] * torch.tensor(row)


def _cases() -> list[Case]:
    def case(
        name: str,
        *size: int,
        dtype: torch.dtype = torch.float32,
        takes: str = "",
        layout: str = "contiguous",
        copies: int = 0,
        large: bool = False,
    ) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)

            def draw(dtype: torch.dtype = torch.float32) -> Tensor:
                x = torch.randn(size, generator=generator).to(device, dtype)
                if layout == "channels-last":
                    return x.contiguous(memory_format=torch.channels_last)
                return x.repeat_interleave(2, -1)[..., ::2] if layout == "strided" else x

            x, m, given = draw(), draw(dtype), {}
            for name in takes.split():
                if name in ("m_u", "g", "h", "z"):
                    given[name] = draw(dtype if name == "m_u" else x.dtype)
            if "v" in takes.split():  # a model of learned variance gives both as channel halves
                m, given["v"] = torch.cat([m, draw(dtype).tanh()], 1).chunk(2, 1)
            streams = None
            if "streams" in takes.split():
                streams = streams_of(3, size[0], (1 << 33) + 1, device=device)
            optional = [given.get(name) for name in ("m_u", "v", "g", "h", "z")]
            row = torch.tensor(1, device=device)
            return x, m, _table().to(device), row, *optional, streams, copies

        return Case(name, inputs, large)

    bf16, fp16 = torch.bfloat16, torch.float16
    return [
        case("ddim", 2, 3, 16, 16),
        case("ddim-bf16", 2, 3, 16, 16, dtype=bf16),
        case("ddim-fp16", 2, 3, 16, 16, dtype=fp16),
        case("ddim-input", 2, 3, 16, 16, dtype=bf16, copies=1),
        case("ddpm", 2, 3, 16, 16, takes="streams"),
        case("ddpm-given", 2, 301, takes="z"),
        case("guided", 2, 3, 16, 16, takes="m_u", copies=2),
        case("guided-bf16", 3, 63, takes="m_u", dtype=bf16, copies=2),
        case("learned", 2, 3, 16, 16, takes="v streams"),
        case("classifier", 2, 3, 7, 9, takes="v g streams"),
        case("history", 2, 4, 301, takes="h"),
        case("everything", 3, 3, 7, 9, takes="m_u v g h streams", dtype=bf16, copies=2),
        case("channels-last", 2, 3, 8, 10, takes="v h streams", layout="channels-last", copies=2),
        case("strided", 2, 3, 8, 10, takes="m_u h streams", layout="strided", copies=1),
        case("one", 1, 1, takes="streams"),
        case("empty", 0, 3, 8, 8, takes="streams", copies=2),
        case("large-ddim", 16, 3, 256, 256, large=True),
        case("large-guided", 16, 3, 256, 256, takes="m_u", large=True),
        case("large-ddpm", 16, 3, 256, 256, takes="streams", large=True),
        case("large-learned", 16, 3, 256, 256, takes="v streams", large=True),
    ]


def _moved(x: Tensor, m: Tensor, table: Tensor, row: Tensor, *rest: Any) -> int:
    m_u, v, g, h, z, _, copies = rest
    written = element_bytes(x, h) + copies * x.numel() * m.element_size()
    return element_bytes(x, m, m_u, v, g, h, z) + written


OP = Op(
    name="step",
    inputs=(
        "Tensor x, Tensor m, Tensor table, Tensor row, Tensor? m_u, Tensor? v, Tensor? g, "
        "Tensor? h, Tensor? z, Tensor? streams, int copies"
    ),
    outputs=("x_next", "h_next?", "model_input?"),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cpp=_cpp,
    cases=_cases,
    moved=_moved,
)


def step(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    m_u: Tensor | None = None,
    v: Tensor | None = None,
    g: Tensor | None = None,
    h: Tensor | None = None,
    z: Tensor | None = None,
    streams: Tensor | None = None,
) -> Any:
    """Run row `row` of `table` on the state x; return x', or (x', h') when h is given.

    x: float32 [B, ...]; g, h and z: like x. m, the model's output, and m_u and v: x's shape,
    all float32, bfloat16 or float16. table: float32 [rows, 15], `Table.tensor()`. row: an int64
    tensor of one element, on x's device, so that nothing is read back. streams: int64 [B, 2] from
    `ops.streams_of`, for noise made in the kernel. Layouts are free, and may differ. The result
    carries no gradient. TypeError or ValueError for anything else, before any work.
    """
    if (
        _is_compiling()
        or not _is_plain(x, m, table, row)
        or not (
            m_u is v is g is h is z is streams is None or _are_plain(x, m, m_u, v, g, h, z, streams)
        )
    ):
        _check(x, m, table, row, m_u, v, g, h, z, streams)
        with torch.no_grad():
            out = OP(x, m, table, row, m_u, v, g, h, z, streams, 0)
        return out[0] if h is None else (out[0], out[1])
    x_next = torch.empty_like(x)
    h_next = None if h is None else torch.empty_like(x)
    OP.launcher("cpu")(x, m, table, row, m_u, v, g, h, z, streams, 0, x_next, h_next, None)
    return x_next if h is None else (x_next, h_next)


def _is_plain(x: Tensor, m: Tensor, table: Tensor, row: Tensor) -> bool:
    """Whether the step is the everyday one: right, on the CPU, and with nobody listening.

    It then skips torch's dispatcher, which costs more than such a step at 1x3x32x32. The kernel
    itself checks the row.
    """
    return (
        type(x) is type(m) is type(table) is type(row) is Tensor
        and x.dtype is torch.float32
        and m.dtype in DTYPES
        and x.dim() > 0
        and m.shape == x.shape
        and x.is_cpu
        and m.is_cpu
        and table.is_cpu
        and row.is_cpu
        and table.dtype is torch.float32
        and table.stride() == _ROW_STRIDE
        and table.size(1) == _WIDTH
        and row.dtype is torch.int64
        and row.numel() == 1
        and not _listeners()
        and _tracing() is None
        and forward_ad._current_level < 0
        # of some views, as the imaginary part of a conjugate, the sign is kept beside the memory
        and not x.is_neg()
        and not m.is_neg()
    )


def _are_plain(
    x: Tensor,
    m: Tensor,
    m_u: Tensor | None,
    v: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    z: Tensor | None,
    streams: Tensor | None,
) -> bool:
    for operand, dtype in ((m_u, m.dtype), (v, m.dtype), (g, x.dtype), (h, x.dtype), (z, x.dtype)):
        if operand is not None and not (
            isinstance(operand, Tensor)
            and operand.dtype is dtype
            and operand.is_cpu
            and operand.shape == x.shape
            and not operand.is_neg()
        ):
            return False
    return streams is None or (
        isinstance(streams, Tensor)
        and streams.dtype is torch.int64
        and streams.is_cpu
        and streams.stride() == (2, 1)
        and streams.shape == (len(x), 2)
    )


def _check(x: Tensor, m: Tensor, table: Tensor, row: Tensor, *optional: Tensor | None) -> None:
    errors.is_batch("x", x)
    errors.has_dtype("x", x, (torch.float32,))
    errors.like("m", m, "x", x)
    errors.has_dtype("m", m, errors.MODEL_DTYPES)
    for name, value in (("table", table), ("row", row)):
        errors.is_tensor(name, value)
        errors.on_device(name, value, "x", x)
    errors.has_dtype("table", table, (torch.float32,))
    if table.dim() != 2 or table.shape[1] != len(COLUMNS) or not table.is_contiguous():
        raise ValueError(
            f"table: has shape {tuple(table.shape)}, must be contiguous (rows, {len(COLUMNS)}); "
            "make it with Table.tensor()"
        )
    errors.has_dtype("row", row, (torch.int64,))
    if row.numel() != 1:
        raise ValueError(f"row: has {row.numel()} elements, must have one")
    if not _is_compiling() and row.device.type == "cpu" and not 0 <= int(row) < len(table):
        raise ValueError(f"row={int(row)}: must be in [0, {len(table)}), the table's rows")
    *like_m_or_x, streams = optional
    for name, operand in zip(("m_u", "v", "g", "h", "z"), like_m_or_x, strict=True):
        if operand is not None:
            errors.like(name, operand, "x", x)
            errors.has_dtype(name, operand, (m.dtype if name in ("m_u", "v") else x.dtype,))
    if streams is not None:
        check_streams("streams", streams, len(x))
        errors.on_device("streams", streams, "x", x)
