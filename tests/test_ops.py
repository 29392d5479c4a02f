"""Every case of every op on the CPU: right by the 2x rule, registered right, compilable.

The rule, in fastdiff/verify.py: a kernel's error against float64 is at most twice that of the
reference run in the op's own precision.
"""

import pytest
import torch
from helpers import CASES
from torch.autograd import forward_ad

import fastdiff
from fastdiff import NoiseSchedule, ops
from fastdiff.op import missing
from fastdiff.ops import OPS
from fastdiff.table import COLUMNS
from fastdiff.verify import errors_of, written

BACKENDS = ["reference"] + [name for name in ("cpp",) if not missing(name)]


def as_list(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op, case", CASES)
def test_error_is_at_most_twice_that_of_torch(op, case, backend):
    with fastdiff.backend(backend):
        errors = errors_of(op, case)
    assert all(error <= allowed for error, allowed in errors.values()), errors


@pytest.mark.parametrize("op, case", CASES)
def test_functional_form_gives_what_the_out_form_writes(op, case):
    inputs = case.inputs("cpu")
    outputs = [out for out in written(op, inputs) if out is not None]
    for a, b in zip(as_list(op.call(*inputs)), outputs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("op, case", CASES)
def test_opcheck(op, case):
    inputs = case.inputs("cpu")
    torch.library.opcheck(op.call, inputs)
    names = [name.rstrip("?") for name in op.outputs]
    outputs = dict(zip(names, op.allocate(*inputs), strict=True))
    torch.library.opcheck(op.write, inputs, outputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", list(OPS))
def test_compiles_as_one_graph(name):
    torch.compiler.reset()  # the lambda is one function to it, compiled for only so many ops
    op = OPS[name]
    inputs = next(case for case in op.cases() if not case.large).inputs("cpu")
    compiled = torch.compile(lambda *args: op.call(*args), fullgraph=True, backend="aot_eager")
    for a, b in zip(as_list(compiled(*inputs)), as_list(op.call(*inputs)), strict=True):
        assert torch.equal(a, b)


def test_public_calls_compile_as_one_graph():
    schedule = fastdiff.NoiseSchedule.cosine(100)
    x0, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([3, 50])

    def loss(x0, noise, t):
        x_t, target = fastdiff.ops.noising(x0, t, schedule, "v", noise=noise)
        return fastdiff.ops.cfg(x_t, target, 1.5).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x0, noise, t), loss(x0, noise, t))


@pytest.mark.parametrize("each", [False, True])
def test_cfg_gradient_is_that_of_its_formula(each):
    c, u = (torch.randn(3, 5, dtype=torch.float32, requires_grad=True) for _ in range(2))
    w = torch.tensor([0.5, -1.0, 7.0], requires_grad=True) if each else 1.5
    out = fastdiff.ops.cfg(c, u, w)
    ours = torch.autograd.grad(out.sin().sum(), [c, u] + ([w] if each else []))
    scale = w[:, None] if each else w
    formula = (scale + 1) * c - scale * u
    theirs = torch.autograd.grad(formula.sin().sum(), [c, u] + ([w] if each else []))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_noising_gradient_and_values_are_those_of_the_formula(prediction):
    schedule = fastdiff.NoiseSchedule.cosine(50)
    x0, z = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    t = torch.tensor([0, 10, 30, 49])
    alpha = torch.tensor(schedule.alpha[t], dtype=torch.float32)[:, None]
    sigma = torch.tensor(schedule.sigma[t], dtype=torch.float32)[:, None]
    target = {"eps": z, "x0": x0, "v": alpha * z - sigma * x0, "score": -z / sigma}[prediction]
    theirs = (alpha * x0 + sigma * z, target)
    ours = fastdiff.ops.noising(x0, t, schedule, prediction, noise=z)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)

    def gradients(outs):
        mixed = sum((out / out.detach().abs().max()).sin().sum() for out in outs)
        return torch.autograd.grad(mixed, (x0, z), allow_unused=True)

    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_noising_keeps_the_noise_at_small_t():
    """diffusers casts alphabar to bfloat16 first, where 1 - alphabar is 0 at the smallest t."""
    schedule = fastdiff.NoiseSchedule.linear(1000)
    x0 = torch.zeros(1, 4096, dtype=torch.bfloat16)
    x_t, _ = fastdiff.ops.noising(x0, torch.tensor([0]), schedule, "eps", seed=0)
    assert x_t.float().std().item() == pytest.approx(schedule.sigma[0], rel=0.05)


# the U-Net's


