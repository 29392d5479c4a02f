"""The U-Net against published parameter counts, diffusers, and its own contract."""

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor, nn

from fastdiff import NoiseSchedule, optimize
from fastdiff.models import UNet, UNetConfig
from fastdiff.models.blocks import ResBlock

SMALL = UNetConfig(
    image_size=16,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    heads=2,
    num_classes=10,
    norm_groups=8,
)


def randomised(model: nn.Module) -> nn.Module:
    """No zero-initialised layer left, so that every parameter matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            scale = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def inputs(config: UNetConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (batch, config.in_channels, config.image_size, config.image_size)
    t = torch.tensor([0, 431, 999])[:batch]
    return torch.randn(size, generator=generator), t, torch.tensor([3, -1, 9])[:batch]


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (UNetConfig.ddpm_cifar10(), 35.746307),  # Ho et al. 2020, "35.7 million"
        (UNetConfig.adm(64), 296),  # Dhariwal & Nichol 2021, tables 4 and 11
        (UNetConfig.adm(128), 422),
        (UNetConfig.adm(256), 554),
    ],
)
def test_published_parameter_counts(config, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(config).parameters())
    assert round(count / 1e6, 6 if isinstance(millions, float) else 0) == millions


def test_names_are_guided_diffusions():
    # level, name and shape as in 64x64_diffusion.pt
    with torch.device("meta"):
        state = {k: tuple(v.shape) for k, v in UNet(UNetConfig.adm(64)).state_dict().items()}
    expected = {
        "time_embed.0.weight": (768, 192),
        "label_emb.weight": (1000, 768),
        "input_blocks.0.0.weight": (192, 3, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (192,),
        "input_blocks.1.0.in_layers.2.weight": (192, 192, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (384, 768),
        "input_blocks.4.0.in_layers.2.weight": (192, 192, 3, 3),
        "input_blocks.5.0.skip_connection.weight": (384, 192, 1, 1),
        "input_blocks.5.1.qkv.weight": (1152, 384, 1),
        "input_blocks.5.1.proj_out.weight": (384, 384, 1),
        "middle_block.1.norm.weight": (768,),
        "output_blocks.0.0.in_layers.2.weight": (768, 1536, 3, 3),
        "output_blocks.3.2.out_layers.3.weight": (768, 768, 3, 3),
        "output_blocks.15.0.out_layers.0.weight": (192,),
        "out.0.weight": (192,),
        "out.2.weight": (6, 192, 3, 3),
    }
    assert {k: state.get(k) for k in expected} == expected


def test_attention_orders_are_permutations_of_each_other():
    legacy = randomised(UNet(SMALL))
    new = UNet(dataclasses.replace(SMALL, attention_order="new")).eval()
    state = {
        k: v.unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2) if ".qkv." in k else v
        for k, v in legacy.state_dict().items()
    }
    new.load_state_dict(state)
    x, t, cond = inputs(SMALL)
    with torch.inference_mode():
        torch.testing.assert_close(new(x, t, cond), legacy(x, t, cond))


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_is_the_textbook_one(heads):
    from fastdiff.models.blocks import AttentionBlock

    block = randomised(AttentionBlock(32, dataclasses.replace(SMALL, heads=heads))).double()
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    qkv = block.qkv(block.norm(x).flatten(2)).reshape(2 * heads, 3, 32 // heads, 15)
    q, k, v = (part * (32 // heads) ** -0.25 for part in qkv.unbind(1))
    weights = torch.softmax(q.transpose(1, 2) @ k, dim=-1)
    h = (v * (32 // heads) ** 0.25) @ weights.transpose(1, 2)
    expected = x + block.proj_out(h.reshape(2, 32, 15)).reshape(x.shape)
    torch.testing.assert_close(block(x), expected)


def test_starts_as_zero_and_blocks_as_the_identity():
    x, t, cond = inputs(SMALL)
    assert UNet(SMALL)(x, t, cond).abs().max() == 0
    h = torch.randn(2, 32, 8, 8)
    assert torch.equal(ResBlock(32, 32, SMALL)(h, torch.randn(2, 128)), h)


def test_rescaled_residual_is_the_plain_one_over_root_two():
    plain = randomised(ResBlock(32, 64, SMALL))
    rescaled = ResBlock(32, 64, dataclasses.replace(SMALL, rescale_residual=True)).eval()
    rescaled.load_state_dict(plain.state_dict())
    x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    torch.testing.assert_close(rescaled(x, emb), plain(x, emb) / math.sqrt(2))


def test_no_class_is_minus_one_and_the_default():
    model = randomised(UNet(SMALL))
    x, t, cond = inputs(SMALL)
    with torch.inference_mode():
        none = model(x, t)
        assert torch.equal(model(x, t, model.null_cond(cond)), none)
        given = model(x, t, cond)
        assert torch.equal(model.denoise(x, model.embed(t, cond)), given)
        for k, label in enumerate(cond):
            assert torch.equal(given[k], none[k]) == (label == -1)
        torch.testing.assert_close(model(x[1:2], t[1:2], cond[1:2])[0], given[1])
        assert torch.equal(model(x, t.float(), cond), given)


def test_learned_variance_doubles_the_output():
    config = dataclasses.replace(SMALL, learned_variance=True)
    x, t, cond = inputs(config)
    assert config.out_channels == 6
    assert UNet(config)(x, t, cond).shape == (3, 6, 16, 16)


def test_both_predictions_are_merged_by_the_schedule():
    """sigma^2 x0 + alpha (x_t - sigma eps) is x0 where both are right (Salimans & Ho 2022)."""
    config = dataclasses.replace(SMALL, predict_both=True)
    model = randomised(UNet(config))
    x, t, cond = inputs(config)
    with pytest.raises(ValueError, match="schedule: predict_both needs it"):
        model(x, t, cond)
    model.schedule = schedule = NoiseSchedule.cosine(1000)
    x0, eps = model.denoise(x, model.embed(t, cond)).chunk(2, 1)
    alpha, sigma = (
        torch.tensor(c[t])[:, None, None, None] for c in (schedule.alpha, schedule.sigma)
    )
    merged = (sigma**2 * x0 + alpha * (x - sigma * eps)).float()
    assert merged.shape == x.shape
    torch.testing.assert_close(model(x, t, cond), merged)
    torch.testing.assert_close(optimize(model)(x, t, cond), merged, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x, t, cond) - merged).norm() < 0.03 * merged.norm()
    with pytest.raises(ValueError, match="both set; choose one"):
        dataclasses.replace(config, learned_variance=True)


def test_patches_are_channels_of_a_smaller_image():
    """Pixel (2i + a, 2j + b) is channel 2a + b of pixel (i, j), on the way in and out."""
    config = dataclasses.replace(SMALL, patch_size=2, in_channels=1)
    model = randomised(UNet(config))
    x, t, cond = inputs(config)
    inside = dataclasses.replace(config, patch_size=1, image_size=8, in_channels=4)
    plain = UNet(inside).eval()
    plain.load_state_dict(model.state_dict())
    places = [(a, b) for a in range(2) for b in range(2)]
    patched = torch.cat([x[:, :, a::2, b::2] for a, b in places], 1)
    expected = torch.empty_like(x)
    for k, (a, b) in enumerate(places):
        expected[:, :, a::2, b::2] = plain(patched, t, cond)[:, k : k + 1]
    torch.testing.assert_close(model(x, t, cond), expected)
    assert config.downsampling == 4 and config.side_at(1) == 4
    with pytest.raises(ValueError, match=r"18x18 pixels.*divisible by 4"):
        model(torch.zeros(1, 1, 18, 18), t[:1])


def test_dtypes_layouts_and_compile():
    model = randomised(UNet(SMALL))
    x, t, cond = inputs(SMALL)
    with torch.inference_mode():
        expected = model(x, t, cond)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t, cond), expected)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, t, cond)
        model.to(memory_format=torch.channels_last)
        last = model(x.to(memory_format=torch.channels_last), t, cond)
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
        low = model.bfloat16()(x.bfloat16(), t, cond)
    for output in (mixed, low):
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).norm() < 0.03 * expected.norm()


def bad_calls():
    x, t, cond = inputs(SMALL)
    yield "x of shape", ValueError, (x[0], t, cond)
    yield "x of shape", ValueError, (x[:, :1], t, cond)
    yield "divisible by 2", ValueError, (x[..., :15], t, cond)
    yield "x of dtype", TypeError, (x.half(), t, cond)
    yield "x on meta", ValueError, (x.to("meta"), t, cond)
    yield "t of shape", ValueError, (x, t[0], cond)
    yield "t of dtype", TypeError, (x, t > 0, cond)
    yield "cond of shape", ValueError, (x, t, cond[:2])
    yield "cond of dtype", TypeError, (x, t, cond.int())
    yield "labels -1 .. 10", ValueError, (x, t, cond + torch.tensor([0, 0, 1]))
    yield "labels -2 .. 9", ValueError, (x, t, cond - torch.tensor([0, 1, 0]))


@pytest.mark.parametrize(("message", "error", "arguments"), list(bad_calls()))
def test_bad_calls_are_refused(message, error, arguments):
    with pytest.raises(error, match=re.escape(message)):
        UNet(SMALL)(*arguments)


def test_labels_of_an_unconditional_model_are_refused():
    x, t, cond = inputs(SMALL)
    with pytest.raises(ValueError, match="unconditional"):
        UNet(dataclasses.replace(SMALL, num_classes=None))(x, t, cond)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels=0: must be 1 or more"),
        ({"channels": 33}, ValueError, "must be even"),
        ({"channels": "32"}, TypeError, "channels='32': must be int"),
        ({"patch_size": 0}, ValueError, "patch_size=0: must be 1 or more"),
        ({"patch_size": 16}, ValueError, "divisible by 32, which 2 levels of patch_size=16"),
        ({"channel_mult": ()}, ValueError, "channel_mult=()"),
        ({"channel_mult": [1, 2]}, TypeError, "must be tuple[float, ...]"),
        ({"channel_mult": (1, 0)}, ValueError, "channel_mult=(1, 0): must be above 0"),
        ({"channel_mult": (0.3,)}, ValueError, "a whole number of channels"),
        ({"image_size": 15}, ValueError, "divisible by 2"),
        ({"attention_resolutions": (7,)}, ValueError, "[7] must be among"),
        ({"attention_order": "old"}, ValueError, "attention_order='old'"),
        ({"heads": 3}, ValueError, "heads=3: must divide the 64 channels"),
        ({"head_channels": 48}, ValueError, "head_channels=48"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"num_classes": 0}, ValueError, "num_classes=0"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps=0.0"),
    ],
)
def test_bad_configurations_are_refused(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        dataclasses.replace(SMALL, **change)


def test_configuration_survives_json():
    config = UNetConfig.adm(256)
    assert UNetConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"no fields \['depth'\]"):
        UNetConfig.from_json({"depth": 3})
    with pytest.raises(ValueError, match=r"image_size=32: must be one of 64, 128, 256"):
        UNetConfig.adm(32)
