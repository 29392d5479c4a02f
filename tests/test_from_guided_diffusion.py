"""guided-diffusion's and improved-diffusion's checkpoints fit our networks, name by name.

The numbers are those of the original code's networks (`create_model`, `create_classifier`) for the
same flags: how many parameters, and a checksum of their names and shapes in order. Outputs were
compared once with the original's, with random weights, in all these cases: equal to 2e-6.
"""

import math
import pickle
import re
import zlib

import pytest
import torch
from safetensors.torch import save_file

from fastdiff import DDIMSampler, NoiseSchedule
from fastdiff.integrations.guided_diffusion import (
    classifier_config,
    classifier_from_guided_diffusion,
    from_guided_diffusion,
    unet_config,
)
from fastdiff.models import UNet, UNetConfig
from fastdiff.models.encoder import AttentionPool, EncoderUNet

SMALL = {"image_size": 64, "num_channels": 32, "num_heads": 4}
ALL = {"attention_resolutions": "32,16,8"}
HEADS = {"num_channels": 64, "num_head_channels": 32, "resblock_updown": True, **ALL}
CASES = [
    ({**SMALL, "class_cond": True, "learn_sigma": True}, 5901382, 1202511325),
    ({**SMALL, **ALL, "use_scale_shift_norm": False}, 5616931, 3344436683),
    (
        {**HEADS, "use_new_attention_order": True, "learn_sigma": True, "class_cond": True},
        25706950,
        2340030681,
    ),
    (HEADS, 25449219, 1326302427),
    ({**SMALL, **ALL, "image_size": 128, "num_res_blocks": 1}, 4123427, 3222739251),
    ({**HEADS, "image_size": 512, "num_res_blocks": 1}, 24648163, 3576060036),
    ({**SMALL, "image_size": 32, "dropout": 0.1}, 2490595, 223772206),  # improved-diffusion's
]
TINY = {"image_size": 8, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1}


def layout(model):
    lines = (f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    return sum(p.numel() for p in model.parameters()), zlib.crc32("\n".join(lines).encode())


def tiny(**flags):
    """A checkpoint of our own making, and the network it is of."""
    torch.manual_seed(0)
    model = UNet(unet_config(**TINY, num_classes=7, **flags)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) / 8)
    return model


@pytest.mark.parametrize(("flags", "parameters", "checksum"), CASES, ids=str)
def test_names_and_shapes_are_the_originals(flags, parameters, checksum):
    with torch.device("meta"):
        assert layout(UNet(unet_config(**flags))) == (parameters, checksum)


@pytest.mark.parametrize(
    ("pool", "updown", "sides", "parameters", "checksum"),
    [
        ("attention", True, "32,16,8", 7450408, 1259607932),
        ("adaptive", False, "16", 6191016, 64960152),
    ],
)
def test_the_classifiers_too(pool, updown, sides, parameters, checksum):
    config = classifier_config(
        classifier_width=64,
        classifier_depth=1,
        classifier_attention_resolutions=sides,
        classifier_resblock_updown=updown,
    )
    with torch.device("meta"):
        assert layout(EncoderUNet(config, 1000, pool)) == (parameters, checksum)


def test_the_pool_attends_from_the_mean():
    """The original's arithmetic: q and k scaled by ch^-1/4, every pixel asking, in float64."""
    torch.manual_seed(0)
    pool, x = AttentionPool(3, 16, 8, 5).double(), torch.randn(2, 16, 3, 3).double()
    y = torch.cat([x.flatten(2).mean(-1, keepdim=True), x.flatten(2)], -1)
    y = y + pool.positional_embedding
    q, k, v = (part.reshape(4, 8, -1) for part in pool.qkv_proj(y).chunk(3, 1))
    scale = 1 / math.sqrt(math.sqrt(8))
    weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), -1)
    found = torch.einsum("bts,bcs->bct", weight, v).reshape(2, 16, -1)
    torch.testing.assert_close(pool(x), pool.c_proj(found)[:, :, 0])


