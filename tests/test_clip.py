"""CLIP: its loss against a closed form, guidance by it against Bayes' rule and a textbook loop."""

import dataclasses
import re

import oracles
import pytest
import torch
from test_text import SMALL, TOKENS, image
from test_unet import randomised

from fastdiff import DDIMSampler, DDPMSampler, NoiseSchedule, UNet, ops
from fastdiff.guidance.clip import CLIPGuidance
from fastdiff.models.clip import CLIP, contrastive_loss

T = torch.tensor([0, 431, 999])
SCHEDULE = NoiseSchedule.cosine(1000)


@pytest.fixture
def clip():
    return randomised(CLIP(SMALL, 16))


def test_scores_are_the_scaled_cosines_of_all_pairs(clip):
    with torch.no_grad():
        f, g = clip.image(image(), T), clip.text_proj(clip.text(TOKENS)[:, -1])
        scores = clip(image(), T, TOKENS)
        cosine = torch.cosine_similarity(f[:, None], g[None], dim=2)
        torch.testing.assert_close(scores, clip.logit_scale.exp() * cosine)
        clip.logit_scale.fill_(9.0)
        torch.testing.assert_close(clip(image(), T, TOKENS), 100 * cosine)
    assert (scores[0] - scores[1]).abs().max() > 0.1  # told the noise and the image


def test_fused_blocks_give_the_same_scores_and_gradients(clip):
    plain = CLIPGuidance(clip, TOKENS)(image(), T)
    scores = clip(image(), T, TOKENS)
    assert clip.image.fuse_blocks() is clip.image and clip.image.middle_block[1].fused
    torch.testing.assert_close(clip(image(), T, TOKENS), scores, rtol=1e-4, atol=1e-4)
    fused = CLIPGuidance(clip, TOKENS)(image(), T)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


def test_patches_are_channels_of_a_smaller_image():
    """Pixel (2i + a, 2j + b) is channel 2a + b of pixel (i, j), as of the U-Net."""
    config = dataclasses.replace(SMALL, in_channels=1)
    patched = randomised(CLIP(dataclasses.replace(config, patch_size=2), 16))
    inside = dataclasses.replace(config, in_channels=4, image_size=8)
    plain = CLIP(inside, 16).eval()
    plain.load_state_dict(patched.state_dict())
    x = image(channels=1)
    small = torch.cat([x[:, :, a::2, b::2] for a in range(2) for b in range(2)], 1)
    torch.testing.assert_close(patched(x, T, TOKENS), plain(small, T, TOKENS))


def test_of_different_captions_it_is_radfords_loss():
    scores, places = torch.randn(3, 3), torch.arange(3)
    expected = sum(torch.nn.functional.cross_entropy(s, places) for s in (scores, scores.T)) / 2
    torch.testing.assert_close(contrastive_loss(scores, TOKENS), expected)


def test_equal_captions_are_no_wrong_pairs():
    tokens = TOKENS[[0, 1, 0, 2, 1, 0]]
    equal = (tokens[:, None] == tokens).all(2)
    assert contrastive_loss(60.0 * equal, tokens) < 1e-6
    assert contrastive_loss(60.0 * torch.eye(6), tokens) > 10


def test_its_minimum_is_the_ratio_of_the_joint_law_to_the_product():
    """Three kinds of images, two captions, n[x, c] pairs of each: a table of scores learns it."""
    n = torch.tensor([[5, 1], [2, 6], [3, 7]])
    x, c = n.nonzero().repeat_interleave(n.flatten(), 0).T
    scores = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_change=0)

    def loss():
        optimizer.zero_grad()
        value = contrastive_loss(scores[x][:, c], TOKENS[c])
        value.backward()
        return value

    optimizer.step(loss)
    joint = n.double() / n.sum()
    ratio = torch.log(joint / (joint.sum(1, keepdim=True) * joint.sum(0)))
    got = scores.detach() - scores.detach()[0, 0]
    torch.testing.assert_close(got, ratio - ratio[0, 0], rtol=1e-6, atol=1e-6)


def test_the_gradient_is_that_of_the_score_of_its_own_caption(clip):
    """By central differences in float64; a condition that the sampler passes changes nothing."""
    clip, x = clip.double(), image().double()
    got = CLIPGuidance(clip, TOKENS)(x, T)
    direction = torch.randn_like(x)
    h = 1e-5
    with torch.no_grad():
        up, down = (clip(x + s * h * direction, T, TOKENS).diagonal() for s in (1, -1))
    torch.testing.assert_close(
        (got * direction).sum((1, 2, 3)), (up - down) / (2 * h), rtol=1e-5, atol=1e-7
    )
    assert not got.requires_grad
    assert torch.equal(CLIPGuidance(clip, TOKENS)(x, T, TOKENS.flip(0)), got)


MEANS, SPREAD = torch.tensor([-0.8, 0.9], dtype=torch.float64), 0.3


class Bayes:
    """A CLIP that knows: two captions, each a Gaussian; f g = log p(x_t | c) / p(x_t)."""

    scale = torch.tensor(1.0)

    def text_features(self, tokens):
        return torch.nn.functional.one_hot(tokens[:, 1], 2).float()

    def image_features(self, x, t):
        alpha, sigma = level(t)
        var = alpha**2 * SPREAD**2 + sigma**2
        log_p = -((x[:, :, 0, 0] - alpha * MEANS) ** 2) / (2 * var)
        return (log_p - log_p.logsumexp(1, keepdim=True)).float()


