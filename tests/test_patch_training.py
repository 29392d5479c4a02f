"""A patched network trains as it did, to rounding, on our ops."""

import copy

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.inplace import FusedConv2d

diffusers = pytest.importorskip("diffusers")

UNETS = {
    "plain": {},
    "labels": {"num_class_embeds": 10, "attention_head_dim": 16},
    "scale_shift": {
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "text": {},
}


def unet(name):
    torch.manual_seed(0)
    shape = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
    if name == "text":
        blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        return diffusers.UNet2DConditionModel(
            **shape,
            down_block_types=blocks[0],
            up_block_types=blocks[1],
            cross_attention_dim=24,
            attention_head_dim=4,
        )
    attending = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**{**shape, **attending, **UNETS[name]})


def loss_and_gradients(network, name, dtype=torch.float32):
    """As float64 numbers: the loss of a fixed batch, and every gradient."""
    generator = torch.Generator().manual_seed(1)
    exact = next(network.parameters()).dtype
    channels = 4 if name == "text" else 3
    x = torch.randn(4, channels, 16, 16, generator=generator).to(exact)
    target = torch.randn(x.shape, generator=generator).to(exact)
    more = ()
    if name == "text":
        more = (torch.randn(4, 5, 24, generator=generator).to(exact),)
    if name == "labels":
        more = (torch.tensor([0, 3, 9, 9]),)
    network.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = network(x, torch.tensor([1, 50, 500, 999]), *more).sample
    loss = (output.to(exact) - target).square().mean()
    loss.backward()
    return torch.cat([loss.view(1), *(p.grad.flatten() for p in network.parameters())]).double()


def error(got, truth):
    return ((got - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", UNETS)
def test_float32_is_as_near_float64_as_it_was(name):
    network = unet(name)
    truth = loss_and_gradients(copy.deepcopy(network).double(), name)
    theirs = loss_and_gradients(network, name)
    fastdiff.patch(network)
    mine = loss_and_gradients(network, name)
    assert error(mine, truth) < 3 * error(theirs, truth) < 1e-4
    assert abs(mine[0] - truth[0]) < 1e-5 * truth[0]
    assert not mine.equal(theirs)  # by other arithmetic
    assert sum(isinstance(m, FusedConv2d) for m in network.modules()) > 5
    fastdiff.unpatch(network)
    assert loss_and_gradients(network, name).equal(theirs)
    assert {type(m) for m in network.modules()} == {type(m) for m in unet(name).modules()}


@pytest.mark.parametrize("name", UNETS)
def test_bfloat16_is_as_near_float64_as_it_was(name):
    network = unet(name)
    truth = loss_and_gradients(copy.deepcopy(network).double(), name)
    theirs = loss_and_gradients(network, name, torch.bfloat16)
    mine = loss_and_gradients(fastdiff.patch(network), name, torch.bfloat16)
    assert error(mine, truth) < 1.3 * error(theirs, truth)


def test_a_block_with_options_that_have_no_op_is_left_as_it_was():
    network = unet("plain")
    block = network.down_blocks[0].resnets[0]
    block.nonlinearity = nn.GELU()
    theirs = loss_and_gradients(network, "plain")
    mine = loss_and_gradients(fastdiff.patch(network), "plain")
    assert error(mine, theirs) < 1e-5


def test_an_adapter_in_a_block_is_used():
    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    network = fastdiff.patch(unet("plain"))
    block = network.down_blocks[0].resnets[0]
    adapter = Doubling(32, 32, 3, padding=1)
    adapter.load_state_dict(block.conv1.state_dict())
    block.conv1 = adapter
    mine = loss_and_gradients(network, "plain")
    theirs = loss_and_gradients(fastdiff.unpatch(network), "plain")
    assert error(mine, theirs) < 1e-5


def test_a_network_of_another_library_trains_by_its_convolutions():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 32, 1))
    x = torch.randn(4, 32, 16, 16)
    expected = network(x).square().mean()
    fastdiff.patch(network)
    assert type(network[0]) is FusedConv2d
    torch.testing.assert_close(network(x).square().mean(), expected)
    with torch.no_grad():  # not told the time, so no U-Net, and no engine
        torch.testing.assert_close(network.eval()(x).square().mean(), expected)
    assert type(fastdiff.unpatch(network)[0]) is nn.Conv2d
