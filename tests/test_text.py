"""Networks that are told captions: the text encoder, and what reaches the U-Net of it."""

import copy
import dataclasses
import re

import pytest
import torch
from test_unet import SMALL as UNTOLD
from test_unet import randomised
from torch import nn

import fastdiff
from fastdiff import DDIMSampler, DDPMSampler, NoiseSchedule, TrainConfig, Trainer, UNet, optimize
from fastdiff.data import ImageSet
from fastdiff.data.captions import tokenize
from fastdiff.models.blocks import AttentionBlock
from fastdiff.models.text import END, PAD, START, TextEncoder, empty_captions

SMALL = dataclasses.replace(UNTOLD, num_classes=None, vocabulary=20, text_length=5)
T = torch.tensor([0, 431, 999])
TOKENS = torch.tensor([[1, 7, 8, 2, 0], [1, 9, 2, 0, 0], [1, 5, 4, 3, 2]])


def image(batch=3, channels=3):
    return torch.randn(batch, channels, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    return randomised(UNet(SMALL))


def test_the_encoder_is_torchs_transformer_between_embeddings_and_a_norm():
    ours = randomised(TextEncoder(SMALL)).double()
    width = SMALL.embedding_channels
    how = {"activation": "gelu", "batch_first": True, "norm_first": True, "dtype": torch.float64}
    layer = nn.TransformerEncoderLayer(width, SMALL.heads, 4 * width, 0.0, **how)
    norm = nn.LayerNorm(width).double()
    theirs = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    names = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "proj_out.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "norm.": "final_ln.",
        "layers.": "blocks.",
    }
    state = ours.state_dict()
    given = {}
    for name in theirs.state_dict():
        own = name
        for old, new in names.items():
            own = re.sub(rf"\b{re.escape(old)}", new, own)
        given[name] = state[own]
    theirs.load_state_dict(given)
    x = state["token_embedding.weight"][TOKENS] + state["positional_embedding"]
    torch.testing.assert_close(ours(TOKENS), theirs(x))


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_tokens_have_keys_and_values_before_the_pixels(order):
    """softmax(q [k_text; k]') [v_text; v], head by head."""
    heads, size, width = 2, 16, SMALL.embedding_channels
    config = dataclasses.replace(SMALL, heads=heads, attention_order=order)
    block = randomised(AttentionBlock(32, config)).double()
    x, text = torch.randn(2, 32, 3, 5).double(), torch.randn(2, 4, width).double()
    qkv, kv = block.qkv(block.norm(x).flatten(2)), block.encoder_kv(text.mT)
    expected = torch.empty(2, 32, 15, dtype=torch.float64)
    for head in range(heads):

        def rows(part, parts, head=head):
            place = head * parts + part if order == "legacy" else part * heads + head
            return slice(size * place, size * (place + 1))

        q, k, v = (qkv[:, rows(part, 3)] for part in range(3))
        k = torch.cat((kv[:, rows(0, 2)], k), 2)
        v = torch.cat((kv[:, rows(1, 2)], v), 2)
        weights = torch.softmax(q.mT @ k / size**0.5, -1)
        expected[:, size * head : size * (head + 1)] = v @ weights.mT
    torch.testing.assert_close(block(x, text), x + block.proj_out(expected).reshape(x.shape))


def test_without_a_vocabulary_nothing_is_there_and_with_it_only_text_is_added():
    with torch.device("meta"):
        without = UNet(dataclasses.replace(UNTOLD, num_classes=None)).state_dict()
        added = UNet(SMALL).state_dict().keys() - without.keys()
    assert all("encoder_kv" in k or k.startswith(("text.", "text_proj.")) for k in added)
    assert sum("encoder_kv" in k for k in added) == 2 * 4  # one down, one in the middle, two up
    assert UNet(SMALL).state_dict().keys() - added == without.keys()


@pytest.mark.parametrize("silent", ["encoder_kv", "text_proj", "both"])
def test_text_comes_by_attention_and_by_the_embedding(model, silent):
    for name, parameter in model.named_parameters():
        if any(n in name for n in ("encoder_kv", "text_proj") if silent in (n, "both")):
            nn.init.zeros_(parameter)
    with torch.no_grad():
        a, b = model(image(), T, TOKENS), model(image(), T, TOKENS.flip(0))
    assert torch.equal(a[1], b[1])  # whose caption is the same
    assert torch.equal(a[0], b[0]) == (silent == "both")


