"""The host never waits for the device: it reads nothing back, and sends only before the rows.

Checked on the CPU; on fake tensors of a GPU, where there is none; on the meta device, which has no
data to read; and on a GPU in torch's own debug mode.
"""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    HeunSampler,
    LangevinSampler,
    NoiseSchedule,
    UNet,
    UNetConfig,
    ops,
    sampler,
)
from fastdiff.integrations import diffusers
from fastdiff.losses import DiffusionLoss

SHAPE = (2, 3, 8, 8)
READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class NoWaiting(TorchDispatchMode):
    """Raises where a value is read back, where a copy leaves the device or makes the host wait for
    it, and, once `rows` have begun, for any copy between devices."""

    rows = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in READ_BACK:
            raise AssertionError(f"{name}: reads a value back")
        devices = [leaf.device for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)]
        made = [leaf.device for leaf in tree_leaves(out) if is_tensor(leaf)]
        if name in ("copy_", "_to_copy") and len({*devices, *made}) > 1:
            at_once = kwargs.get("non_blocking") or any(a is True for a in args)
            waits = devices[-1].type != "cpu" or not at_once
            if waits or self.rows:
                raise AssertionError(f"{name}: from {devices[-1]} to {made[0]}")
        return out


def is_tensor(leaf):
    return isinstance(leaf, torch.Tensor)


class Debugged:
    """torch's own: an error for every operation that waits for the GPU."""

    rows = False

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")
        return self

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["cpu", "fake", "cuda"])
def place(request):
    """(device, what watches it)"""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    fake = request.param == "fake"
    with FakeTensorMode() if fake else nullcontext():
        device = torch.device("cpu" if request.param == "cpu" else "cuda:0")
        yield device, Debugged() if request.param == "cuda" else NoWaiting()
    sampler._streams.cache_clear()  # they may be fake


def schedule():
    """A new one for each test: what is cached for it may be fake."""
    return NoiseSchedule.cosine(1000)