def level(t):
    return (torch.tensor(c[int(t[0])]) for c in (SCHEDULE.alpha, SCHEDULE.sigma))


@pytest.mark.parametrize("steps", [3, 20])
def test_with_bayes_rule_any_caption_is_reached_from_an_untold_network(steps):
    """At scale 1 every step is that of the network that is told the caption."""
    kinds = torch.tensor([0, 1, 1, 0])
    tokens = torch.stack((torch.ones_like(kinds), kinds), 1)

    def told(x, t):
        alpha, sigma = level(t)
        mean = alpha * MEANS[kinds].reshape(-1, 1, 1, 1)
        return (sigma * (x - mean) / (alpha**2 * SPREAD**2 + sigma**2)).float()

    def untold(x, t):
        alpha, sigma = level(t)
        var = alpha**2 * SPREAD**2 + sigma**2
        d = x - alpha * MEANS
        share = torch.softmax(-(d**2) / (2 * var), 3)
        return (sigma * (share * d / var).sum(3, keepdim=True)).float()

    how = {"shape": (4, 1, 1, 1), "seed": 3}
    plain, guided = (
        DDIMSampler(SCHEDULE, steps, 0.0, "trailing", classifier_scale=s) for s in (0.0, 1.0)
    )
    expected = plain.sample(told, **how)
    got = guided.sample(untold, **how, gradient=CLIPGuidance(Bayes(), tokens))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert (plain.sample(untold, **how) - expected).abs().max() > 0.1


@pytest.mark.parametrize("w", [None, 1.5])
def test_a_step_of_a_learned_variance_is_shifted_as_glide_has_it(clip, w):
    """Told captions and guided, by CLIP alone or by both; the textbook's loop is in oracles.py."""
    config = dataclasses.replace(SMALL, learned_variance=True)
    model = randomised(UNet(config))
    guide = CLIPGuidance(clip, TOKENS)

    def told(x, t):
        x, when = x.float(), torch.full((3,), int(t))
        eps, v = model(x, when, TOKENS).chunk(2, 1)
        eps_u = model(x, when, model.null_cond(TOKENS)).chunk(2, 1)[0]
        extra = w or 0.0
        return torch.cat(((1 + extra) * eps - extra * eps_u, v), 1)

    shape = (3, 3, 16, 16)
    how = {"clip": 1.0, "classifier_scale": 20.0}
    sampler = DDPMSampler(SCHEDULE, 4, "learned_range", **how)
    x_T = image()
    got = sampler.sample(model, shape, x_T=x_T, cond=TOKENS, guidance=w, gradient=guide)
    without = DDPMSampler(SCHEDULE, 4, "learned_range", clip=1.0)
    assert (without.sample(model, shape, x_T=x_T, cond=TOKENS, guidance=w) - got).abs().max() > 0.01
    noises = [ops.randn(shape, 0, row=i) for i in range(4)]
    abars = [float(SCHEDULE.alphas_cumprod[t]) for t in sampler.timesteps]
    with torch.no_grad():
        expected = oracles.ddpm(
            x_T, told, sampler.timesteps, abars, noises, "eps", "learned_range", 1.0,
            gradient=lambda x, t: guide(x.float(), torch.full((3,), int(t))), scale=20.0,
        )  # fmt: skip
    torch.testing.assert_close(got, expected.float(), rtol=2e-3, atol=2e-3)


def test_it_learns_which_caption_fits():
    """Six images of noise, seen through more of it."""
    config = dataclasses.replace(
        SMALL, image_size=8, channels=8, attention_resolutions=(), heads=1, in_channels=1
    )
    clip, schedule = CLIP(config, 16), NoiseSchedule.cosine(10)
    optimizer = torch.optim.Adam(clip.parameters(), 5e-3)
    tokens = torch.tensor([[1, 3 + k, 2, 0, 0] for k in range(6)])
    images = torch.randn(6, 1, 8, 8)
    for _ in range(80):
        kinds, t = torch.randint(6, (32,)), torch.randint(5, (32,))
        x, _ = ops.noising(images[kinds], t, schedule)
        loss = contrastive_loss(clip(x, t, tokens[kinds]), tokens[kinds])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = clip(images, torch.zeros(6), tokens)
    assert scores.argmax(1).tolist() == list(range(6))


def made(**change):
    return CLIP(dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: made(vocabulary=None), ValueError, "vocabulary=None: must be given"),
        (lambda c: made(guidance_max=2.0), ValueError, "guidance_max=2.0: must be None"),
        (lambda c: c(image(), T, TOKENS[:, :3]), ValueError, "tokens of shape (3, 3): must be"),
        (lambda c: CLIPGuidance(c, TOKENS + 18), ValueError, "tokens with tokens 18 .. 27"),
        (lambda c: CLIPGuidance(c, TOKENS.int()), TypeError, "tokens of dtype torch.int32"),
        (
            lambda c: CLIPGuidance(c, TOKENS[:2])(image(), T),
            ValueError,
            "tokens: are of 2 captions, x of 3 samples",
        ),
        (
            lambda c: contrastive_loss(torch.zeros(3, 2), TOKENS),
            ValueError,
            "scores: have shape (3, 2), must be [B, B] of 3",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(clip, call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(clip)
