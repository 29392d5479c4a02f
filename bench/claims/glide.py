"""python bench/claims/glide.py: CLIP guidance against classifier-free guidance, told captions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from bench.claims.claim import RUNS, Claim, Point, Points, mean_and_spread, plus_minus
from bench.claims.quality import quality
from fastdiff import DDPMSampler, TrainConfig, Trainer, UNet, load, ops, optimize
from fastdiff.data import ImageSet, fashion_mnist
from fastdiff.data.captions import LENGTH, WORDS, Captions, tokenize
from fastdiff.evaluate import balanced, describe, framed
from fastdiff.files import read_tensors, write_tensors
from fastdiff.guidance.clip import CLIPGuidance
from fastdiff.images import to_uint8
from fastdiff.losses import UniformTimesteps
from fastdiff.models.clip import CLIP, contrastive_loss

SHIPPED = "fashion-mnist"  # whose weights the caption model starts with
TRAIN = TrainConfig(
    steps=1200,
    lr=1e-3,
    warmup=100,
    decay="cooldown",
    ema=0.99,
    label_dropout=0.1,
    bf16=True,
    save_every=100,
)
TRAIN_CLIP = TrainConfig(steps=2000, lr=1e-3, warmup=100, decay="linear")  # of AdamW, as above
STEPS, BATCH = 32, 250
FREE, CLIP_GUIDED, NONE, REAL = "classifier-free", "CLIP", "none", "real test images"
COLOURS = {FREE: "#4c78a8", CLIP_GUIDED: "#e45756"}
WEIGHTS = {FREE: (0.5, 1.0, 2.0, 4.0), CLIP_GUIDED: (1.0, 4.0, 16.0, 64.0)}
AGREEMENTS = ("accuracy", "brightness", "extent", "all")


@lru_cache(maxsize=1)
def captions() -> Captions:
    training = fashion_mnist(split="train")
    assert training.labels is not None
    return Captions(training.images, training.labels)


def captioned(split: str) -> tuple[ImageSet, Tensor]:
    """Images with their captions' tokens for labels, and their classes."""
    data = fashion_mnist(split=split)
    assert data.labels is not None
    return replace(data, labels=tokenize(captions().of(data.images, data.labels))), data.labels


def caption_model() -> UNet:
    """The shipped network, trained on with captions in place of classes; resumed if it was begun.

    What it has in common with the shipped one starts there: all but the text's part.
    """
    shipped = load(SHIPPED)
    assert shipped.schedule is not None
    torch.manual_seed(TRAIN.seed)
    config = replace(shipped.config, num_classes=None, vocabulary=len(WORDS), text_length=LENGTH)
    model = UNet(config)
    known = model.state_dict().keys()
    model.load_state_dict(
        {k: v for k, v in shipped.state_dict().items() if k in known}, strict=False
    )
    data, _ = captioned("train")
    trainer = Trainer(model, shipped.schedule, data, TRAIN, RUNS / "glide" / "model")
    return trainer.fit(resume=trainer.store.exists())


def noisy_clip() -> CLIP:
    """A CLIP of the caption model's size and schedule, trained at all its timesteps, or read."""
    shipped, path = load(SHIPPED), RUNS / "glide" / "clip.safetensors"
    assert shipped.schedule is not None
    torch.manual_seed(TRAIN_CLIP.seed)
    clip = CLIP(
        replace(shipped.config, num_classes=None, vocabulary=len(WORDS), text_length=LENGTH)
    )
    clip.image.fuse_blocks()
    if path.is_file():
        clip.load_state_dict(read_tensors(path)[0])
        return clip.eval().requires_grad_(False)
    data, _ = captioned("train")
    config, draws = TRAIN_CLIP, UniformTimesteps(len(shipped.schedule))
    optimizer = torch.optim.AdamW(clip.parameters(), config.lr, weight_decay=config.weight_decay)
    size, seed = config.batch_size, config.seed
    with tqdm(range(config.steps), desc="CLIP", unit="step") as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = config.learning_rate(step)
            x0, tokens = data.batch(step, size, seed, channels_last=True)
            assert tokens is not None
            t, _ = draws.draw(size, seed, step)
            x, _ = ops.noising(x0, t, shipped.schedule, seed=seed, row=step)
            with torch.autocast("cpu", torch.bfloat16):
                scores = clip(x, t, tokens)
            loss = contrastive_loss(scores.float(), tokens)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(clip.parameters(), config.clip_grad)
            optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, clip.state_dict())
    return clip.eval().requires_grad_(False)


class Judge:
    """What images are asked for, and how well a set of them is what was asked for."""

    def __init__(self, count: int) -> None:
        test, classes = captioned("test")
        order = balanced(classes)[:count]
        self.images, self.labels = test.images[order], classes[order]
        assert test.labels is not None
        self.tokens = test.labels[order]
        self.thirds = captions().read(self.images, self.labels)
        self.quality = quality(len(order))

    def of(self, images: Tensor) -> Point:
        """FD and the like; the parts of the images whose class, and thirds, are the caption's."""
        point = self.quality.of(images, self.labels)
        right = captions().read(images, self.labels) == self.thirds
        point["brightness"], point["extent"] = right.double().mean(0).tolist()
        classifier = self.quality.classifier
        _, classes = describe(classifier, framed(images, classifier.shape))
        point["all"] = (right.all(1) & classes.eq(self.labels)).double().mean().item()
        return point