def test_the_embedding_has_the_last_tokens_state(model):
    with torch.no_grad():
        text = model.read(TOKENS, 3)
        emb = model.embed(T, text=text)
        last = model.text_proj(model.text(TOKENS)[:, -1])
        torch.testing.assert_close(emb, model.time_embed(model._waves(T)) + last)
        assert torch.equal(model.denoise(image(), emb, text), model(image(), T, TOKENS))


def test_no_caption_is_the_empty_one(model):
    null = model.null_cond(TOKENS)
    assert null.tolist() == 3 * [[START, END, PAD, PAD, PAD]]
    assert torch.equal(empty_captions(2, 6), tokenize(["", ""]))
    with torch.no_grad():
        assert torch.equal(model(image(), T), model(image(), T, null))
        torch.testing.assert_close(
            model(image(), T, TOKENS)[:1], model(image(1), T[:1], TOKENS[:1])
        )


def test_fused_blocks_have_the_same_values_and_gradients(model):
    fused = copy.deepcopy(model).fuse_blocks()
    outputs = [network(image(), T, TOKENS) for network in (model, fused)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for out in outputs:
        out.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
        scale = float(p.grad.abs().max())
        assert scale > 0, name
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4 * scale), name
    fused.recompute = True
    torch.testing.assert_close(fused(image(), T, TOKENS), outputs[1])


def test_optimized_it_is_told_captions_too(model):
    """tests/test_engine.py has its precision; here are calls in turn, and guided samples."""
    fast = optimize(model)
    with torch.no_grad():
        for cond in (TOKENS, TOKENS.flip(0), None, TOKENS):
            expected = model(image(), T, cond)
            torch.testing.assert_close(fast(image(), T, cond), expected, rtol=1e-3, atol=1e-3)
    sampler = DDIMSampler(NoiseSchedule.cosine(1000), 4, prediction="v", clip=1.0)
    how = {"shape": (3, 3, 16, 16), "cond": TOKENS, "guidance": 1.0}
    torch.testing.assert_close(
        sampler.sample(fast, **how), sampler.sample(model, **how), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match=r"cond with tokens 0 \.\. 25: must be 0 \.\. 19"):
        fast(image(), T, TOKENS + torch.where(TOKENS == 7, 18, 0))


def test_compiles_and_computes_in_bfloat16(model):
    with torch.no_grad():
        expected = model(image(), T, TOKENS)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(image(), T, TOKENS), expected)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.fuse_blocks()(image(), T, TOKENS)
        low = model.fuse_blocks(False).bfloat16()(image().bfloat16(), T, TOKENS)
    for out in (mixed, low):
        assert (out.float() - expected).norm() < 0.03 * expected.norm()