@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_silu_is_the_unets_own(channels_last):
    x, scale, shift = torch.randn(2, 16, 5, 5), torch.randn(2, 16), torch.randn(2, 16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    norm = torch.nn.GroupNorm(4, 16)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        h = norm(x) * (1 + scale[..., None, None]) + shift[..., None, None]
        expected = torch.nn.functional.silu(h)
        ours = fastdiff.ops.group_norm_silu(x, 4, norm.weight, norm.bias, norm.eps, scale, shift)
    assert ours.stride() == x.stride() and torch.allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_silu_from_a_slice_into_a_slice_with_float32_parameters(dtype):
    """As the engine calls it: images that are channels of wider ones, one projection for AdaGN."""
    wide, narrow, wider = (torch.randn(2, 6, 5, c).to(dtype) for c in (96, 64, 160))
    weight, bias, projection = torch.randn(64), torch.randn(64), torch.randn(2, 400)
    scale, shift = projection[:, 100:164], projection[:, 164:228]

    def image(pixels):
        return pixels.permute(0, 3, 1, 2)

    inputs = (image(wide[..., 16:80]), 8, weight, bias, 1e-5, scale, shift, True)
    op, out = OPS["group_norm_silu"], wider[..., 32:96]
    before = wider.clone()
    op.write(*inputs, out=image(out))
    narrow.copy_(wide[..., 16:80])
    assert torch.equal(image(out), op.call(image(narrow), *inputs[1:]))
    truth = op.reference(inputs[0].double(), *inputs[1:])[0]
    assert (image(out) - truth).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)
    assert torch.equal(wider[..., :32], before[..., :32])
    assert torch.equal(wider[..., 96:], before[..., 96:])


def test_attention_reads_a_projection_and_its_output_flattens_without_a_copy():
    qkv = torch.randn(2, 9, 3, 2, 32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = fastdiff.ops.attention(q, k, v)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    weights = (q @ k.mT * 32**-0.5).softmax(-1)
    assert torch.allclose(out, weights @ v, atol=2e-6)


def attention_operands(dtype=torch.float32):
    """q of 5 tokens, k and v of 7, and a gradient that is one number everywhere."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, n, 16) for n in (5, 7, 7))
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return [t.requires_grad_() for t in (q, k, v)], torch.ones(()).to(dtype).expand(2, 3, 5, 16)


def test_attention_gradient_is_that_of_its_formula_in_float64():
    operands, grad = attention_operands(torch.float64)
    formula = (0.3 * operands[0] @ operands[1].mT).softmax(-1) @ operands[2]
    theirs = torch.autograd.grad(formula, operands, grad)
    lse = (0.3 * operands[0] @ operands[1].mT).logsumexp(-1)
    exact = OPS["attention_backward"].reference(grad, *operands, formula, lse, 0.3)
    operands, grad = attention_operands()
    ours = torch.autograd.grad(fastdiff.ops.attention(*operands, 0.3), operands, grad)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert torch.allclose(c, b, rtol=1e-12, atol=1e-14)
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


def test_attention_gradient_of_many_heads_sums_its_blocks_of_queries_and_keys():
    """20 heads, so that the CPU's kernel cuts none by its keys; three blocks of those, two of q."""
    q, k, v, grad = torch.randn(4, 20, 1, 300, 16)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    formula = (wide[0] @ wide[1].mT / 4).softmax(-1) @ wide[2]
    theirs = torch.autograd.grad(formula, wide, grad.double())
    out, lse = OPS["attention"].call(q, k, v, 0.25, True)
    for a, b in zip(
        OPS["attention_backward"].call(grad, q, k, v, out, lse, 0.25), theirs, strict=True
    ):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("needed", [(0,), (1, 2)])
def test_attention_keeps_what_a_gradient_needs_only_where_one_is_asked_for(needed):
    operands, grad = attention_operands()
    whole = torch.autograd.grad(fastdiff.ops.attention(*operands), operands, grad)
    some = [t.detach().requires_grad_(i in needed) for i, t in enumerate(operands)]
    out = fastdiff.ops.attention(*some)
    parts = torch.autograd.grad(out, [some[i] for i in needed], grad)
    for i, part in zip(needed, parts, strict=True):
        assert torch.equal(part, whole[i])
    with torch.no_grad():
        assert fastdiff.ops.attention(*some).grad_fn is None
    with pytest.raises(RuntimeError, match="with_lse=False: must be True"):
        OPS["attention"].call(*some, 0.3, False)


def test_attention_compiles_as_one_graph_with_its_gradient():
    operands, grad = attention_operands()
    compiled = torch.compile(fastdiff.ops.attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*operands), fastdiff.ops.attention(*operands), strict=True):
        assert torch.equal(a, b)
    ours = torch.autograd.grad(compiled(*operands), operands, grad)
    theirs = torch.autograd.grad(fastdiff.ops.attention(*operands), operands, grad)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(OPS["attention"].call, (*operands, 0.3, True))


