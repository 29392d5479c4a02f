"""Group norm and a linear layer on the GPU; the formula is in `fastdiff.ops.group_norm_linear`.

The norm of a channel is a (x - m) + b: the matrix product applies it to each tile of x that it
loads, on the way to the tensor cores.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from .image import parameters, walked
from .launch import Config, Launch, launcher
from .norm import coefficients, parameter, read

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
CONFIGS = (
    Config({"TOKENS": 64, "OUTPUTS": 64, "DEPTH": 32}, threads=128, stages=3),
    Config({"TOKENS": 128, "OUTPUTS": 64, "DEPTH": 32}, threads=128, stages=3),
    Config({"TOKENS": 128, "OUTPUTS": 128, "DEPTH": 32}, threads=256, stages=3),
    Config({"TOKENS": 128, "OUTPUTS": 128, "DEPTH": 64}, threads=256, stages=3),
)
# where rows begin anywhere: each element then has an address of its own, in registers
UNALIGNED = (Config({"TOKENS": 32, "OUTPUTS": 32, "DEPTH": 32}, threads=128, stages=1),)


@triton.jit
def group_norm_linear_kernel(
    x,
    coefficients,
    weight,
    bias,
    out,
    channels,
    tokens,
    outputs,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # neighbours share a tile of x, which is the larger operand
    across, down = tl.cdiv(outputs, OUTPUTS), tl.cdiv(tokens, TOKENS)
    program = tl.program_id(0)
    output = program % across * OUTPUTS + tl.arange(0, OUTPUTS)
    token = program // across % down * TOKENS + tl.arange(0, TOKENS)
    sample = (program // across // down).to(tl.int64)
    asked, inside = output < outputs, token < tokens
    x, s, c, p = x
    pixels = x + sample * s + token.to(tl.int64)[:, None] * p
    w, w_output, w_channel = weight
    columns = w + output.to(tl.int64) * w_output
    total = tl.zeros([TOKENS, OUTPUTS], tl.float32)
    for start in range(0, channels, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        there = channel < channels
        m, a, b = read(coefficients, sample, channels, channel, there)
        value = tl.load(pixels + channel.to(tl.int64) * c, there & inside[:, None], 0.0)
        n = tl.fma(a, value.to(tl.float32) - m, b).to(value.dtype)
        row = channel.to(tl.int64)[:, None] * w_channel
        taken = tl.load(columns + row, there[:, None] & asked, 0.0)
        if INTERPRETED:  # there a product takes the bits of bfloat16 for integers
            n, taken = n.to(tl.float32), taken.to(tl.float32)
        total = tl.dot(n, taken, total, input_precision="ieee")
    if bias is not None:
        total += parameter(bias, sample, output, asked)
    place = out + (sample * tokens + token)[:, None] * outputs + output
    tl.store(place, total, inside[:, None] & asked)


def plan(
    x: Tensor,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> list[Launch]:
    if not out.numel():
        return []
    image, (read,) = walked(groups, x)
    given = parameters(weight=norm_weight, bias=norm_bias, scale=None, shift=None)
    each, launches = coefficients(image, read, eps, given)
    args = parameters(weight=weight, bias=bias)
    args |= {"x": read, "coefficients": each, "out": out}
    args |= {"channels": image.channels, "tokens": image.pixels, "outputs": len(weight)}

    def programs(tile: Mapping[str, int]) -> tuple[int]:
        down = triton.cdiv(image.pixels, tile["TOKENS"])
        return (image.samples * down * triton.cdiv(len(weight), tile["OUTPUTS"]),)

    rows = image.channels, len(weight), 8 if image.channels_last else image.pixels
    configs = UNALIGNED if any(n % 8 for n in rows) else CONFIGS
    return [*launches, Launch(group_norm_linear_kernel, configs, programs, args, x.device)]


launch = launcher(plan)
