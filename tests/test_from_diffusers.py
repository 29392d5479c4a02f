"""diffusers' UNet2DModel as our UNet: equal to rounding, or refused."""

import math

import pytest
import torch

from fastdiff import DDIMSampler, NoiseSchedule, TrainConfig, distill
from fastdiff.data import ImageSet
from fastdiff.integrations.diffusers import from_diffusers, to_diffusers
from fastdiff.models import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

ATTENDING = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
PEERS = {
    "ddpm": {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    "defaults": {"num_class_embeds": 10},
    "heads": {"attention_head_dim": 16, "out_channels": 6},
    "adm": {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "attention_head_dim": 32,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64, 64),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "three levels": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
}


def peer(**options):
    torch.manual_seed(0)
    made = diffusers.UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "attention_head_dim": None,
            **ATTENDING,
            **options,
        }
    ).eval()
    with torch.no_grad():  # no zero-initialised layer left
        for p in made.parameters():
            p.add_((1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2) * torch.randn(p.shape))
    return made


@pytest.mark.parametrize("name", PEERS)
def test_outputs_are_diffusers(name):
    theirs = peer(**PEERS[name])
    ours = from_diffusers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 431, 999])
    cond = (torch.tensor([3, 0, 9]),) if theirs.config.num_class_embeds else ()
    with torch.inference_mode():
        expected = theirs(x, t, *cond).sample
        torch.testing.assert_close(ours(x, t, *cond), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_the_cifar10_network_is_ddpms():
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            dropout=0.1,
        )
        ours = UNet(UNetConfig.ddpm_cifar10())
    made = from_diffusers(theirs)
    assert made.config == ours.config
    assert sum(p.numel() for p in theirs.parameters()) == 35_746_307
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'; our network has it 'silu' only"),
        ({"freq_shift": 1}, "flip_sin_to_cos=True, freq_shift=1"),
        ({"block_out_channels": (64, 96)}, "must be multiples of the first"),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "must be of the same kinds"),
        ({"sample_size": (16, 8)}, "sample_size=.*must be an int"),
        ({"out_channels": 4}, "out_channels=4: must be in_channels=3"),
        (
            {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")},
            "block 'SkipDownBlock2D': must be one of",
        ),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
    ],
)
def test_parts_that_we_have_not_are_named(options, message):
    theirs = peer()
    theirs.register_to_config(**options)
    with pytest.raises(ValueError, match=message):
        from_diffusers(theirs)


def test_other_networks_are_refused():
    with pytest.raises(TypeError, match="is a Linear, must be a diffusers UNet2DModel"):
        from_diffusers(torch.nn.Linear(2, 2))


def test_schedule_and_prediction_are_the_schedulers():
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    model = from_diffusers(peer(), scheduler)
    assert model.prediction == "v" and len(model.schedule) == 1000
    assert abs(model.schedule.alphas_cumprod[500] - scheduler.alphas_cumprod[500].item()) < 1e-7
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type='flow', must be one of"):
        from_diffusers(peer(), scheduler)


def test_a_diffusers_unet_is_distilled(tmp_path):
    """Two steps of diffusers' own scheduler become one of the student's."""
    theirs = peer(in_channels=1, out_channels=1)
    schedule = NoiseSchedule.linear(1000)
    images = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8)
    train = TrainConfig(
        steps=120, batch_size=8, lr=1e-4, warmup=0, decay="linear", ema=0.0,
        weighting="snr_trunc", label_dropout=0.0, channels_last=False,
    )  # fmt: skip
    student = distill(
        theirs, schedule, 4, 2, ImageSet(images), tmp_path, train=train, prediction="eps",
        progress=False, engine="float32",
    )  # fmt: skip
    assert student.distilled.timesteps == (999, 499) and student.prediction == "eps"
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(4)
    x_t = torch.randn(8, 1, 16, 16)
    own = DDIMSampler(schedule, spacing=student.distilled.timesteps)
    with torch.no_grad():
        x = x_t
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(theirs(x, t).sample, t, x).prev_sample
        before, after = (
            (own.step(network(x_t, torch.full((8,), 999)), 0, x_t) - x).norm()
            for network in (from_diffusers(theirs), student)
        )
    assert after < 0.7 * before


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back(name, tmp_path):
    theirs = peer(**PEERS[name])
    back = to_diffusers(from_diffusers(theirs))
    wanted, got = theirs.state_dict(), back.state_dict()
    assert got.keys() == wanted.keys()
    assert all(got[key].equal(value) for key, value in wanted.items())
    back.save_pretrained(tmp_path)
    again = from_diffusers(diffusers.UNet2DModel.from_pretrained(tmp_path))
    assert again.config == from_diffusers(theirs).config


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_a_network_of_ours_in_either_order_of_attention(order):
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=16,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        head_channels=16,
        attention_order=order,
        norm_groups=8,
        num_classes=10,
    )
    model = UNet(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) / 8)
        x, t, cond = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.tensor([0, 9])
        got = to_diffusers(model)(x, t, cond).sample
        torch.testing.assert_close(got, model(x, t, cond), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": 2}, "patch_size=2"),
        ({"vocabulary": 20}, "vocabulary=20"),
        ({"heads": 2}, "heads=2: must be 1"),
        ({"norm_groups": 24}, r"norm_groups=24: must divide all widths, not so \[32, 64\]"),
        ({"rescale_residual": True}, "rescale_residual=True"),
    ],
)
def test_what_diffusers_has_not_is_named(change, said):
    config = UNetConfig(**{"channels": 32, "channel_mult": (1, 2), "norm_groups": 8, **change})
    with pytest.raises(ValueError, match=said):
        to_diffusers(UNet(config))
