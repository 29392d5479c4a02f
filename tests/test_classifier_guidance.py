"""Classifier guidance, on data whose perfect classifier is known, and the classifier's training."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from test_train import SAMPLE, TINY

from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    NoiseSchedule,
    TrainConfig,
    Trainer,
    cli,
    image_to_image,
    load,
    ops,
)
from fastdiff.data import fashion_mnist
from fastdiff.guidance import ClassifierGuidance, load_classifier
from fastdiff.losses import ClassifierLoss
from fastdiff.models import UNetConfig
from fastdiff.models.encoder import EncoderUNet
from fastdiff.ops.randn import BEFORE_FIRST_ROW
from fastdiff.train.state import collect

RECIPE = Path(__file__).parents[1] / "recipes" / "fashion-mnist-classifier.json"
COSINE = NoiseSchedule.cosine(1000)
CENTRES, S = torch.tensor([-1.0, 0.5, 1.5]), 0.3
SHAPE = (6, 1, 4, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
ENCODER = UNetConfig(**{**vars(TINY), "num_classes": None, "dropout": 0.0})


def levels(t):
    return (torch.tensor(a)[t].float()[:, None, None, None] for a in (COSINE.alpha, COSINE.sigma))


def logits(x, t):
    """ln p(y | x_t) of classes N(centre, S^2) in every pixel, up to what they share."""
    alpha, sigma = levels(t)
    far = x[:, None] - alpha[..., None] * CENTRES[None, :, None, None, None]
    return -(far.square() / (2 * (alpha**2 * S**2 + sigma**2)[..., None])).sum((2, 3, 4))


def eps_of(label):
    def eps(x, t, cond=None):
        alpha, sigma = levels(t)
        return (
            sigma * (x - alpha * CENTRES[label][:, None, None, None]) / (alpha**2 * S**2 + sigma**2)
        )

    return eps


def eps(x, t):
    """Of the whole mixture."""
    weights = logits(x, t).softmax(1)
    each = [eps_of(torch.full((len(x),), k))(x, t) for k in range(3)]
    return sum(w[:, None, None, None] * e for w, e in zip(weights.T, each, strict=True))


def test_the_perfect_classifier_makes_the_mixture_its_class():
    sampler = DDIMSampler(COSINE, 20, classifier_scale=1.0)
    ours = sampler.sample(eps, SHAPE, gradient=ClassifierGuidance(logits, LABELS))
    right = DDIMSampler(COSINE, 20).sample(eps_of(LABELS), SHAPE)
    assert torch.allclose(ours, right, atol=2e-4)
    assert not torch.allclose(DDIMSampler(COSINE, 20).sample(eps, SHAPE), right, atol=0.1)


def test_classes_may_be_the_models_conditions():
    sampler = DDIMSampler(COSINE, 5, classifier_scale=1.0)
    model = lambda x, t, cond: eps(x, t)  # noqa: E731
    ours = sampler.sample(model, SHAPE, cond=LABELS, gradient=ClassifierGuidance(logits))
    right = sampler.sample(eps, SHAPE, gradient=ClassifierGuidance(logits, LABELS))
    assert torch.equal(ours, right)
    with torch.inference_mode():
        assert torch.equal(
            sampler.sample(eps, SHAPE, gradient=ClassifierGuidance(logits, LABELS)), right
        )


@pytest.mark.parametrize("where", ["x", "mean"])
@pytest.mark.parametrize("interval", [None, (0.5, 2.0)])
def test_ddpm_shifts_its_mean_as_the_paper_does(where, interval):
    steps, scale = 10, 3.0
    sampler = DDPMSampler(COSINE, steps, classifier_scale=scale)
    guide = ClassifierGuidance(logits, LABELS)
    how = {"gradient_at": where, "guidance_interval": interval}
    ours = sampler.sample(eps, SHAPE, seed=3, gradient=guide, **how)

    x, t = ops.randn(SHAPE, 3, row=BEFORE_FIRST_ROW), sampler.timesteps
    for row, now in enumerate(t):
        before = float(COSINE.alphas_cumprod[t[row + 1]]) if row + 1 < steps else 1.0
        bar = float(COSINE.alphas_cumprod[now])
        beta, told = 1 - bar / before, torch.full((6,), int(now))
        variance = beta * (1 - before) / (1 - bar)
        mean = (x - beta / math.sqrt(1 - bar) * eps(x, told)) / math.sqrt(1 - beta)
        at = (x if where == "x" else mean).clone().requires_grad_()
        chosen = logits(at, told).log_softmax(1).gather(1, LABELS[:, None]).sum()
        level = math.sqrt((1 - bar) / bar)
        inside = interval is None or interval[0] < level <= interval[1]
        shift = scale * variance * torch.autograd.grad(chosen, at)[0] if inside else 0.0
        x = mean + shift + math.sqrt(variance) * ops.randn(SHAPE, 3, row=row)
    assert torch.allclose(ours, x, atol=1e-3)


def test_an_interval_needs_something_to_keep_in_it():
    with pytest.raises(ValueError, match="guidance_interval"):
        DDIMSampler(COSINE, 5).sample(eps, SHAPE, guidance_interval=(0.1, 1.0))


@pytest.mark.parametrize("kind", [DDIMSampler, DDPMSampler])
def test_a_loop_of_ones_own_is_guided_as_sample_is(kind):
    sampler = kind(COSINE, 5, classifier_scale=2.0)
    guide = ClassifierGuidance(logits, LABELS)
    x = ops.randn(SHAPE, 3, row=BEFORE_FIRST_ROW)
    with pytest.raises(ValueError, match="gradient: is needed"):
        sampler.step(x, 0, x)
    with pytest.raises(ValueError, match="gradient: is needed"):
        kind(COSINE, 5).step(x, 0, x, gradient=x)
    with pytest.raises(ValueError, match="gradient: has shape"):
        sampler.step(x, 0, x, gradient=x[:2])
    for i, now in enumerate(sampler.timesteps):
        t = torch.full((6,), int(now))
        x = sampler.step(eps(x, t), i, x, gradient=guide(x, t), seed=3)
    assert torch.allclose(x, sampler.sample(eps, SHAPE, 3, gradient=guide), atol=1e-5)


def test_one_row_takes_a_gradient_that_moves_nothing():
    """DDPM's step to the data has no variance, and so no shift."""
    guide, image = ClassifierGuidance(logits, LABELS), torch.zeros(SHAPE)
    for sampler in (DDPMSampler(COSINE, 20, classifier_scale=4.0), DDPMSampler(COSINE, 20)):
        how = {"gradient": guide} if sampler.options["classifier_scale"] else {}
        last = image_to_image(sampler, eps, image, 0.05, **how)
        assert torch.equal(last, image_to_image(DDPMSampler(COSINE, 20), eps, image, 0.05))


