"""UNet.fuse_blocks and compile_blocks: blocks on our ops, alone or as one graph: plain torch's."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
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


def networks(compiled=True, **changes):
    """The same network twice: in plain torch, and with its blocks fused, or compiled as well."""
    torch.manual_seed(0)
    plain = UNet(SMALL.__class__(**{**vars(SMALL), **changes}))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(plain)
    return plain, ours.compile_blocks(backend="aot_eager") if compiled else ours.fuse_blocks()


def inputs():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 900]), torch.tensor([1, -1])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "fused"])
@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 32},  # which Winograd's convolution takes
        {"scale_shift": False, "rescale_residual": True},
        {"attention_order": "legacy", "resblock_updown": True},
    ],
)
def test_values_and_gradients_are_those_of_plain_torch(changes, compiled):
    plain, ours = networks(compiled, **changes)
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


def names(ops):
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
    assert names(ops) == ["group_norm_linear", "attention"]


def test_with_gradients_the_norm_is_an_op_of_its_own():
    block = AttentionBlock(32, SMALL)
    block.fused = True
    with Ops() as ops:
        block(torch.randn(2, 32, 8, 8))
    assert names(ops) == ["group_norm_silu", "attention"]


def test_a_residual_block_on_our_ops_has_two_norms():
    with torch.no_grad(), Ops() as ops:
        block = ResBlock(16, 32, SMALL)
        block.fused = True
        block(torch.randn(2, 16, 8, 8), torch.randn(2, SMALL.embedding_channels))
    assert names(ops) == ["group_norm_silu"] * 2
    assert not any("native_group_norm" in name for name in ops.names)


def test_state_and_call_stay():
    plain, ours = networks()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        assert torch.allclose(copied(*inputs()), ours(*inputs()), atol=1e-5)


def test_fused_blocks_convolve_norm_and_attend_by_our_ops():
    _, ours = networks(compiled=False, channels=32)
    with Ops() as ops:
        ours(*inputs()).square().mean().backward()
    used = set(names(ops))
    assert {"group_norm_silu", "group_norm_silu_backward", "attention_backward"} <= used
    if fastdiff.ops.conv3x3_available(torch.float32):
        assert {"conv3x3", "conv3x3_weight_gradient"} <= used
    assert not any("native_group_norm" in name for name in ops.names)
    ours.fuse_blocks(False)
    with Ops() as ops:
        ours(*inputs())
    assert not names(ops)


def test_recomputing_keeps_less_and_changes_nothing():
    """Dropout's masks included."""
    network = networks(compiled=False, channels=32, dropout=0.3)[1]
    kept, gradients, losses = [], [], []
    for network.recompute in (False, True):
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        network.zero_grad()
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(*inputs()).square().mean()
        loss.backward()
        kept.append(sum(sizes.values()))
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert torch.equal(*losses)
    assert all(map(torch.equal, *gradients))
    assert kept[1] < 0.5 * kept[0]


def test_a_fused_network_is_optimized_as_a_plain_one():
    plain, ours = networks(compiled=False)
    plain, ours = plain.eval(), ours.eval()
    with torch.no_grad():
        fast = fastdiff.optimize(ours)(*inputs())
        assert torch.allclose(fast, plain(*inputs()), rtol=1e-4, atol=1e-3)
    assert ours.fused and ours.middle_block[0].fused