@pytest.mark.parametrize("kind", ["state dict", "pt", "safetensors"])
def test_a_checkpoint_is_read(kind, tmp_path):
    model = tiny(class_cond=True, learn_sigma=True)
    source, more = model.state_dict(), {}
    if kind == "pt":
        torch.save(source, tmp_path / "m.pt")
        source, more = tmp_path / "m.pt", {"allow_pickle": True}
    if kind == "safetensors":
        save_file(source, tmp_path / "m.safetensors")
        source = tmp_path / "m.safetensors"
    flags = {**TINY, "class_cond": True, "learn_sigma": True, "diffusion_steps": 4000}
    got = from_guided_diffusion(source, noise_schedule="cosine", **flags, **more)
    x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([0, 3999]), torch.tensor([0, 6])
    assert got(x, t, cond).equal(model(x, t, cond))
    assert got.schedule == NoiseSchedule.cosine(4000)
    assert (got.prediction, got.training) == ("eps", False)
    sampler = DDIMSampler(got.schedule, spacing="ddim50", prediction=got.prediction)
    assert sampler.sample(got, (2, 3, 8, 8), cond=cond).isfinite().all()


def test_a_classifier_is_read():
    config = classifier_config(classifier_width=64, classifier_depth=1)
    torch.manual_seed(0)
    model = EncoderUNet(config, 10).eval()
    flags = {"classifier_width": 64, "classifier_depth": 1}
    got = classifier_from_guided_diffusion(model.state_dict(), **flags)
    x, t = torch.randn(1, 3, 64, 64), torch.tensor([5])
    assert got(x, t).equal(model(x, t))
    assert got(x, t).shape == (1, 10)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short"])
def test_a_file_that_is_none_or_damaged_is_named(tmp_path, content):
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.pt: cannot be read: .*fetch it again"):
        from_guided_diffusion(path, **TINY, allow_pickle=True)
    torch.save({"state": {"x": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"m\.pt: holds no state dict"):
        from_guided_diffusion(path, **TINY, allow_pickle=True)


def test_pickles_are_refused_and_their_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="is a pickle, read only if allow_pickle=True"):
        from_guided_diffusion(path, **TINY)
    with pytest.raises(ValueError, match="cannot be read") as refused:
        from_guided_diffusion(path, **TINY, allow_pickle=True)
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        ({"num_heads_upsample": 8}, ValueError, "num_heads_upsample=8: must be num_heads=4"),
        ({"noise_schedule": "sqrt"}, ValueError, "noise_schedule='sqrt'"),
        ({"rescale_timesteps": True, "diffusion_steps": 4000}, ValueError, "rescale_timesteps"),
        ({"image_size": 48, "channel_mult": ""}, ValueError, "image_size=48: must be one of 512"),
        ({"attention_resolutions": "16;8"}, ValueError, "'16;8': must be numbers with commas"),
        ({"class_cond": True}, ValueError, "1 tensors missing: label_emb.weight"),
        ({"num_channels": 64}, ValueError, "tensors of another shape"),
        ({"use_fp16": True}, TypeError, "use_fp16"),
    ],
)
def test_flags_that_do_not_fit(flags, error, said):
    state = tiny().state_dict()
    with pytest.raises(error, match=re.escape(said)):
        from_guided_diffusion(state, **{**TINY, **flags})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"m\.pt: no such checkpoint"):
        from_guided_diffusion(tmp_path / "m.pt", **TINY)


def test_an_encoder_refuses_parts_it_has_not():
    with pytest.raises(ValueError, match="num_classes=10: must be None"):
        EncoderUNet(UNetConfig(num_classes=10), 5)
    with pytest.raises(ValueError, match="pool='spatial': must be one of"):
        EncoderUNet(UNetConfig(), 5, "spatial")