def test_a_classifier_in_bfloat16_guides():
    torch.manual_seed(0)
    config = UNetConfig(8, 3, channels=8, norm_groups=2, attention_resolutions=())
    exact = EncoderUNet(config, 3).requires_grad_(False)
    for parameter in exact.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = ops.randn((6, 3, 8, 8), 1), torch.full((6,), 300)
    right = ClassifierGuidance(exact, LABELS)(x, t)
    ours = ClassifierGuidance(copy.deepcopy(exact).bfloat16(), LABELS)(x, t)
    assert ours.dtype is torch.float32 and right.abs().max() > 0
    assert (ours - right).norm() < 0.1 * right.norm()


SAMPLER = DDIMSampler(COSINE, 5, classifier_scale=1.0)
REFUSED = {
    "labels: guidance needs": lambda: SAMPLER.sample(
        eps, SHAPE, gradient=ClassifierGuidance(logits)
    ),
    "labels: ": lambda: SAMPLER.sample(
        eps, SHAPE, gradient=ClassifierGuidance(logits, LABELS.float())
    ),
    "classifier: its output has shape": lambda: SAMPLER.sample(
        eps, SHAPE, gradient=ClassifierGuidance(eps, LABELS)
    ),
    "gradient_at": lambda: SAMPLER.sample(
        eps, SHAPE, gradient=ClassifierGuidance(logits, LABELS), gradient_at="x0"
    ),
    "cond: is None": lambda: ClassifierLoss(COSINE)(logits, torch.zeros(SHAPE)),
    "model: its output has shape": lambda: ClassifierLoss(COSINE)(
        eps, torch.zeros(SHAPE), cond=LABELS
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused(said):
    with pytest.raises((ValueError, TypeError), match=said):
        REFUSED[said]()


def test_the_loss_is_the_cross_entropy_at_each_timestep():
    x0 = CENTRES[LABELS][:, None, None, None] + S * torch.randn(SHAPE)
    t, z = torch.tensor([0, 10, 100, 500, 999, 500]), torch.randn(SHAPE)
    alpha, sigma = levels(t)
    rows = logits(alpha * x0 + sigma * z, t).softmax(1)[torch.arange(6), LABELS].log().neg()
    losses, sums = ClassifierLoss(COSINE).with_sums(logits, x0, t, LABELS, noise=z)
    assert torch.allclose(losses, rows, atol=1e-4)
    both = rows[[3, 5]]
    expected = torch.stack((torch.tensor(2.0), both.sum(), both.square().sum()))
    assert torch.allclose(sums[500], expected, atol=1e-4) and sums[:, 0].sum() == 6


CONFIG = TrainConfig(steps=8, batch_size=4, lr=1e-3, save_every=3, label_dropout=0.0, seed=5)


def trainer(out, **how):
    torch.manual_seed(0)
    config = TrainConfig(**{**CONFIG.to_json(), **how})
    return Trainer(EncoderUNet(ENCODER, 10), COSINE, fashion_mnist(SAMPLE), config, out)


def test_the_trainer_trains_a_classifier_which_resumes_bit_for_bit(tmp_path):
    whole, first = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    trained = whole.fit(progress=False)
    make, first_step = first._train_step, []
    first._train_step = lambda: make() if first.step < 5 else first_step.append(1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.fit(progress=False)
    again = trainer(tmp_path / "b")
    again.fit(resume=True, progress=False)
    assert all(torch.equal(v, collect(again)[k]) for k, v in collect(whole).items())
    loaded = load_classifier(tmp_path / "a")
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([3, 700])
    assert torch.allclose(loaded(x, t), trained.cpu()(x, t), atol=1e-5)
    assert loaded.schedule == COSINE and loaded.class_names[9] == "Ankle boot"
    with pytest.raises(ValueError, match="load_classifier reads it"):
        load(tmp_path / "a")
    with pytest.raises(ValueError, match=r"fastdiff\.load reads it"):
        load_classifier("fashion-mnist")


def test_a_classifier_learns(tmp_path):
    run = trainer(tmp_path, steps=120, batch_size=32, lr=5e-3, warmup=0, ema=0.0)
    model = run.fit(progress=False)
    data = fashion_mnist(SAMPLE, pad=2)
    x = data.load(torch.arange(len(data)))
    found = model(x, torch.zeros(len(x), dtype=torch.int64)).argmax(1)
    assert found.eq(data.labels).double().mean() > 0.5


def test_every_label_counts(tmp_path):
    with pytest.raises(ValueError, match=r"label_dropout=0.1: a classifier learns from every"):
        trainer(tmp_path, label_dropout=0.1)


def test_the_command_trains_one(tmp_path, capsys):
    recipe = json.loads(RECIPE.read_text())
    model = {**recipe["model"], "channels": 8, "norm_groups": 4, "head_channels": 8}
    train = {**recipe["train"], "steps": 2, "batch_size": 4, "sample_every": 1, "bf16": False}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**recipe, "model": model, "train": train}))
    out = tmp_path / "run"
    given = ["train", "--task", "classifier", "--config", str(path), "--data", str(SAMPLE)]
    assert cli.main([*given, "--out", str(out)]) == 0, capsys.readouterr()
    assert load_classifier(out).outputs == 10 and "finished" in capsys.readouterr().out
    assert not list(out.glob("samples-*.png"))
    assert cli.main([*given, "--out", str(tmp_path / "b"), "--prediction", "eps"]) == 1
    assert "--prediction=eps: a classifier has none" in capsys.readouterr().err
