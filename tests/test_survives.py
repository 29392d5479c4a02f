"""What users do with objects: compile, cast, copy, pickle, send to workers; the results stay."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from networks import inputs, network
from torch.utils.data import DataLoader, Dataset

import fastdiff
from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DiffusionLoss,
    DPMSolverSampler,
    NoiseSchedule,
    ops,
    optimize,
)
from fastdiff.losses import DistillationLoss

SCHEDULE = NoiseSchedule.cosine(100)
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T = torch.tensor([3, 90])


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def model(x, t):
    return torch.sin(x) * (1 + t[:, None, None, None] / 100)


SAMPLERS = {
    "ddim": lambda: DDIMSampler(SCHEDULE, 5),
    "ddpm": lambda: DDPMSampler(SCHEDULE, 5, variance="small"),
    "dpmpp": lambda: DPMSolverSampler(SCHEDULE, 5, spacing="trailing", prediction="v"),
}
LOSSES = {
    "simple": lambda: DiffusionLoss(SCHEDULE, "v"),
    "min_snr": lambda: DiffusionLoss(SCHEDULE, "eps", weighting="min_snr"),
    "distillation": lambda: DistillationLoss(model, SCHEDULE, [99, 66, 33, 0], "v"),
}
FUNCTIONS = {
    "noising": lambda x: ops.noising(x, T, SCHEDULE, "v", noise=x.flip(0)),
    "cfg": lambda x: ops.cfg(x, x.flip(0), 1.5),
    "randn": lambda x: x + ops.randn(x.shape, 3, row=1),
    "group_norm_silu": lambda x: ops.group_norm_silu(x, 3, None, None, 1e-5),
    "attention": lambda x: ops.attention(x, x, x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_whole(name):
    expected = FUNCTIONS[name](X)
    for got, wanted in zip(_list(compiled(FUNCTIONS[name])(X)), _list(expected), strict=True):
        torch.testing.assert_close(got, wanted)


def _list(value):
    return value if isinstance(value, tuple | list) else [value]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_samplers_step_compiles_whole(name):
    plain, sampler = SAMPLERS[name](), SAMPLERS[name]()
    step = compiled(lambda m, i, x, z: sampler.step(m, i, x, noise=z))
    x = y = X
    for i in range(5):
        m, z = model(x, T), torch.randn(X.shape)
        z = z if sampler.table.noisy else None
        x, y = plain.step(m, i, x, noise=z), step(m, i, x, z)
        torch.testing.assert_close(y, x)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compile_whole_with_their_gradient(name):
    loss, weight = LOSSES[name](), torch.ones(1, requires_grad=True)

    def of(x, noise):
        rows = T if name != "distillation" else torch.tensor([0, 1])
        return loss(lambda x, t: model(x, t) * weight, x, rows, noise=noise)

    expected = torch.autograd.grad(of(X, X.flip(0)), weight)[0]
    value = compiled(of)(X, X.flip(0))
    torch.testing.assert_close(value, of(X, X.flip(0)))
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], expected)


@pytest.mark.parametrize("name", ["ddpm", "adm"])
def test_a_network_compiles_whole_and_through_autocast(name):
    net, args = network(name), inputs(name)
    expected = net(*args)
    torch.testing.assert_close(compiled(net)(*args), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = net.fuse_blocks()(*args)
    assert ((cast.float() - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_sampling_under_a_mode(mode):
    net = network("ddpm")
    expected = DDIMSampler(SCHEDULE, 3).sample(net, (2, 3, 16, 16))
    for each in (net, optimize(net)):
        with mode():
            got = DDIMSampler(SCHEDULE, 3).sample(each, (2, 3, 16, 16))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_functional_use(fused):
    """functional_call, with parameters that are not the module's own.

    torch.func.grad takes a network in plain torch only: torch has it refuse operators that are
    registered with torch.library, as ours are, whoever's they are.
    """
    net, (x, t) = network("ddpm").fuse_blocks(fused), inputs("ddpm")
    parameters = {k: (v.detach() * 1.1).requires_grad_() for k, v in net.named_parameters()}
    t = t % 100

    def loss(parameters):
        out = torch.func.functional_call(net, parameters, (x, t))
        return (out - x).square().mean()

    other = copy.deepcopy(net)
    other.load_state_dict(parameters)
    (other(x, t) - x).square().mean().backward()
    wanted = {name: p.grad for name, p in other.named_parameters()}
    got = dict(
        zip(parameters, torch.autograd.grad(loss(parameters), parameters.values()), strict=True)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    if not fused:
        torch.testing.assert_close(torch.func.grad(loss)(parameters), wanted, rtol=1e-3, atol=1e-5)


OBJECTS = {
    "schedule": lambda: SCHEDULE,
    "table": lambda: SAMPLERS["ddim"]().table,
    **SAMPLERS,
    **{f"{name} loss": make for name, make in LOSSES.items()},
    "network": lambda: network("ddpm"),
    "engine": lambda: optimize(network("ddpm")),
}


def used(name, thing):
    """Numbers that an object makes."""
    if name == "schedule":
        return torch.from_numpy(thing.alpha)
    if name == "table":
        return thing.tensor()
    if name in SAMPLERS:
        return thing.sample(model, X.shape, seed=3)
    if "loss" in name:
        return thing(model, X, seed=3)
    with torch.no_grad():
        return thing(X, T)


@pytest.mark.parametrize("name", OBJECTS)
def test_copies_and_pickles_do_the_same(name):
    thing = OBJECTS[name]()
    for _ in range(2):  # fresh, and after use
        expected = used(name, thing)
        for again in (copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
            torch.testing.assert_close(used(name, again), expected, rtol=1e-4, atol=1e-4)


class Noised(Dataset):
    """Noises its images in the worker, on our op, and draws from a sampler."""

    def __init__(self):
        self.images, self.sampler = torch.rand(8, 3, 8, 8), SAMPLERS["ddpm"]()

    def __len__(self):
        return 8

    def __getitem__(self, k):
        x_t, _ = ops.noising(self.images[k : k + 1], T[:1], SCHEDULE, seed=k)
        return x_t[0], self.sampler.sample(model, (1, 3, 8, 8), first_index=k)[0]


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_data_loader_workers(start):
    data = Noised()
    data[0]  # the parent's threads have run
    loader = DataLoader(data, 4, num_workers=2, multiprocessing_context=start, timeout=60)
    for k, both in enumerate(loader):
        for j, part in enumerate(both):
            expected = torch.stack([data[i][j] for i in range(4 * k, 4 * k + 4)])
            torch.testing.assert_close(part, expected)


def _in_child(queue, sampler, net):
    queue.put(sampler.sample(net, (1, 3, 16, 16), seed=1).tolist())


def test_a_spawned_process_gets_a_sampler_and_an_engine():
    sampler, net = SAMPLERS["ddim"](), optimize(network("ddpm"))
    expected = sampler.sample(net, (1, 3, 16, 16), seed=1)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, sampler, net))
    child.start()
    got = torch.tensor(queue.get(timeout=120))
    child.join(60)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_patched_network_compiles_whole():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    expected = net(X, T).sample
    fastdiff.patch(net)
    got = compiled(lambda x, t: net(x, t, return_dict=False)[0])(X, T)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
