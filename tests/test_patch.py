"""patch: real pipelines of diffusers give the same images, and unpatch puts all back."""

import copy
import json
import pickle
import threading
import warnings

import pytest
import torch

import fastdiff
from fastdiff import inplace
from fastdiff.engine.optimize import compiled
from fastdiff.inplace import Fast
from fastdiff.integrations import diffusers as ours

diffusers = pytest.importorskip("diffusers")

SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()


def images(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 6, "output_type": "np", **options}
    return torch.as_tensor(pipe(generator=generator, **options).images)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.01


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """The components of a StableDiffusionPipeline, small and random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary = {c + end: i for i, (c, end) in enumerate(_letters())}
    special = {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, **special}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary) + 2,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=len(vocabulary),
        eos_token_id=len(vocabulary) + 1,
    )
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )
    blocks = {"norm_num_groups": 8, "block_out_channels": (32, 64), "layers_per_block": 1}
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **blocks,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        **blocks,
    )
    return {
        "unet": network.eval(),
        "vae": vae.eval(),
        "text_encoder": transformers.CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "safety_checker": None,
        "feature_extractor": None,
    }


def _letters():
    return [(c, end) for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]


@pytest.mark.parametrize("name", SCHEDULERS[:2])
def test_unconditional_pipelines(name):
    kind = {"DDIMScheduler": diffusers.DDIMPipeline, "DDPMScheduler": diffusers.DDPMPipeline}[name]
    pipe = kind(unet(), getattr(diffusers, name)())
    options = {"batch_size": 2, **({"eta": 0.5} if name == "DDIMScheduler" else {})}
    expected = images(pipe, **options)
    assert fastdiff.patch(pipe) is pipe
    assert type(pipe.scheduler) is getattr(ours, name)
    assert isinstance(pipe.unet, Fast)
    same(images(pipe, **options), expected)
    engine = pipe.unet.__dict__["_fastdiff"]["engine"]
    assert "winograd" in repr(engine)
    fastdiff.unpatch(pipe)
    assert type(pipe.scheduler) is getattr(diffusers, name)
    assert type(pipe.unet) is diffusers.UNet2DModel
    assert "_fastdiff" not in pipe.unet.__dict__
    assert images(pipe, **options).equal(expected)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("task", ["text", "image", "inpaint"])
def test_stable_diffusion(stable_diffusion, name, task):
    kinds = {
        "text": diffusers.StableDiffusionPipeline,
        "image": diffusers.StableDiffusionImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionInpaintPipeline,
    }
    options = {} if name == "DPMSolverMultistepScheduler" else {"clip_sample": False}
    if name == "DDIMScheduler":
        options |= {"set_alpha_to_one": False}
    scheduler = getattr(diffusers, name)(steps_offset=1, **LATENT, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kinds[task](**stable_diffusion, scheduler=scheduler, requires_safety_checker=False)
    call = {"prompt": ["a cat", "dogs"], "guidance_scale": 3.0, "eta": 0.3}
    generator = torch.Generator().manual_seed(5)
    if task != "text":
        call |= {"image": torch.rand(2, 3, 16, 16, generator=generator), "strength": 0.7}
    if task == "inpaint":
        call |= {
            "mask_image": torch.rand(2, 1, 16, 16, generator=generator),
            "height": 16,
            "width": 16,
        }
    if name != "DDIMScheduler":
        call.pop("eta")
    expected = images(pipe, **call)
    fastdiff.patch(pipe)
    try:
        same(images(pipe, **call), expected)
    finally:
        fastdiff.unpatch(pipe)


def test_a_bfloat16_pipeline_stays_bfloat16_and_near(stable_diffusion):
    parts = {k: copy.deepcopy(v) for k, v in stable_diffusion.items()}
    scheduler = diffusers.DDIMScheduler(
        steps_offset=1, clip_sample=False, set_alpha_to_one=False, **LATENT
    )
    pipe = diffusers.StableDiffusionPipeline(
        **parts, scheduler=scheduler, requires_safety_checker=False
    )
    call = {"prompt": "a cat", "height": 16, "width": 16, "output_type": "latent"}
    exact = images(pipe, **call)
    pipe.to(torch.bfloat16)
    theirs = images(pipe, **call)
    fastdiff.patch(pipe)
    mine = images(pipe, **call)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    errors = [((x.float() - exact).norm() / exact.norm()).item() for x in (mine, theirs)]
    assert errors[0] < 1.3 * errors[1], errors


def test_a_patched_pipeline_is_saved_copied_and_pickled_as_what_it_was(tmp_path):
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
    expected = images(pipe)
    fastdiff.patch(pipe)
    images(pipe)
    pipe.save_pretrained(tmp_path)
    plain = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(plain.unet) is diffusers.UNet2DModel
    assert type(plain.scheduler) is diffusers.DDIMScheduler
    same(images(plain), expected)
    for made in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        assert isinstance(made, Fast) and isinstance(made, diffusers.UNet2DModel)
        with torch.no_grad():
            made.conv_out.weight.mul_(0)  # its own weights, not those it was copied from
            made.conv_out.bias.zero_()
            assert made(torch.randn(1, 3, 16, 16), 5).sample.abs().max() == 0
        same(images(pipe), expected)
        assert type(fastdiff.unpatch(made)) is diffusers.UNet2DModel


def test_changes_after_patching_are_followed():
    pipe = fastdiff.patch(diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler()))
    x = torch.randn(2, 3, 16, 16)

    def both():
        with torch.no_grad():
            got = pipe.unet(x, 9).sample
            expected = fastdiff.unpatch(copy.deepcopy(pipe.unet))(x, 9).sample
        return got, expected

    same(*both())
    with torch.no_grad():
        pipe.unet.conv_in.weight.data.mul_(1.5)
    same(*both())
    for module in pipe.unet.modules():
        if hasattr(module, "processor"):  # one that adds 1 to what attention gives
            module.set_processor(lambda *a, then=module.processor, **k: then(*a, **k) + 1)
    same(*both())
    pipe.unet.load_state_dict(unet().state_dict())
    same(*both())
    pipe.unet.register_to_config(center_input_sample=True)  # a setting, no weight
    same(*both())
    before = both()[0]
    pipe.unet.mid_block.resnets[0].output_scale_factor = 3.0
    assert not torch.allclose(both()[0], before)
    same(*both())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_compiled_copy_has_the_networks_weights_and_the_callers_dtype(monkeypatch, dtype):
    """What a GPU gets, made here."""
    monkeypatch.setattr(inplace, "optimize", lambda net, dtype, memory: compiled(net, dtype))
    monkeypatch.setitem(compiled.__globals__, "missing", lambda name: "left out")
    network, x = fastdiff.patch(unet(), dtype=dtype), torch.randn(2, 3, 16, 16)
    for factor in (1.0, 1.5, 0.5):
        with torch.no_grad():
            network.conv_out.weight.mul_(factor)
            got = network(x, torch.tensor(9)).sample
            right = fastdiff.unpatch(copy.deepcopy(network))(x, 9).sample
        assert got.dtype is torch.float32
        assert (got - right).norm() < (1e-5 if dtype is None else 0.03) * right.norm()


def test_hooks_are_run_once_and_followed():
    network, x, seen = fastdiff.patch(unet()), torch.randn(2, 3, 16, 16), []
    with torch.no_grad():
        plain = network(x, 9).sample
        outer = network.register_forward_hook(lambda m, a, out: type(out)(sample=2 * out.sample))
        same(network(x, 9).sample, 2 * plain)
        outer.remove()
        same(network(x, 9).sample, plain)
        inner = network.mid_block.register_forward_hook(
            lambda m, a, out: seen.append(out) or 0 * out
        )
        for _ in range(3):
            assert not torch.allclose(network(x, 9).sample, plain, atol=1e-3)
        assert len(seen) == 3 and all(type(out) is torch.Tensor for out in seen)
        inner.remove()
        same(network(x, 9).sample, plain)


def test_layers_that_are_listened_to_are_called_in_training_too():
    network, x, seen = fastdiff.patch(unet()).train(), torch.randn(2, 3, 16, 16), []
    block = network.down_blocks[0].resnets[0]
    for layer in (block.norm1, block.conv1, block.norm2, block.conv2):
        layer.register_forward_hook(lambda m, a, out: seen.append(m))
    torch.nn.utils.spectral_norm(network.down_blocks[1].resnets[0].conv1)
    network(x, 9).sample.sum().backward()
    assert seen == [block.norm1, block.conv1, block.norm2, block.conv2]
    assert network.down_blocks[1].resnets[0].conv1.weight_orig.grad is not None


def test_one_network_may_be_called_first_by_several_threads():
    network, x, found = fastdiff.patch(unet()), torch.randn(2, 3, 16, 16), {}

    def call(k):
        with torch.no_grad():
            found[k] = network(x, 9).sample

    threads = [threading.Thread(target=call, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and torch.equal(found[0], found[1])
    with torch.no_grad():
        same(found[0], fastdiff.unpatch(network)(x, 9).sample)


def test_gradients_and_training_take_the_network_as_it_is():
    network = fastdiff.patch(unet())
    x = torch.randn(1, 3, 16, 16)
    loss = network(x, 3).sample.square().mean()
    loss.backward()
    assert network.conv_in.weight.grad.abs().sum() > 0
    assert "engine" not in network.__dict__["_fastdiff"]
    network.train()
    with torch.no_grad():
        network(x, 3)
    assert "engine" not in network.__dict__["_fastdiff"]


def test_bug_compatible_images_are_diffusers():
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler(timestep_spacing="trailing"))
    expected = images(pipe, num_inference_steps=7)
    fastdiff.patch(pipe)
    mended = images(pipe, num_inference_steps=7)
    fastdiff.patch(pipe, bug_compatible=True)
    same(images(pipe, num_inference_steps=7), expected)
    assert (mended - expected).abs().max() > 1e-2


def test_a_scheduler_alone():
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(7)
    assert type(fastdiff.patch(scheduler)) is ours.DDPMScheduler
    assert len(scheduler.timesteps) == 7
    assert type(fastdiff.unpatch(scheduler)) is diffusers.DDPMScheduler
    assert not {"_made", "_latest", "bug_compatible"} & set(scheduler.__dict__)


def test_another_scheduler_stays_with_a_warning():
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.warns(UserWarning, match="has none for EulerDiscreteScheduler"):
        fastdiff.patch(pipe)
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    assert isinstance(pipe.unet, Fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdiff.unpatch(pipe)
    assert type(pipe.unet) is diffusers.UNet2DModel
    with pytest.raises(TypeError, match="EulerDiscreteScheduler, must be exactly one of DDIM"):
        fastdiff.patch(pipe.scheduler)


def test_an_option_that_is_not_supported_is_named_and_nothing_is_changed():
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=3)
    with pytest.raises(ValueError, match="solver_order=3: fastdiff's DPMSolverMultistep"):
        fastdiff.patch(pipe)
    assert type(pipe.unet) is diffusers.UNet2DModel


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        ((3,), {}, TypeError, r"objects\[0\]: is a int"),
        ((), {"dtype": "int8"}, ValueError, "dtype='int8'"),
        ((), {"memory": "some"}, ValueError, "memory='some'"),
    ],
)
def test_bad_arguments(arguments, options, error, said):
    with pytest.raises(error, match=said):
        fastdiff.patch(*arguments, **options)


def test_another_release_of_diffusers_warns(monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.99.0")
    with pytest.warns(UserWarning, match=r"diffusers 0\.99\.0: fastdiff is tested with 0\.42"):
        fastdiff.patch(diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler()))
    with pytest.warns(UserWarning, match="fastdiff is tested with"):
        fastdiff.patch(diffusers.DDPMScheduler())
