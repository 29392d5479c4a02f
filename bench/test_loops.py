"""What users call, through pytest-benchmark: `pytest bench/`, not part of `make test`."""

import pytest
import torch

from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DiffusionLoss,
    NoiseSchedule,
    UNet,
    load,
    optimize,
)

SHIPPED = "fashion-mnist"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 16])
def test_a_call(benchmark, batch, dtype):
    network = optimize(load(SHIPPED), dtype)
    x, t, cond = torch.randn(batch, 1, 32, 32), torch.full((batch,), 500), torch.arange(batch) % 10
    with torch.no_grad():
        network(x, t, cond)  # the first call settles the engine's choices
        out = benchmark(network, x, t, cond)
    assert out.shape == x.shape


@pytest.mark.parametrize("kind", [DDIMSampler, DDPMSampler])
@pytest.mark.parametrize("guidance", [None, 1.0], ids=["plain", "guided"])
def test_sampling(benchmark, kind, guidance):
    network = optimize(load(SHIPPED), "bfloat16")
    sampler = kind(network.schedule, 10, prediction=network.prediction)
    how = {"cond": torch.arange(16) % 10, "guidance": guidance}
    sampler.sample(network, (16, 1, 32, 32), **how)
    x = benchmark(sampler.sample, network, (16, 1, 32, 32), **how)
    assert x.isfinite().all()


def test_the_loop_of_a_free_network(benchmark):
    sampler = DDIMSampler(NoiseSchedule.cosine(1000), 50)
    x = benchmark(sampler.sample, lambda x, t: x, (1, 3, 32, 32))
    assert x.isfinite().all()


def test_a_step_of_training(benchmark):
    shipped = load(SHIPPED)
    model = UNet(shipped.config).fuse_blocks().train()
    loss = DiffusionLoss(shipped.schedule, "v")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    x0, cond = torch.randn(32, 1, 32, 32), torch.arange(32) % 10

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(model, x0, cond=cond)
        found.backward()
        optimizer.step()
        return found

    step()
    assert benchmark(step).isfinite()
