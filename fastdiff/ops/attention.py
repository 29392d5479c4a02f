"""Scaled dot-product attention at the sizes of a U-Net, in memory that grows with the tokens alone.

    out = softmax(scale q k') v           for each sample and head (Vaswani et al. 2017, eq. 1)
    lse = log sum exp(scale q k')         over the keys; all that a gradient needs of the softmax

The softmax is taken in float32, block by block of keys (Dao et al. 2022). In 16 bits its weights
are rounded once, before their products with v are summed in float32, as torch's own kernel does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..op import Case, Op
from .layout import _C, DTYPES, Operand, element_bytes


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    if not with_lse:
        return out, None
    compute = torch.promote_types(q.dtype, torch.float32)
    return out, (scale * (q.to(compute) @ k.to(compute).mT)).logsumexp(-1)


def token_major(like: Tensor) -> Tensor:
    """An uninitialised [N, heads, tokens, size], stored as [N, tokens, heads, size]."""
    batch, heads, tokens, size = like.shape
    return like.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _allocate(
    q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if with_lse else None
    return token_major(q), lse


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *qkv, ctx.scale, with_lse = inputs
    if not with_lse:
        raise RuntimeError("with_lse=False: must be True where a gradient is asked for")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*qkv, *output)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention: has no second derivative, which create_graph=True asks for; use torch's "
            "own functions"
        )
    grad_qkv = torch.ops.fastdiff.attention_backward(grads[0], *ctx.saved_tensors, ctx.scale)
    return *grad_qkv, None, None


def _described(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    with_lse: bool,
    out: Tensor,
    lse: Tensor | None,
) -> tuple[Any, ...] | None:
    operands = operands_of(q, k, v, out)
    if not operands:
        return None
    return *size_of(q, k), scale, 0 if lse is None else lse.data_ptr(), operands


def operands_of(*tensors: Tensor) -> list[Operand] | None:
    """The operands of [N, heads, tokens, size], or None where the CPU's kernels take none."""
    dtype, size = tensors[0].dtype, tensors[0].shape[3]
    if size > 512 or size % 8 or not _C.attention_runs(DTYPES[dtype]):
        return None
    if any(t.stride(3) != 1 or t.dtype != dtype or not t.shape[2] for t in tensors):
        return None
    return [
        (t.data_ptr(), DTYPES[dtype], (t.stride(0), t.stride(1), t.stride(2), 0)) for t in tensors
    ]


