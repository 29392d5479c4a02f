"""How to train: one frozen record for the trainer, the command line and the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import one_of
from ..losses import WEIGHTINGS
from ..prediction import PREDICTIONS
from ..record import Record

# learning rate as a fraction of its peak, from the fraction of the run that is over
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "cooldown": lambda done: min(1.0, (1.0 - done) / 0.3),
}
TIMESTEPS = ("uniform", "loss_aware")


@dataclass(frozen=True)
class TrainConfig(Record):
    """How to train; the recipe's "train" part and the flags of `fastdiff train`.

    Attributes:
        steps: optimizer steps in all.
        batch_size: images a step, over all processes and micro-batches.
        accumulate: micro-batches that a process's part of a step is cut into, to save memory; the
            step is the same to rounding, but for dropout's masks.
        lr: peak learning rate of AdamW.
        warmup: steps over which the rate rises linearly from 0.
        decay: what the rate does after: "constant", "cosine" or "linear" (to 0 at the end), or
            "cooldown" (constant, then linear to 0 over the last 30 %).
        weight_decay: AdamW's.
        clip_grad: largest norm of the gradient; 0 leaves it alone.
        ema: decay of the moving average of the weights, or several; the first is the model that is
            sampled and saved. Each starts smaller, (1 + step) / (10 + step), so that the start is
            forgotten.
        posthoc_every: steps between snapshots from which `fastdiff.train.posthoc` makes an average
            of any length afterwards; 0 stores none.
        prediction: what the model learns to output: "eps", "x0", "v", ...
        weighting: of the loss by timestep: "simple", "min_snr", ...
        timesteps: how they are drawn: "uniform", or "loss_aware" (more often where the loss is
            large, with the weight that keeps its mean).
        label_dropout: probability that a label is replaced by -1, "no class", or a caption by the
            empty one.
        seed: of data order, timesteps, noise and dropout.
        bf16: autocast the network to bfloat16; weights and optimizer stay fp32. On a CPU without
            bfloat16 arithmetic (before AVX-512) all is fp32: ten times faster there, and closer.
        channels_last: keep images channels-last, and on a GPU the weights.
        compile: torch.compile the network's blocks, for GPUs.
        recompute: keep no activations inside the network's stages and make them again in the
            backward pass: slower, in less memory.
        fsdp: with several processes, cut weights, averages and optimizer state between them, for
            networks too large for one.
        save_every: steps between saved states; 0 saves at the end only.
        keep: saved states that are kept, beside the best.
        sample_every: steps between sample grids and pictures of the curves; 0 draws none.
        sample_steps: DDIM steps of a sample grid.
        tensorboard: write TensorBoard events too.
    """

    steps: int = 10_000
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 500
    decay: str = "constant"
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    ema: float | tuple[float, ...] = 0.999
    posthoc_every: int = 0
    prediction: str = "v"
    weighting: str = "simple"
    timesteps: str = "uniform"
    label_dropout: float = 0.1
    seed: int = 0
    bf16: bool = False
    channels_last: bool = True
    compile: bool = False
    recompute: bool = False
    fsdp: bool = False
    save_every: int = 1000
    keep: int = 3
    sample_every: int = 0
    sample_steps: int = 50
    tensorboard: bool = False

    @property
    def decays(self) -> tuple[float, ...]:
        """The averages' decays, one or more."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)

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
        one_of("timesteps", self.timesteps, TIMESTEPS)
        for name in ("steps", "batch_size", "accumulate", "keep", "sample_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        every = ("save_every", "sample_every", "posthoc_every")
        for name in ("warmup", "weight_decay", "clip_grad", "seed", *every):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value}: must be 0 or more")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: must divide batch_size={self.batch_size}"
            )
        if not self.decays or len(set(self.decays)) < len(self.decays):
            raise ValueError(f"ema={self.ema}: must be one decay or more, each once")
        if not all(0.0 <= value < 1.0 for value in self.decays):
            raise ValueError(f"ema={self.ema}: must be in [0, 1)")
        if not 0.0 <= self.label_dropout < 1.0:
            raise ValueError(f"label_dropout={self.label_dropout}: must be in [0, 1)")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: must be greater than 0")