RUNS = {
    "ddim": lambda: (DDIMSampler(schedule(), 5, prediction="v", clip=1.0), {}),
    "ddim-noisy": lambda: (DDIMSampler(schedule(), 5, eta=1.0, prediction="v"), {"seed": [1, 2]}),
    "ddpm": lambda: (DDPMSampler(schedule(), 5, prediction="v"), {}),
    "learned": lambda: (DDPMSampler(schedule(), 5, "learned_range", prediction="v"), {}),
    "dpmpp": lambda: (DPMSolverSampler(schedule(), 5, eta=1.0, prediction="v"), {}),
    "heun": lambda: (HeunSampler(schedule(), 3, prediction="v", S_churn=2.0), {}),
    "langevin": lambda: (LangevinSampler(NoiseSchedule.geometric(0.1, 2.0, 2), inner=2), {}),
    "guided": lambda: (DDIMSampler(schedule(), 5, prediction="v"), {"guidance": 1.5}),
    "interval": lambda: (
        DDPMSampler(schedule(), 5, prediction="v"),
        {"guidance": 1.5, "guidance_interval": (0.3, 3.0)},
    ),
    "classifier": lambda: (
        DDIMSampler(schedule(), 5, prediction="v", classifier_scale=0.5),
        {"gradient": lambda x, t, *cond: -x},
    ),
    "callback": lambda: (
        DDPMSampler(schedule(), 5, prediction="v"),
        {"callback": lambda row, x, x0: None},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_never_waits(name, place):
    device, watch = place
    sampler, how = RUNS[name]()
    x_T = torch.randn(SHAPE, device=device)
    if "guidance" in how:
        how["cond"] = how["uncond"] = torch.ones(len(x_T), device=device)

    def model(x, t, *cond):
        watch.rows = True
        x = torch.sin(x + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000)
        return torch.cat([x, x], 1) if name == "learned" else x

    with watch:
        first = sampler.sample(model, SHAPE, x_T=x_T, graph=False, **how)
        assert watch.rows and first.device == device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["ddpm", "dpmpp"])
def test_a_run_of_graphs_never_waits(name):
    sampler, _ = RUNS[name]()
    model = torch.nn.Conv2d(3, 3, 3, padding=1).cuda()
    model.forward = lambda x, t: torch.nn.Conv2d.forward(model, x)
    sampler.sample(model, SHAPE, graph=True)
    with Debugged():
        sampler.sample(model, SHAPE, seed=1, graph=True)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp"])
def test_steps_of_ones_own_loop_never_wait(name, place):
    device, watch = place
    if device.type == "cpu":
        pytest.skip("there a step checks its row, by reading it")
    sampler, _ = RUNS[name]()
    x = torch.randn(SHAPE, device=device)
    with watch:
        for i in range(3):
            x = sampler.step(x, i, x, seed=91)
            watch.rows = True
    assert x.shape == SHAPE


def test_noising_never_waits(place):
    device, watch = place
    if device.type == "cpu":
        pytest.skip("there it checks t, by reading it")
    x0, t = torch.randn(SHAPE, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with watch:
        for how in ({"seed": 3}, {"seed": [3, 4], "row": 5}, {"noise": x0}):
            x_t, target = ops.noising(x0, t, schedule(), "v", **how)
            assert x_t.shape == target.shape == SHAPE


def test_the_watch_sees_what_it_is_for(place):
    device, watch = place
    if isinstance(watch, Debugged):
        caught = RuntimeError
    else:
        caught = (AssertionError, torch._subclasses.fake_tensor.DataDependentOutputException)
    x = torch.ones(3, device=device)
    with watch:
        with pytest.raises(caught):
            x.sum().item()
        if device.type != "cpu":
            with pytest.raises(caught):
                x.to("cpu")
            with pytest.raises(caught):
                torch.ones(3).to(device)
            watch.rows = True
            if not isinstance(watch, Debugged):
                with pytest.raises(caught):
                    torch.ones(3).to(device, non_blocking=True)


def test_our_network_never_reads_back():
    """Nor asks for its null condition; on a device that has no data."""
    config = UNetConfig(image_size=8, in_channels=3, channels=8, channel_mult=(1, 2),
                        num_res_blocks=1, attention_resolutions=(4,), num_classes=4,
                        norm_groups=4)  # fmt: skip
    unet = UNet(config).eval().to("meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    sampler = DDPMSampler(schedule(), 3, prediction="v")
    out = sampler.sample(unet, SHAPE, cond=labels, guidance=1.0, graph=False)
    assert out.device.type == "meta" and out.shape == SHAPE


def test_noising_and_the_loss_never_read_back():
    x0, made = torch.zeros(SHAPE, device="meta"), schedule()
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    for how in ({}, {"seed": 3}, {"seed": [3, 4]}, {"noise": x0}):
        assert ops.noising(x0, t, made, **how)[0].device.type == "meta"
    for weighting in ("simple", "min_snr"):
        loss = DiffusionLoss(made, "v", weighting)
        assert loss(lambda x, t: x, x0).device.type == "meta"
    learned = DiffusionLoss(made, "v", "hybrid", learned_variance=True)
    for how in ({}, {"seed": 3, "row": 2}):
        assert learned(lambda x, t: torch.cat([x, x], 1), x0, **how).device.type == "meta"


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_scheduler_of_diffusers_reads_no_timestep_back(place, name):
    """As a pipeline runs it: told where it begins, each timestep a tensor of the device."""
    pytest.importorskip("diffusers")
    device, watch = place
    if device.type == "cpu":
        pytest.skip("the CPU's own values are looked at, which waits for nothing")
    with unset_fake_temporarily():
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(4)
        scheduler._schedule()
        here = scheduler._here[1]  # as set_timesteps keeps them for a device
    scheduler.timesteps = torch.tensor(here.tolist(), device=device)
    scheduler._here = scheduler.timesteps, here
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = torch.zeros(SHAPE, device=device)
    timesteps = scheduler.timesteps.unbind()
    with watch:
        for i, t in enumerate(timesteps):
            watch.rows = i > 0
            x = scheduler.step(x, t, x).prev_sample
    assert x.shape == SHAPE