def size_of(q: Tensor, k: Tensor) -> tuple[tuple[int, int, int, int], int]:
    """(samples, heads, queries, keys), and the size of a head."""
    return (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.shape[3]


def _cases() -> list[Case]:
    def case(
        name: str,
        batch: int,
        heads: int,
        tokens: int,
        size: int,
        keys: int | None = None,
        dtype: torch.dtype = torch.float32,
        gain: float = 1.0,
        large: bool = False,
        layout: str = "packed",
        lse: bool = False,
    ) -> Case:
        def inputs(device: str) -> tuple[Tensor, Tensor, Tensor, float, bool]:
            generator = torch.Generator().manual_seed(0)
            if keys is None:  # q, k and v side by side, as one projection gives them
                qkv = torch.randn(batch, tokens, 3, heads, size, generator=generator)
                q, k, v = qkv.to(device, dtype).transpose(1, 3).unbind(2)
            else:
                q, k, v = (
                    torch.randn(batch, n, heads, size, generator=generator).to(device, dtype)
                    for n in (tokens, keys, keys)
                )
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if layout == "columns":
                q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
            return gain * q, k, v, size**-0.5, lse

        return Case(name, inputs, large)

    bf16, fp16 = torch.bfloat16, torch.float16
    return [
        case("fp32", 2, 2, 64, 64),
        case("bf16", 2, 2, 64, 64, dtype=bf16),
        case("fp16", 1, 2, 65, 64, dtype=fp16),
        case("lse", 2, 2, 65, 40, keys=77, lse=True),
        case("lse-bf16", 1, 2, 63, 64, dtype=bf16, lse=True),
        case("size-40", 1, 3, 77, 40),
        case("size-40-bf16", 1, 3, 77, 40, dtype=bf16),
        case("size-80", 1, 2, 33, 80, dtype=bf16),
        case("size-160", 1, 2, 33, 160, dtype=bf16),
        case("size-256", 1, 1, 63, 256),
        case("size-256-bf16", 1, 1, 301, 256, dtype=bf16),
        case("size-200", 1, 1, 40, 200, keys=50),
        case("size-512", 1, 1, 40, 512, dtype=bf16),
        case("size-8", 2, 1, 9, 8),
        case("size-6", 1, 2, 9, 6),  # torch's, since it is no multiple of 8
        case("cross", 2, 2, 65, 40, keys=77),
        case("cross-bf16", 2, 2, 65, 40, keys=77, dtype=bf16),
        case("blocks", 1, 1, 70, 40, keys=1100),
        case("blocks-bf16", 1, 1, 70, 40, keys=1100, dtype=bf16),
        case("blocks-256", 1, 1, 300, 256, keys=600, dtype=bf16),
        case("sharp", 1, 2, 40, 64, gain=30.0),
        case("sharp-bf16", 1, 2, 40, 64, gain=30.0, dtype=bf16),
        case("columns", 1, 2, 19, 32, layout="columns"),
        case("one-key", 1, 1, 5, 32, keys=1, dtype=bf16),
        case("one", 1, 1, 1, 32),
        case("empty", 0, 2, 16, 32, keys=16),
        case("large", 16, 1, 256, 256, dtype=bf16, large=True),
        case("large-many", 2, 8, 4096, 40, dtype=bf16, large=True),
    ]


OP = Op(
    name="attention",
    inputs="Tensor q, Tensor k, Tensor v, float scale, bool with_lse",
    outputs=("out", "lse?"),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    flops=lambda q, k, v, scale, with_lse: 4 * q.numel() * k.shape[2],
    moved=lambda q, k, v, scale, with_lse: (
        element_bytes(q, k, v, q) + with_lse * 4 * q.shape[:3].numel()
    ),
    backward=(_setup, _backward),
)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k') v, for each sample and head, without a mask.

    Differentiable once, with respect to q, k and v. On a GPU heads of any size are ours; on the
    CPU those of a multiple of 8, up to 512, in float32 and bfloat16, where it has AVX-512 (for
    bfloat16 its dot product too), with their gradients. The rest is left to torch.

    Args:
        q: [N, heads, tokens, size], float32, bfloat16 or float16, of any strides: views of
            a projection [N, tokens, 3, heads, size] are read as they lie.
        k, v: [N, heads, keys, size], of q's dtype; the number of keys may differ from the tokens.
        scale: above 0; size^(-1/2) if None.

    Returns:
        [N, heads, tokens, size], stored as [N, tokens, heads, size]: the transpose and flatten
        that follow in a U-Net's block cost nothing.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number; the message says which.
    """
    errors.is_tensor("q", q)
    errors.has_dtype("q", q, errors.MODEL_DTYPES)
    if q.dim() != 4 or not q.shape[3]:
        raise ValueError(
            f"q: has shape {tuple(q.shape)}, must be [N, heads, tokens, size], size >= 1"
        )
    errors.is_tensor("k", k)
    batch, heads, _, size = q.shape
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (batch, heads, size) or not k.shape[2]:
        raise ValueError(
            f"k: has shape {tuple(k.shape)}, must be ({batch}, {heads}, keys, {size}), keys >= 1"
        )
    errors.on_device("k", k, "q", q)
    errors.like("v", v, "k", k)
    for name, value in {"k": k, "v": v}.items():
        errors.has_dtype(name, value, (q.dtype,))
    if scale is None:
        scale = size**-0.5
    if not errors.number("scale", scale) > 0:
        raise ValueError(f"scale={scale}: must be above 0 and finite")
    with_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return OP(q, k, v, scale, with_lse)[0]