@pytest.mark.parametrize(
    "name", ["conv3x3", "group_norm_silu", "attention", "linear", "teacher_step"]
)
def test_a_bound_call_is_the_op_on_what_is_there_at_the_time(name):
    op = OPS[name]
    inputs = next(case for case in op.cases() if not case.large).inputs("cpu")
    outputs = op.allocate(*inputs)
    run = op.bind(*inputs, *outputs)
    for _ in range(2):
        inputs[0].add_(inputs[0].roll(1, -1))
        run()
        assert torch.equal(outputs[0], as_list(op.call(*inputs))[0])


def test_ops_without_a_gradient_refuse_to_be_trained_through():
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    weight = torch.randn(3, 2)
    with pytest.raises(RuntimeError, match=r"^x: requires a gradient.*torch\.no_grad"):
        fastdiff.ops.group_norm_linear(x, 2, None, None, 1e-5, weight)
    with torch.no_grad():
        assert not fastdiff.ops.group_norm_linear(x, 2, None, None, 1e-5, weight).requires_grad


# noise


def test_philox_gives_the_published_words():
    """Known answers of Philox-4x32-10 from Random123 (Salmon et al. 2011)."""
    philox = fastdiff.ops.randn.__globals__["philox"]
    zeros = philox(torch.zeros(1, 2, dtype=torch.int64), 0, 4)[0].tolist()
    assert zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_samples_noise_does_not_depend_on_its_batch(backend):
    with fastdiff.backend(backend):
        whole = fastdiff.ops.randn((6, 3, 37), seed=9)
        assert torch.equal(whole[4:], fastdiff.ops.randn((2, 3, 37), seed=9, first_index=4))
        assert torch.equal(whole[:1], fastdiff.ops.randn((1, 3, 37), seed=[9]))
        each = fastdiff.ops.randn((2, 3, 37), seed=[4, 9])
        assert torch.equal(each[1:], whole[:1])
        assert not torch.equal(whole, fastdiff.ops.randn((6, 3, 37), seed=9, row=0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals_have_the_normal_distribution(backend):
    with fastdiff.backend(backend):
        z = fastdiff.ops.randn((64, 1 << 14), seed=3).double().flatten()
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5
    grid = torch.linspace(-3, 3, 61, dtype=torch.float64)
    empirical = (z[:, None] < grid).double().mean(0)
    exact_cdf = torch.special.ndtr(grid)
    assert (empirical - exact_cdf).abs().max() < 2.2 / z.numel() ** 0.5


def test_noise_inside_a_step_is_that_of_randn():
    op = OPS["step"]
    case = next(case for case in op.cases() if case.name == "ddpm")
    x, m, table, row, m_u, v, g, h, z, streams, copies = case.inputs("cpu")
    inside = op.call(x, m, table, row, m_u, v, g, h, None, streams, copies)[0]
    z = OPS["randn"].call(x.shape, streams, int(row), False)
    given = op.call(x, m, table, row, m_u, v, g, h, z, None, copies)[0]
    assert torch.allclose(inside, given, rtol=1e-6, atol=1e-6)


def test_a_step_in_place_is_the_step():
    op = OPS["step"]
    inputs = next(case for case in op.cases() if case.name == "everything").inputs("cpu")
    expected = op.call(*inputs)
    x, h = inputs[0], inputs[7]
    model_input = torch.empty_like(expected[2])
    op.write(*inputs, x_next=x, h_next=h, model_input=model_input)
    for a, b in zip((x, h, model_input), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given, wanted", [(16, 32), (32, 16)])
def test_the_model_may_take_another_dtype_than_it_gives(backend, given, wanted):
    """Under autocast a network takes float32 and gives bfloat16; others do it the other way."""
    dtypes = {16: torch.bfloat16, 32: torch.float32}
    op = OPS["step"]
    x, m, *rest = next(case for case in op.cases() if case.name == "guided").inputs("cpu")
    rest[2] = rest[2].to(dtypes[given])  # m_u
    inputs = (x, m.to(dtypes[given]), *rest)
    out, model_input = torch.empty_like(x), torch.full((4, *x.shape[1:]), torch.nan)
    model_input = model_input.to(dtypes[wanted])
    with fastdiff.backend(backend):
        op.write(*inputs, x_next=out, h_next=None, model_input=model_input)
    scaled = (out * rest[0][2, COLUMNS.index("c_in")]).to(dtypes[wanted])
    assert torch.equal(model_input, torch.cat([scaled, scaled]))


def test_clamp_passes_nan_on():
    op = OPS["step"]
    x, m, *rest = next(case for case in op.cases() if case.name == "ddim").inputs("cpu")
    m[0, 0, 0, 0] = torch.nan
    out = op.call(x, m, *rest)[0]
    assert torch.isnan(out[0, 0, 0, 0]) and int(torch.isnan(out).sum()) == 1


# bad input: one message each, naming the argument

x, table, row = torch.zeros(2, 3, 4), torch.zeros(5, 15), torch.tensor(0)
schedule = fastdiff.NoiseSchedule.cosine(10)
t = torch.tensor([0, 9])
q = torch.zeros(1, 2, 3, 8)


def norm(x, groups=1, weight=None, bias=None, eps=1e-5, scale=None, shift=None):
    return fastdiff.ops.group_norm_silu(x, groups, weight, bias, eps, scale, shift)


def mse(output=x, target=x, weights=None, t=t):
    return fastdiff.ops.weighted_mse(
        output, target, torch.ones(10) if weights is None else weights, t
    )


def teach(z=x, m=x, rows=None, i=None, **given):
    rows = torch.ones(4, 5) if rows is None else rows
    return fastdiff.ops.teacher_step(z, m, rows, t // 9 if i is None else i, **given)


BAD = {
    "m: has shape": lambda: fastdiff.ops.step(x, x[:1], table, row),
    "m: has dtype": lambda: fastdiff.ops.step(x, x.double(), table, row),
    "x: has dtype": lambda: fastdiff.ops.step(x.half(), x, table, row),
    "x: must be a torch.Tensor": lambda: fastdiff.ops.step([1.0], x, table, row),
    "table: has shape": lambda: fastdiff.ops.step(x, x, table[:, :3], row),
    "row=5": lambda: fastdiff.ops.step(x, x, table, torch.tensor(5)),
    "row: has 2 elements": lambda: fastdiff.ops.step(x, x, table, torch.tensor([0, 1])),
    "h: has shape": lambda: fastdiff.ops.step(x, x, table, row, h=x[:, :1]),
    "m_u: has dtype": lambda: fastdiff.ops.step(x, x, table, row, m_u=x.half()),
    "streams: has shape": lambda: fastdiff.ops.step(x, x, table, row, streams=row.reshape(1, 1)),
    "m: is on meta": lambda: fastdiff.ops.step(x, x.to("meta"), table, row),
    "x0: has dtype": lambda: fastdiff.ops.noising(x.double(), t, schedule),
    "t: has shape": lambda: fastdiff.ops.noising(x, t[:1], schedule),
    "t: has dtype": lambda: fastdiff.ops.noising(x, t.float(), schedule),
    "t: spans 0 to 10": lambda: fastdiff.ops.noising(x, t + t // 9, schedule),
    "prediction='noise'": lambda: fastdiff.ops.noising(x, t, schedule, "noise"),
    "noise: has dtype": lambda: fastdiff.ops.noising(x, t, schedule, noise=x.half()),
    "seed: was given": lambda: fastdiff.ops.noising(x, t, schedule, noise=x, seed=1),
    "m_uncond: has shape": lambda: fastdiff.ops.cfg(x, x[:1], 1.0),
    "w: has shape": lambda: fastdiff.ops.cfg(x, x, torch.ones(3)),
    "w: has dtype": lambda: fastdiff.ops.cfg(x, x, torch.ones(2).long()),
    "seed=-1": lambda: fastdiff.ops.randn((2, 3), seed=-1),
    "seed: has 3 entries": lambda: fastdiff.ops.randn((2, 3), seed=[1, 2, 3]),
    "shape=": lambda: fastdiff.ops.randn((2, -3)),
    "row=-2": lambda: fastdiff.ops.randn((2, 3), row=-2),
    "x: has shape (3,), must be [N": lambda: norm(x[0, :, 0]),
    "groups=2: must divide": lambda: norm(x, groups=2),
    "groups=0": lambda: norm(x, groups=0),
    "eps=0": lambda: norm(x, eps=0),
    "weight: has shape (2,), must be (3,)": lambda: norm(x, weight=x[:, 0, 0]),
    "bias: has dtype bfloat16, must be float32;": lambda: norm(x, bias=x[0, :, 0].bfloat16()),
    "scale: has shape (3,), must be (2, 3)": lambda: norm(x, scale=x[0, :, 0]),
    "shift: is on meta": lambda: norm(x, shift=x[:, :, 0].to("meta")),
    "x: has dtype float64, must be float32 or": lambda: norm(x.double()),
    "q: has dtype float64": lambda: fastdiff.ops.attention(q.double(), q.double(), q.double()),
    "q: has shape (2, 3, 4)": lambda: fastdiff.ops.attention(x, x, x),
    "k: has shape (1, 2, 3, 7), must be (1, 2, keys, 8)": lambda: fastdiff.ops.attention(
        q, q[..., :7], q
    ),
    "k: has shape (1, 2, 0, 8)": lambda: fastdiff.ops.attention(q, q[:, :, :0], q[:, :, :0]),
    "v: has shape (1, 2, 2, 8), must be (1, 2, 3, 8)": lambda: fastdiff.ops.attention(
        q, q, q[:, :, :2]
    ),
    "k: has dtype bfloat16": lambda: fastdiff.ops.attention(q, q.bfloat16(), q.bfloat16()),
    "scale=-1": lambda: fastdiff.ops.attention(q, q, q, -1.0),
    "target: has shape": lambda: mse(target=x[:1]),
    "target: has dtype float64": lambda: mse(target=x.double()),
    "output: must be a torch.Tensor": lambda: mse(output=1.0),
    "weights: has dtype": lambda: mse(weights=torch.ones(10).double()),
    "weights: has shape (10, 1), must be [T]": lambda: mse(weights=torch.ones(10, 1)),
    "weights: requires a gradient": lambda: mse(weights=torch.ones(10, requires_grad=True)),
    "t: has shape (1,), must be (2,)": lambda: mse(t=t[:1]),
    "t: spans 0 to 9, must be within 0 and 8": lambda: mse(weights=torch.ones(9)),
    "z: has dtype": lambda: teach(z=x.half()),
    "m: has shape (1, 3, 4)": lambda: teach(m=x[:1]),
    "table: has shape (5, 15), must be (rows, 5)": lambda: teach(rows=table),
    "i: has shape (1,), must be (2,)": lambda: teach(i=t[:1]),
    "i: spans 0 to 9, must be within 0 and 3": lambda: teach(i=t),
    "z_t: has dtype": lambda: teach(z_t=x.bfloat16()),
    "w and m_uncond: one was given": lambda: teach(w=1.0),
    "m_uncond: has dtype": lambda: teach(w=1.0, m_uncond=x.half()),
    "w: has shape (3,), must be (2,)": lambda: teach(w=torch.ones(3), m_uncond=x),
    "backend='gpu'": lambda: fastdiff.backend("gpu").__enter__(),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[message]()
    assert str(caught.value).startswith(message)


def test_a_second_derivative_of_attention_is_refused():
    q = torch.randn(1, 1, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="attention: has no second derivative"):
        torch.autograd.grad(ops.attention(q, q, q).sum(), q, create_graph=True)


def test_forward_mode_is_refused_and_not_taken_for_zero():
    x, t, schedule = torch.randn(2, 4, 3, 3), torch.tensor([1, 2]), NoiseSchedule.cosine(9)
    table, row = torch.zeros(1, 15), torch.tensor([0])
    calls = {
        "group_norm_silu": lambda x: ops.group_norm_silu(x, 2, None, None, 1e-5),
        "attention": lambda x: ops.attention(x, x, x),
        "cfg": lambda x: ops.cfg(x, x, 2.0),
        "step": lambda x: ops.step(x, x, table, row),
        "noising": lambda x: ops.noising(x, t, schedule, seed=1)[0],
    }
    for name, call in calls.items():
        for differentiate in (
            lambda call=call: torch.func.jvp(call, (x,), (x,)),
            lambda call=call: dual(call, x),
        ):
            with pytest.raises(RuntimeError, match=f"{name}: has no forward-mode derivative"):
                differentiate()


def dual(call, x):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, x))


def test_the_short_way_of_step_takes_none_but_plain_tensors():
    table, row = torch.randn(1, 15), torch.tensor([0])
    x, m = torch.randn(2, 3), torch.randn(2, 3)
    right = ops.step(x, m, table, row)
    traced = torch.jit.trace(lambda x, m: ops.step(x, m, table, row), (x, m), check_trace=False)
    assert torch.equal(traced(x, m), right)
    flipped = torch.complex(m, -x).conj().imag
    assert flipped.is_neg() and torch.equal(flipped, x)
    assert torch.equal(ops.step(flipped, m, table, row), right)
    assert not ops.step(torch.nn.Parameter(x), m, table, row).requires_grad
