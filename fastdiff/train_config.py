"""How to train: one frozen record for the trainer, the command line and the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import one_of
from .losses import WEIGHTINGS
from .prediction import PREDICTIONS
from .record import Record

# learning rate as a fraction of its peak, from the fraction of the run that is over
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "cooldown": lambda done: min(1.0, (1.0 - done) / 0.3),
}


@dataclass(frozen=True)
class TrainConfig(Record):
    """How to train; the recipe's "train" part and the flags of `fastdiff train`.

    Attributes:
        steps: optimizer steps in all.
        batch_size: images a step.
        lr: peak learning rate of AdamW.
        warmup: steps over which the rate rises linearly from 0.
        decay: what the rate does after: "constant", "cosine" or "linear" (to 0 at the end), or
            "cooldown" (constant, then linear to 0 over the last 30 %).
        weight_decay: AdamW's.
        clip_grad: largest norm of the gradient; 0 leaves it alone.
        ema: decay of the moving average of the weights; the model that is sampled and saved. It
            starts smaller, (1 + step) / (10 + step), so that the start is forgotten.
        prediction: what the model learns to output: "eps", "x0", "v", ...
        weighting: of the loss by timestep: "simple" or "min_snr".
        label_dropout: probability that a label is replaced by -1, "no class".
        seed: of data order, timesteps, noise and dropout.
        bf16: autocast the network to bfloat16; weights and optimizer stay fp32.
        channels_last: keep images and weights channels-last.
        compile: torch.compile the network.
        save_every: steps between saved states; 0 saves at the end only.
        sample_every: steps between sample grids; 0 draws none.
        sample_steps: DDIM steps of a sample grid.
    """

    steps: int = 10_000
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 500
    decay: str = "constant"
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    ema: float = 0.999
    prediction: str = "v"
    weighting: str = "simple"
    label_dropout: float = 0.1
    seed: int = 0
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    save_every: int = 1000
    sample_every: int = 0
    sample_steps: int = 50

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, 0 .. steps - 1."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * rise * DECAYS[self.decay](done)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("decay", self.decay, DECAYS)
        one_of("prediction", self.prediction, PREDICTIONS)
        one_of("weighting", self.weighting, WEIGHTINGS)
        for name in ("steps", "batch_size", "sample_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        for name in ("warmup", "weight_decay", "clip_grad", "seed", "save_every", "sample_every"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value}: must be 0 or more")
        for name in ("ema", "label_dropout"):
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                raise ValueError(f"{name}={value}: must be in [0, 1)")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: must be greater than 0")
