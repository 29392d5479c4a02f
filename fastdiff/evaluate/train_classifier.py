"""python -m fastdiff.evaluate.train_classifier: train the classifier whose features evaluate uses.

SGD with Nesterov's momentum, its rate rising over the first fifth of the run and then falling to 0;
images are mirrored and shifted by up to two pixels at random.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import errors
from ..commands.device import add_device
from ..data import ImageSet, fashion_mnist
from ..files import make_folder
from ..models.classifier import Classifier, ClassifierConfig
from ..precision import autocast
from ..spacing import count
from .classifier import accuracy, framed, save_classifier

MOMENTUM, WEIGHT_DECAY, RISE, SHIFT = 0.9, 5e-4, 0.2, 2


def train(
    data: ImageSet,
    config: ClassifierConfig,
    epochs: int,
    lr: float,
    batch: int,
    seed: int = 0,
    device: str = "cpu",
    bf16: bool = True,
) -> Classifier:
    """A classifier of labelled images, in eval mode.

    Args:
        data: images [N, C, H, W], framed in black where they are smaller than the config's, and
            labels [N] within its classes.
        epochs: times that every image is seen; batches are whole, so a few are left out of each.
        lr: the rate's peak.
        batch: images a step, at most N.
        seed: of the weights, the order and the augmentation.
        bf16: autocast to bfloat16 where it pays; weights stay float32.

    Raises:
        TypeError, ValueError: an argument is none of these, before anything is trained.
    """
    errors.is_a("data", data, ImageSet)
    errors.is_a("config", config, ClassifierConfig)
    if data.labels is None or data.labels.ndim != 1:
        raise ValueError("data: has no classes, labels [N]; a classifier learns from them")
    errors.in_range("data's labels", data.labels, config.num_classes)
    epochs, seed = count("epochs", epochs, 1), count("seed", seed, 0, (1 << 63) - 1)
    batch = count("batch", batch, 1, len(data), ", the images there are")
    if (lr := errors.number("lr", lr)) <= 0:
        raise ValueError(f"lr={lr:g}: must be positive")
    torch.manual_seed(seed)
    layout = torch.channels_last
    model: Classifier = Classifier(config).to(device, memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    each = len(data) // batch
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        lr,
        epochs * each,
        pct_start=RISE * (1 + 1e-9),  # a hair more: torch divides by 5 * RISE - 1 for 5 steps
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    x0, labels = framed(data.images, model.shape).to(device), data.labels.to(device)
    bar = tqdm(total=epochs * each * batch, unit="image", unit_scale=True)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data), device=device)[: each * batch].split(batch):
            x = augment(x0[chosen]).contiguous(memory_format=layout)
            with autocast(device, bf16):
                loss = F.cross_entropy(model(x).float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            bar.update(batch)
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    bar.close()
    return model.eval()


def augment(images: Tensor) -> Tensor:
    """uint8 [B, C, H, W] as fp32 in [-1, 1], mirrored and shifted at random, black beyond."""
    batch, _, height, width = images.shape
    x = F.pad(images.float().div_(127.5).sub_(1.0), [SHIFT] * 4, value=-1.0)
    down, right = torch.randint(2 * SHIFT + 1, (2, batch, 1), device=x.device)
    rows = torch.arange(height, device=x.device) + down
    columns = torch.arange(width, device=x.device) + right
    mirrored = torch.rand(batch, 1, device=x.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(batch, device=x.device)[:, None, None]
    # advanced indices around a slice put the channels last, which is the layout wanted
    return x[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff.evaluate.train_classifier", description=__doc__
    )
    add = parser.add_argument
    add("--data", type=Path, help="the folder of Fashion-MNIST; else the Debian package's")
    add("--out", required=True, type=Path, help="the folder to write")
    add("--epochs", type=int, default=14, help="times that each image is seen (default 14)")
    add("--lr", type=float, default=0.1, help="peak rate (default 0.1)")
    add("--batch", type=int, default=128, help="images a step (default 128)")
    add("--seed", type=int, default=0)
    add_device(parser)
    asked = parser.parse_args()
    try:
        data, test = (fashion_mnist(asked.data, split, pad=0) for split in ("train", "test"))
        make_folder(asked.out)  # or tell so before the work, not after it
        started = time.perf_counter()
        model = train(
            data, ClassifierConfig(), asked.epochs, asked.lr, asked.batch, asked.seed, asked.device
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    seconds = time.perf_counter() - started
    assert test.labels is not None
    record = {
        "epochs": asked.epochs,
        "lr": asked.lr,
        "batch": asked.batch,
        "seed": asked.seed,
        "seconds": round(seconds),
        "test_accuracy": accuracy(model.cpu(), framed(test.images, model.shape), test.labels),
    }
    save_classifier(asked.out, model, data.class_names, record)
    print(f"{record['test_accuracy']:.2%} of the test images in {seconds:.0f} s: {asked.out}")


if __name__ == "__main__":
    main()
