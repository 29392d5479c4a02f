"""The engine's parts: each rewrite keeps the graph's meaning; no two live values share memory."""

import random
from collections import Counter

import pytest
import torch
from networks import NETWORKS, inputs, network, run

from fastdiff.engine import fuse, layers, program
from fastdiff.engine.arena import ALIGNMENT, Block, Pool, place
from fastdiff.engine.capture import capture
from fastdiff.engine.simplify import simplify
from fastdiff.engine.sites import Weights

PASSES = (
    fuse._name_layers,
    fuse.hoist_images,
    fuse._embeddings,
    fuse._scale_shifts,
    fuse._activations,
    fuse._upsamplings,
    fuse._residuals,
    fuse.merge_siblings,
    fuse.widen_edges,
)


def value(captured, args):
    (out,) = captured.run(
        dict(zip(captured.inputs, args, strict=True)), captured.graph.output_node().args[0]
    )
    return out.double()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_rewrite_keeps_the_meaning(name):
    model, args = network(name), inputs(name)
    truth = run(model, *args)
    captured = capture(model, args, {})
    for rewrite in (simplify, *PASSES):
        rewrite(captured)
        captured.graph.eliminate_dead_code()
        captured.graph.lint()
        torch.testing.assert_close(value(captured, args), truth, rtol=1e-4, atol=1e-4)


def fused(name):
    captured = capture(network(name), inputs(name), {})
    simplify(captured)
    fuse.fuse(captured)
    return captured


def test_the_passes_of_fuse_are_those_tested_here(monkeypatch):
    ran = []
    for rewrite in PASSES:
        spy = lambda captured, rewrite=rewrite: ran.append(rewrite)  # noqa: E731
        monkeypatch.setattr(fuse, rewrite.__name__, spy)
    fuse.fuse(capture(network("ddpm"), inputs("ddpm"), {}))
    assert ran == list(PASSES)


@pytest.mark.parametrize("name", ["ddpm", "adm", "UNet2DModel"])
def test_what_is_done_at_a_step_is_layers_alone(name):
    """No sum, product, activation, upsampling or cast of images is left between the layers."""
    captured = fused(name)
    depends, image = captured.depends(), captured.inputs[0]
    left = Counter(
        getattr(n.target, "_opname", n.target.__name__)
        for n in captured.graph.nodes
        if n.op == "call_function" and image in depends[n] and n.target not in program.VIEWS
    )
    names = {"conv", "norm", "attention", "linear", "cat", "constant_pad_nd"}
    if name == "adm":  # its blocks resample their skips
        names |= {"upsample_nearest2d", "avg_pool2d"}
    if name != "adm":
        names |= {"pad"}
    assert set(left) <= names, left
    residuals = sum(n.target is layers.conv and len(n.args) == 4 for n in captured.graph.nodes)
    blocks = sum(type(m).__name__ in ("ResBlock", "ResnetBlock2D", "AttentionBlock", "Attention")
                 for m in network(name).modules())  # fmt: skip
    assert residuals == blocks


def test_the_embeddings_are_one_layer_outside_the_steps():
    captured = fused("adm")
    planned = program.Program(captured, torch.float32, "high", Weights())
    assert [n.target for n in planned.embedding.nodes] == [layers.linear]
    widths = [m.out_channels * 2 for n, m in network("adm").named_modules()
              if n.endswith("in_layers.2")]  # fmt: skip
    assert planned.embedding.nodes[0].meta["val"].shape == (2, sum(widths))


def test_concatenations_are_written_in_place():
    planned = program.Program(fused("ddpm"), torch.float32, "high", Weights())
    assert not [whole for _, whole in planned.steps if whole is not None]


def test_live_blocks_do_not_overlap():
    generator = random.Random(0)
    for _ in range(50):
        blocks = []
        for _ in range(40):
            first = generator.randrange(60)
            blocks.append(
                Block(generator.randrange(1, 5000), first, first + generator.randrange(9))
            )
        total = place(blocks)
        for i, a in enumerate(blocks):
            assert a.offset % ALIGNMENT == 0 and a.offset >= 0 and a.offset + a.size <= total
            for b in blocks[:i]:
                apart = a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
                assert apart or a.last < b.first or b.last < a.first
        alive = [sum(b.size for b in blocks if b.first <= t <= b.last) for t in range(70)]
        assert max(alive) <= total <= 1.5 * max(alive)


def test_the_arena_is_far_smaller_than_all_values():
    planned = program.Program(fused("ddpm"), torch.float32, "high", Weights())
    assert planned.bytes < sum(block.size for block in planned.blocks) / 2


def test_pooled_weights_keep_their_values():
    pool = Pool()
    values = [torch.randn(n) for n in (3, 1000, 2**18)]
    kept = [pool.keep(v) for v in values]
    for a, b in zip(kept, values, strict=True):
        assert torch.equal(a, b) and a.data_ptr() % ALIGNMENT == 0 and a.data_ptr() != b.data_ptr()
