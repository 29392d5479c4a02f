"""Counter-based normal noise in a kernel, as `fastdiff.ops.randn` states it; csrc/randn.h's twin.

Philox-4x32-10 (Salmon et al. 2011) gives four words for four consecutive elements, so a tile of
BLOCK elements counts BLOCK / 4 times and interleaves the results.
"""

import triton
import triton.language as tl

# Polynomials, from the constant term up; csrc/randn.h states what each approximates and how well.
LOG = tl.constexpr(
    (
        *(-0.666666627, 0.500016391, -0.400024861, 0.332468241),
        *(-0.284030885, 0.263190746, -0.255248576, 0.152737886),
    )
)
SIN = tl.constexpr((0.785398185, -0.0807458386, 0.0024910483, -3.66352797e-05))
COS = tl.constexpr((-0.308425128, 0.0158542823, -0.000325862668, 3.48964454e-06))
SQRT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)


@triton.jit
def words(streams, row, sample, elements):
    """The random bits of a tile, as four uint32 [BLOCK / 4]."""
    start, live = elements
    seed = tl.load(streams + 2 * sample)
    index = tl.load(streams + 2 * sample + 1)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = (start // 4).to(tl.uint32) + tl.arange(0, live.shape[0] // 4).to(tl.uint32)
    c1, c2, c3 = row.to(tl.uint32), index.to(tl.uint32), (index >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # one wide multiplication gives both halves
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def polynomial(coefficients: tl.constexpr, terms: tl.constexpr, x):
    total = tl.fma(x, coefficients[terms - 1], coefficients[terms - 2])
    for k in tl.static_range(3, terms + 1):
        total = tl.fma(total, x, coefficients[terms - k])
    return total


@triton.jit
def radius(r):
    """sqrt(-2 ln u), u = float32(r) 2^-32 + 2^-33."""
    u = tl.fma(r.to(tl.float32), 2.0**-32, 2.0**-33)
    # u = 2^e (1 + f), with f nearest to 0, so that nothing cancels near u = 1
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1
    slope = tl.fma(tl.fma(polynomial(LOG, 8, f), f, 1.0), f, -2.0)
    return tl.sqrt(tl.fma(e.to(tl.float32), -1.38629436, f * slope))


@triton.jit
def direction(r):
    """(cos, sin)(2 pi r 2^-32): the quadrant and the rest a, in eighths of a turn, are exact."""
    quadrant = r + 0x20000000  # its two upper bits
    a = (r << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31
    a2 = a * a
    sine, cosine = a * polynomial(SIN, 4, a2), tl.fma(a2, polynomial(COS, 4, a2), 1.0)
    swap = (quadrant & 0x40000000) != 0
    x = tl.where(swap, sine, cosine).to(tl.uint32, bitcast=True)
    y = tl.where(swap, cosine, sine).to(tl.uint32, bitcast=True)
    x ^= (quadrant ^ (quadrant << 1)) & 0x80000000
    y ^= quadrant & 0x80000000
    return x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True)


@triton.jit
def interleave(a, b, c, d):
    """a0 b0 c0 d0 a1 b1 ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def normals(streams, row, sample, elements):
    """z of a tile, float32 [BLOCK]."""
    r0, r1, r2, r3 = words(streams, row, sample, elements)
    length0, length2 = radius(r0), radius(r2)
    x0, y0 = direction(r1)
    x2, y2 = direction(r3)
    return interleave(length0 * x0, length0 * y0, length2 * x2, length2 * y2)
