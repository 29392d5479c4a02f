"""UNet.compile_blocks: blocks as single graphs around our ops, equal to plain torch."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import UNet, UNetConfig
from fastdiff.models.blocks import AttentionBlock, Block, ResBlock

SMALL = UNetConfig(
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    norm_groups=4,
    image_size=16,
    num_classes=3,
)


@pytest.fixture(autouse=True)
def reset():
    torch.compiler.reset()


def networks(**changes):
    """The same network twice: in plain torch, and with its blocks compiled."""
    torch.manual_seed(0)
    plain = UNet(SMALL.__class__(**{**vars(SMALL), **changes}))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(plain).compile_blocks(backend="aot_eager")
    return plain, ours


def inputs():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 900]), torch.tensor([1, -1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_shift": False, "rescale_residual": True},
        {"attention_order": "legacy", "resblock_updown": True},
    ],
)
def test_values_and_gradients_are_those_of_plain_torch(changes):
    plain, ours = networks(**changes)
    outputs = [network(*inputs()) for network in (plain, ours)]
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-4 * float(outputs[0].detach().abs().max()))
    for out in outputs:
        out.square().mean().backward()
    named = zip(plain.named_parameters(), ours.parameters(), strict=True)
    for (name, theirs), mine in named:
        scale = float(theirs.grad.abs().max())
        assert torch.allclose(theirs.grad, mine.grad, rtol=1e-3, atol=1e-4 * scale), name
    with torch.no_grad():
        assert torch.allclose(ours(*inputs()), outputs[0], rtol=1e-4, atol=1e-3)


def test_every_block_is_one_graph():
    """fullgraph raises where a block is not; each block holds what it compiled itself."""
    _, ours = networks()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    ours.compile_blocks(backend=backend)
    with torch.no_grad():
        ours(*inputs())
        blocks = [m for m in ours.modules() if isinstance(m, Block)]
        assert len(graphs) == len(blocks) > 8  # more than one cache of torch.compile holds
        ours(*inputs())
    assert len(graphs) == len(blocks)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def ours(ops):
    return [name.split(".")[1] for name in ops.names if name.startswith("fastdiff")]


def test_on_a_gpu_the_norm_is_a_part_of_the_projection():
    """On tensors that only say they are on a GPU."""
    block = AttentionBlock(32, SMALL)
    block.fused = True
    with FakeTensorMode(), torch.no_grad(), Ops() as ops:
        for module in block.modules():
            for name, value in module.named_parameters(recurse=False):
                there = torch.empty(value.shape, device="cuda")
                setattr(module, name, torch.nn.Parameter(there))
        out = block(torch.randn(2, 32, 8, 8, device="cuda"))
    assert out.shape == (2, 32, 8, 8) and out.device.type == "cuda"
    assert ours(ops) == ["group_norm_linear", "attention"]


def test_with_gradients_the_norm_is_an_op_of_its_own():
    block = AttentionBlock(32, SMALL)
    block.fused = True
    with Ops() as ops:
        block(torch.randn(2, 32, 8, 8))
    assert ours(ops) == ["group_norm_silu", "attention"]


def test_a_residual_block_on_our_ops_has_two_norms():
    with torch.no_grad(), Ops() as ops:
        block = ResBlock(16, 32, SMALL)
        block.fused = True
        block(torch.randn(2, 16, 8, 8), torch.randn(2, SMALL.embedding_channels))
    assert ours(ops) == ["group_norm_silu"] * 2
    assert not any("native_group_norm" in name for name in ops.names)


def test_state_and_call_stay():
    plain, ours = networks()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        assert torch.allclose(copied(*inputs()), ours(*inputs()), atol=1e-5)