def test_guidance_leaves_the_learned_variance_as_the_caption_has_it():
    """A textbook loop of GLIDE's: eps is extrapolated, v is the conditional half's."""
    model = randomised(UNet(dataclasses.replace(SMALL, learned_variance=True)))
    schedule, w = NoiseSchedule.cosine(1000), 1.5

    def guided(x, t):
        x, when = x.float(), torch.full((3,), int(t))
        eps, v = model(x, when, TOKENS).chunk(2, 1)
        eps_u, v_u = model(x, when, model.null_cond(TOKENS)).chunk(2, 1)
        assert not torch.allclose(v, v_u, rtol=1e-2)
        return torch.cat(((1 + w) * eps - w * eps_u, v), 1)

    sampler = DDPMSampler(schedule, 5, "learned_range", "trailing", clip=1.0)
    x_T = image()
    got = sampler.sample(model, (3, 3, 16, 16), x_T=x_T, cond=TOKENS, guidance=w)
    again = DDPMSampler(schedule, 5, "learned_range", "trailing", clip=1.0)
    x = x_T
    with torch.no_grad():
        for i, t in enumerate(again.timesteps):
            x = again.step(guided(x, t), i, x)
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        (TOKENS[:2], ValueError, "cond of shape (2, 5): must be (3, 5)"),
        (TOKENS[:, :4], ValueError, "cond of shape (3, 4): must be (3, 5)"),
        (TOKENS[:, 0], ValueError, "cond of shape (3,): must be (3, 5)"),
        (TOKENS.int(), TypeError, "cond of dtype torch.int32: must be int64 tokens"),
        (TOKENS - 1, ValueError, "cond with tokens -1 .. 8: must be 0 .. 19"),
        (TOKENS + 15, ValueError, "cond with tokens 15 .. 24: must be 0 .. 19"),
    ],
)
def test_bad_captions_are_refused(model, cond, error, message):
    with pytest.raises(error, match=re.escape(message)):
        model(image(), T, cond)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, "num_classes, vocabulary: are both set"),
        ({"vocabulary": 2}, "vocabulary=2, text_length=5: must be 3 and 2 or more"),
        ({"text_length": 1}, "vocabulary=20, text_length=1: must be"),
        ({"vocabulary": 0}, "vocabulary=0: must be 1 or more"),
        ({"text_layers": 0}, "text_layers=0: must be 1 or more"),
        ({"head_channels": 64, "channels": 24}, "head_channels=64: must divide the 96 channels"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(SMALL, **change)


TINY = dataclasses.replace(
    SMALL, image_size=8, channels=8, attention_resolutions=(), heads=1, in_channels=1
)
DATA = ImageSet(
    torch.arange(6, dtype=torch.uint8).mul(40).reshape(6, 1, 1, 1).expand(6, 1, 8, 8).contiguous(),
    torch.tensor([[1, 3 + k, 2, 0, 0] for k in range(6)]),
)
CONFIG = TrainConfig(
    steps=60, batch_size=12, lr=5e-3, warmup=0, ema=0.5, label_dropout=0.2, save_every=0
)


def test_a_network_learns_what_captions_say_and_is_saved_and_loaded(tmp_path):
    """Six flat images, told apart by their captions alone at the last level, where x is noise."""
    schedule = NoiseSchedule.cosine(10)
    torch.manual_seed(0)
    run = Trainer(UNet(TINY), schedule, DATA, CONFIG, tmp_path)
    run.fit(progress=False)
    model = fastdiff.load(tmp_path)
    assert model.config == TINY
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        v = model(x, torch.full((6,), 9), DATA.labels)
    told = -v.mean((1, 2, 3))  # v = alpha eps - sigma x0
    values = torch.arange(6) * 40 / 127.5 - 1
    assert torch.corrcoef(torch.stack((told, values)))[0, 1] > 0.9
    torch.testing.assert_close(run.ema(x, torch.full((6,), 9), DATA.labels), v)


def test_captions_are_dropped_for_the_empty_one_and_drawn(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, batch_size=500, steps=2, sample_every=1, sample_steps=1)
    run = Trainer(UNet(TINY), NoiseSchedule.cosine(10), DATA, config, tmp_path)
    seen, forward = [], run.model.forward

    def spying(x, t, cond):
        seen.append(cond)
        return forward(x, t, cond)

    monkeypatch.setattr(run.model, "forward", spying)
    run.fit(progress=False)
    given = run.data.batch(0, 500, config.seed)[1]
    dropped = seen[0].eq(empty_captions(500, 5)).all(1)
    assert 60 < dropped.sum() < 140
    assert torch.equal(seen[0][~dropped], given[~dropped])
    assert (tmp_path / "samples-000001.png").is_file()


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (dataclasses.replace(DATA, labels=None), TINY, "data without labels: the model is told"),
        (
            DATA,
            dataclasses.replace(TINY, text_length=4),
            "the labels of data of shape (6, 5): must",
        ),
        (DATA, dataclasses.replace(TINY, vocabulary=8), "the labels of data with tokens 0 .. 8"),
        (
            DATA,
            dataclasses.replace(TINY, vocabulary=None, num_classes=9),
            "data with captions: the model has classes",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path, data, model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Trainer(UNet(model), NoiseSchedule.cosine(10), data, CONFIG, tmp_path)


def test_a_student_of_captions_is_refused_by_name(tmp_path):
    teacher = UNet(TINY)
    teacher.schedule, teacher.prediction = NoiseSchedule.cosine(10), "v"
    with pytest.raises(ValueError, match="teacher: is told captions"):
        fastdiff.distill(teacher, None, 4, 2, DATA, tmp_path)