def measure(points: Points, count: int, seeds: Sequence[int]) -> None:
    judge = Judge(count)
    points.measure(REAL, lambda: judge.of(judge.images))
    model, clip = caption_model(), noisy_clip()
    fast = optimize(model, "bfloat16")
    shape = model.config.in_channels, model.config.image_size, model.config.image_size

    def drawn(seed: int, w: float, scale: float) -> Tensor:
        sampler = DDPMSampler(
            model.schedule, STEPS, "small", "trailing", model.prediction, 1.0,
            classifier_scale=scale,
        )  # fmt: skip
        images = []
        for first in range(0, len(judge.tokens), BATCH):
            tokens = judge.tokens[first : first + BATCH]
            x = sampler.sample(
                fast,
                (len(tokens), *shape),
                seed,
                cond=tokens,
                guidance=w or None,
                gradient=CLIPGuidance(clip, tokens) if scale else None,
                first_index=first,
            )
            images.append(to_uint8(x))
        return torch.cat(images)

    def point(kind: str, weight: float) -> Point:
        w, scale = (weight, 0.0) if kind == FREE else (0.0, weight)
        rows = [judge.of(drawn(seed, w, scale)) for seed in seeds]
        found: Point = {"kind": kind, "weight": weight}
        for key in rows[0]:
            found[key], found[f"{key}_sd"] = mean_and_spread([row[key] for row in rows])
        return found

    points.measure(NONE, lambda: point(NONE, 0.0))
    for kind, weights in WEIGHTS.items():
        for weight in weights:
            points.measure(f"{kind} {weight:g}", lambda k=kind, w=weight: point(k, w))


def curve(found: Mapping[str, Point], kind: str) -> list[Point]:
    """The points of a kind of guidance, by weight, from none."""
    rows = [p for p in found.values() if p.get("kind") in (kind, NONE)]
    return sorted(rows, key=lambda p: p["weight"])


def beaten(rows: Sequence[Point], by: Sequence[Point]) -> int:
    """How many of the rows have one of the others that agrees more at a smaller FD."""
    return sum(any(b["all"] > row["all"] and b["fd"] < row["fd"] for b in by) for row in rows)


def table(found: Mapping[str, Point]) -> list[str]:
    head = ["guidance", "weight", "FD", "precision", "recall", "class", "brightness", "size", "all"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    keys = "fd", "precision", "recall", *AGREEMENTS

    def cells(p: Point) -> str:
        return " | ".join(plus_minus(p[k], p.get(f"{k}_sd", 0.0)) for k in keys)

    for name, p in found.items():
        if name == REAL:
            lines.append(f"| {REAL} | | {cells(p)} |")
    free, clip = curve(found, FREE), curve(found, CLIP_GUIDED)
    for rows in (free, clip[1:]):
        lines += [f"| {p['kind']} | {p['weight']:g} | {cells(p)} |" for p in rows]
    guided = free[1:], clip[1:]
    lost, won = beaten(guided[1], guided[0]), beaten(guided[0], guided[1])
    lines += [
        "",
        "class: the shipped classifier, which saw neither network, gives the caption's class. "
        "brightness, size: read off the image, it is in the third that the caption says. all: the "
        "three together. A weight is w of (w + 1) m_c - w m_u, or what CLIP's gradient is "
        "multiplied by, of the same network.",
        "",
        f"Beaten in both FD and agreement (all): {lost} of {len(guided[1])} weights of CLIP "
        f"guidance by one of classifier-free guidance, {won} of {len(guided[0])} the other way "
        f"round. {extremes(guided[0])} {extremes(guided[1])} " + verdict(lost, won),
    ]
    return lines


def extremes(rows: Sequence[Point]) -> str:
    most, least = max(rows, key=lambda p: p["all"]), min(rows, key=lambda p: p["fd"])
    return (
        f"The {most['kind']} points go up to {most['all']:.1%} agreement (weight "
        f"{most['weight']:g}, FD {most['fd']:.3g}) and down to FD {least['fd']:.3g} (weight "
        f"{least['weight']:g}, {least['all']:.1%})."
    )


def verdict(lost: int, won: int) -> str:
    if lost > won:
        return "**The claim holds here.**" if not won else "**The claim holds here for the most.**"
    return "**The claim does not hold here.**"


def draw(found: Mapping[str, Point], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for kind, colour in COLOURS.items():
        rows = curve(found, kind)
        how = {"color": colour, "marker": "o", "markersize": 4, "label": f"{kind} guidance"}
        left.plot([p["fd"] for p in rows], [p["all"] for p in rows], **how)
        right.plot([p["recall"] for p in rows], [p["precision"] for p in rows], **how)
        for p in rows[1:]:
            left.annotate(
                f"{p['weight']:g}", (p["fd"], p["all"]), (4, 3), textcoords="offset points",
                fontsize=7, color=colour,
            )  # fmt: skip
    left.set(xscale="log", xlabel="Fréchet distance", ylabel="agree with the caption in all")
    right.set(xlabel="recall", ylabel="precision")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)


CLAIM = Claim(
    name="glide",
    title="Classifier-free guidance beats CLIP guidance",
    says="Told captions, a model follows them better, at the same quality, by classifier-free "
    "guidance than by the gradient of a CLIP that was trained on noisy images (Nichol et al. 2021, "
    '"GLIDE", sections 2.4 and 4.1, figure 6). Here captions as "a dark wide dress" are composed '
    "from Fashion-MNIST's classes and from brightness and width (shoes and bags: height) measured "
    f"on the image, low, high or neither within the class. The caption model is the shipped "
    f"network with a text encoder, trained on for {TRAIN.steps:,} steps of {TRAIN.batch_size} from "
    "the shipped weights, so that it has seen the classes' labels before; its CLIP has a way down "
    f"and a text encoder of the same size, trained for {TRAIN_CLIP.steps:,}. Both are drawn from "
    f"by DDPM in {STEPS} steps, with the captions of the test images.",
    measure=measure,
    table=table,
    draw=draw,
)


if __name__ == "__main__":
    raise SystemExit(CLAIM.main())
