"""python bench/claims/glide.py: CLIP guidance against classifier-free guidance, told captions."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib import image
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from tqdm import tqdm

from bench.claims.claim import RUNS, Claim, Point, Points, plus_minus
from bench.claims.quality import Quality
from fastdiff import DDPMSampler, TrainConfig, Trainer, UNet, load, ops, optimize
from fastdiff.data import fashion_mnist
from fastdiff.data.captions import LENGTH, WORDS, Captions, tokenize
from fastdiff.evaluate import balanced
from fastdiff.files import read_tensors, write_tensors
from fastdiff.guidance.clip import CLIPGuidance
from fastdiff.images import grid, to_uint8
from fastdiff.losses import UniformTimesteps
from fastdiff.models.clip import CLIP, contrastive_loss
from fastdiff.precision import autocast

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
PICTURED = {NONE: 0.0, FREE: 2.0, CLIP_GUIDED: 16.0}
SHOWN = (
    "a dark narrow dress",
    "a bright wide dress",
    "a dark trouser",
    "a bright wide t-shirt",
    "a dark low sneaker",
    "a bright tall boot",
    "a bright low bag",
    "a dark tall bag",
)
COLOURS = {FREE: "#4c78a8", CLIP_GUIDED: "#e45756"}
WEIGHTS = {FREE: (0.5, 1.0, 2.0, 4.0), CLIP_GUIDED: (1.0, 4.0, 16.0, 64.0)}
AGREEMENTS = ("accuracy", "brightness", "extent", "all")


@lru_cache(maxsize=1)
def captions() -> Captions:
    training = fashion_mnist()
    assert training.labels is not None
    return Captions(training.images, training.labels)


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
    data = fashion_mnist(captions=True)
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
    data = fashion_mnist(captions=True)
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
            with autocast("cpu", True):
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


class Judge(Quality):
    """What images are asked for, and how well a set of them is what was asked for."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        test, told = fashion_mnist(split="test"), fashion_mnist(split="test", captions=True)
        assert test.labels is not None and told.labels is not None
        order = balanced(test.labels)[:count]
        assert torch.equal(test.labels[order], self.labels)
        self.images, self.tokens = test.images[order], told.labels[order]
        self.thirds = captions().read(self.images, self.labels)

    def hits(self, images: Tensor, classes: Tensor, first: int) -> dict[str, Tensor]:
        """Whether the class, and the thirds, are the caption's."""
        asked = slice(first, first + len(images))
        accuracy = classes == self.labels[asked]
        right = captions().read(images, self.labels[asked]) == self.thirds[asked]
        bright, extent = right.unbind(1)
        return {
            "accuracy": accuracy, "brightness": bright, "extent": extent,
            "all": accuracy & right.all(1),
        }  # fmt: skip


def measure(points: Points, count: int, seeds: Sequence[int]) -> None:
    judge = Judge(count)
    points.measure(REAL, lambda: judge.of(judge.images))
    model, clip = caption_model(), noisy_clip()
    fast = optimize(model, "bfloat16")
    shape = model.config.in_channels, model.config.image_size, model.config.image_size

    def drawn(tokens: Tensor, kind: str, weight: float, seed: int) -> Tensor:
        w, scale = (weight, 0.0) if kind == FREE else (0.0, weight)
        sampler = DDPMSampler(
            model.schedule, STEPS, "small", "trailing", model.prediction, 1.0,
            classifier_scale=scale,
        )  # fmt: skip
        images = []
        for first in range(0, len(tokens), BATCH):
            some = tokens[first : first + BATCH]
            x = sampler.sample(
                fast,
                (len(some), *shape),
                seed,
                cond=some,
                guidance=w or None,
                gradient=CLIPGuidance(clip, some) if scale else None,
                first_index=first,
            )
            images.append(to_uint8(x))
        return torch.cat(images)

    told = dict(zip(seeds, judge.tokens.chunk(len(seeds)), strict=True))

    def point(name: str, kind: str, weight: float) -> None:
        def draw(seed: int, _: Tensor, count: int) -> Tensor:
            return drawn(told[seed], kind, weight, seed)

        judge.measure(points, name, seeds, draw, kind=kind, weight=weight)

    def picture(kind: str, weight: float) -> Point:
        """A row of images a seed, a column a caption."""
        rows = [drawn(tokenize(SHOWN), kind, weight, seed) for seed in range(3)]
        written = io.BytesIO()
        grid(torch.cat(rows), columns=len(SHOWN)).save(written, "PNG")
        return {"picture": base64.b64encode(written.getvalue()).decode()}

    point(NONE, NONE, 0.0)
    for kind, weights in WEIGHTS.items():
        for weight in weights:
            point(f"{kind} {weight:g}", kind, weight)
    for kind, weight in PICTURED.items():
        points.measure(f"picture, {kind}", lambda k=kind, w=weight: picture(k, w))


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
    figure.set_size_inches(9, 6.4)
    above, below = figure.subfigures(2, 1, height_ratios=(4, 2.4))
    left, right = above.subplots(1, 2)
    for kind, colour in COLOURS.items():
        rows = curve(found, kind)
        how = {"color": colour, "marker": "o", "markersize": 4, "label": f"{kind} guidance"}
        for axes, x, y in ((left, "fd", "all"), (right, "recall", "precision")):
            axes.errorbar(
                [p[x] for p in rows], [p[y] for p in rows], [p[f"{y}_sd"] for p in rows],
                [p[f"{x}_sd"] for p in rows], capsize=2, **how,
            )  # fmt: skip
        for p in rows[1:]:
            left.annotate(
                f"{p['weight']:g}", (p["fd"], p["all"]), (4, 3), textcoords="offset points",
                fontsize=7, color=colour,
            )  # fmt: skip
    left.set(xscale="log", xlabel="Fréchet distance", ylabel="agree with the caption in all")
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    left.xaxis.set_minor_formatter("{x:g}")
    right.set(xlabel="recall", ylabel="precision")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    panels = below.subplots(1, len(PICTURED))
    for panel, (kind, weight) in zip(panels, PICTURED.items(), strict=True):
        written = base64.b64decode(found[f"picture, {kind}"]["picture"])
        pixels = image.imread(io.BytesIO(written))
        panel.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        width = pixels.shape[1] / len(SHOWN)
        middles = [(k + 0.5) * width for k in range(len(SHOWN))]
        panel.set_xticks(middles, SHOWN, rotation=60, ha="right", fontsize=6)
        panel.set_yticks([])
        panel.set_title(f"{kind} {weight:g}" if weight else "no guidance", fontsize=8)


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
