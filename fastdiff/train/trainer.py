"""The trainer: a resumable loop whose data and noise are functions of (seed, step, position)."""

from __future__ import annotations

import json
import textwrap
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import errors
from ..checkpoint import WEIGHTS
from ..data import ImageSet, drop_labels
from ..losses import (
    ClassifierLoss,
    DiffusionLoss,
    DistillationLoss,
    LossAwareTimesteps,
    UniformTimesteps,
)
from ..models import UNet
from ..models.distilled import Distilled
from ..models.encoder import EncoderUNet
from ..models.network import Network
from ..models.text import check_tokens
from ..precision import autocast
from ..schedule import NoiseSchedule
from ..store import Store
from .config import TrainConfig
from .curves import MISSING, can_draw
from .distributed import LostWorker, World, local, synchronised, wrapped
from .ema import SIGMA_RELS, Averages
from .finite import Watch
from .metrics import LOG_EVERY, Metrics
from .outputs import averaged, draw, export, snapshot
from .signals import interruption
from .state import collect, restore


class Trainer:
    """Trains a U-Net, or a classifier of noisy images.

    `fit()` runs to the end, `fit(resume=True)` continues a stopped run.

    The run's folder gets its last states (weights, averages, optimizer, step), `metrics.jsonl` (a
    line every ten steps), pictures, and, when it stops, a checkpoint of the averaged weights that
    `fastdiff.load` reads, with `ema-<decay>.safetensors` for each further decay. A resumed run is
    the uninterrupted one, bit for bit, on the same machine.

    Started by torchrun (see `fastdiff.train.distributed.processes`), each process takes its part
    of every batch, and the first writes; the steps are those of one process, to rounding, but for
    dropout's masks, which depend on how a batch is cut.

    Args:
        model: the network, on the device to train on; trained in place. An `EncoderUNet` learns
            the labels of noisy images.
        schedule: noise schedule; t runs over its whole length.
        data: the images, and labels if the model has classes, captions' tokens if it has those.
        config: how to train.
        out: the run's folder.
        loss: what to minimise, in place of the `DiffusionLoss` that config says, or of a
            classifier's `ClassifierLoss`: an object with
            its `weights`, as many as there are timesteps to draw, and its `with_sums`.
        distilled: what the saved models are students of; see `fastdiff.distill`.

    Raises:
        ValueError: the data's images or labels do not fit the model, the batch cannot be dealt to
            the processes, or samples cannot be drawn as sample_every and sample_steps say.
        ImportError: TensorBoard is asked for and missing.
    """

    def __init__(
        self,
        model: Network,
        schedule: NoiseSchedule,
        data: ImageSet,
        config: TrainConfig,
        out: str | Path = "runs/model",
        *,
        loss: DiffusionLoss | DistillationLoss | ClassifierLoss | None = None,
        distilled: Distilled | None = None,
    ) -> None:
        errors.is_a("model", model, Network)
        errors.is_a("schedule", schedule, NoiseSchedule)
        errors.is_a("data", data, ImageSet)
        errors.is_a("config", config, TrainConfig)
        errors.path("out", out)
        if loss is not None and not hasattr(loss, "with_sums"):
            raise TypeError(f"loss: must have with_sums, got {type(loss).__name__}")
        if distilled is not None:
            errors.is_a("distilled", distilled, Distilled)
        _check_data(model, data)
        if model.config.predict_both and config.prediction != "x0":
            raise ValueError(
                f"prediction={config.prediction!r}: a model with predict_both outputs 'x0'"
            )
        self.world = World()
        self.leads = self.world.rank == 0  # it writes and speaks
        self.sharded = config.fsdp and self.world.size > 1
        self.parts = self.world.size * config.accumulate
        if config.batch_size % self.parts:
            raise ValueError(
                f"batch_size={config.batch_size}: must be a multiple of {self.parts}, "
                f"{self.world.size} processes times accumulate={config.accumulate}"
            )
        if config.sample_every and isinstance(model, UNet):
            _check_pictures(model, schedule, config, distilled)
        self.model, self.schedule, self.data, self.config = model, schedule, data, config
        self.out, self.store = Path(out), Store(out, config.keep)
        self.step, self.seconds = 0, 0.0
        self.device = next(model.parameters()).device
        if config.channels_last and self.device.type != "cpu":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.schedule, model.prediction = schedule, config.prediction
        model.class_names, model.distilled = data.class_names, distilled
        model.recompute = config.recompute
        model.compile_blocks() if config.compile else model.fuse_blocks()
        self.loss = loss or _objective(model, schedule, config)
        levels = len(self.loss.weights)
        draws = {"uniform": UniformTimesteps, "loss_aware": LossAwareTimesteps}[config.timesteps]
        self.timesteps = draws(levels)
        self.metrics = Metrics(self.out, levels, self.device, config.tensorboard and self.leads)
        self._network = wrapped(model, self.world, config.fsdp)
        # with FSDP a process updates its parts only, which are plain tensors here
        self.weights = {name: local(p) for name, p in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.averages = Averages(
            list(self.weights.values()), config.decays, SIGMA_RELS if config.posthoc_every else ()
        )
        # to read a number back stops an accelerator's queue: there, only now and then
        self.check_every = 1 if self.device.type == "cpu" else LOG_EVERY
        self.watch = Watch(self.device)

    @property
    def ema(self) -> Network:
        """The network with the averaged weights of the first decay; shares their memory."""
        return averaged(self, f"ema.{self.config.decays[0]}")

    def fit(self, resume: bool = False, progress: bool = True) -> Network:
        """Train to `config.steps` and return the averaged model; Ctrl-C or SIGTERM stops sooner.

        Args:
            resume: continue from the newest good state in the run's folder.
            progress: show a bar with loss, rate and time left.

        Raises:
            FileExistsError: the folder holds a run or a model and `resume` is false.
            FileNotFoundError: `resume` is true and it holds none.
            ValueError: the run was begun with another schedule, prediction, weighting, timesteps
                or distillation, or has made more steps.
            BlockingIOError: another run writes to the folder.
            OSError: it cannot be written.
            FloatingPointError: loss or gradient is not finite; the weights before it are saved.
            LostWorker: a step failed in one of several processes.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            self.store.lock() if self.leads else nullcontext(),
            interruption() as interrupted,
            torch.random.fork_rng(devices),
        ):
            self._start(resume)
            self.model.train()
            try:
                self._run(interrupted, progress)
            except RuntimeError as error:
                if self.world.size == 1:
                    raise
                said = str(error).split(". ")[0]
                raise LostWorker(
                    f"process {self.world.rank} of {self.world.size}, step {self.step}: {said}; "
                    "if another process died, that is why, and its message says more. The last "
                    f"state in {self.out} is good: start all of them again with --resume"
                ) from error
            finally:
                self.metrics.close()
        return self.ema

    def _run(self, interrupted: Event, progress: bool) -> None:
        config, before, started = self.config, self.seconds, time.perf_counter()
        show = progress and self.leads
        bar = tqdm(initial=self.step, total=config.steps, unit="step", disable=not show)
        stopped = False
        with bar:
            while self.step < config.steps and not stopped:
                self._train_step()
                self.seconds = before + time.perf_counter() - started
                bar.update()
                if self.step % self.check_every == 0:
                    stopped = self.world.any(interrupted.is_set(), self.device)
                if self.step % LOG_EVERY == 0:
                    self._log(bar)
                if self._due(config.posthoc_every):
                    self._check()
                    snapshot(self)
                if self._due(config.save_every) and self.step < config.steps:
                    self._save()
                if self._due(config.sample_every) and self.step < config.steps:
                    self._check()
                    draw(self)
        self._save()
        export(self)

    def _start(self, resume: bool) -> None:
        """Restore the run's state, or refuse; nothing is trained before a state can be saved."""
        state: Any = None
        if self.leads:
            try:
                if resume and not self.store.exists():
                    raise FileNotFoundError(f"{self.out}: no run to resume; leave out --resume")
                if not resume and (self.store.exists() or (self.out / WEIGHTS).exists()):
                    raise FileExistsError(
                        f"{self.out}: already holds a run; resume it (--resume) or choose another "
                        "folder"
                    )
                state = self.store.load() if resume else None
                if state is not None:
                    self._refuse_another(state[1])
                copies = 3 + len(self.averages.values)
                self.store.check(4 * copies * sum(p.numel() for p in self.model.parameters()))
            except (OSError, ValueError) as error:
                state = error
        # what is wrong is known to the first process alone, and stops all
        state = self.world.share(state)
        if isinstance(state, Exception):
            raise state
        if state is not None:
            tensors, record = state
            restore(self, tensors)
            self.step, self.seconds = record["step"], record["seconds"]
            self.metrics.loss = record["loss"]  # the score of states until the next window ends
        if self.leads:
            self.metrics.start(self.step)
        if self.leads and self.config.sample_every and not can_draw():
            warnings.warn(f"no curves are drawn: {MISSING}", stacklevel=3)

    def _learns(self) -> dict[str, Any]:
        """What a run's network learns, which stays when it is resumed: JSON values."""
        names = "prediction", "weighting", "timesteps"
        made = None if self.model.distilled is None else self.model.distilled.to_json()
        own = {name: getattr(self.config, name) for name in names}
        facts = {"schedule": self.schedule.to_json(), **own, "distilled": made}
        return json.loads(json.dumps(facts))

    def _refuse_another(self, record: dict[str, Any]) -> None:
        """Raise unless a state's record is of the run that is to be resumed."""
        asked = self._learns()
        for name, value in record.get("learns", asked).items():
            if value != asked[name]:
                was, now = (textwrap.shorten(str(v), 100) for v in (value, asked[name]))
                raise ValueError(
                    f"{name}={now}: the run in {self.out} was begun with {was}; resume it with "
                    "that, or begin another in another folder"
                )
        if record["step"] > self.config.steps:
            raise ValueError(
                f"steps={self.config.steps}: the run in {self.out} has made {record['step']}; "
                "give as many or more"
            )

    def _train_step(self) -> Tensor:
        """Make a step; its loss, a scalar on the device."""
        config, step, size = self.config, self.step, self.config.batch_size // self.parts
        seen, by_t = [], torch.zeros(len(self.loss.weights), 3, device=self.device)
        for k in range(config.accumulate):
            part = self.world.rank * config.accumulate + k
            first = part * size
            # what dropout draws is the same in a resumed run
            seed = np.random.SeedSequence([config.seed, step, part]).generate_state(1)
            torch.manual_seed(int(seed[0]))
            images, labels = self.data.batch(
                step,
                config.batch_size,
                config.seed,
                part,
                self.parts,
                channels_last=config.channels_last,
            )
            x0, cond = self._sent(images), None
            if self.model.conditional and labels is not None:
                null, rate = UNet.null_cond(labels), config.label_dropout
                cond = self._sent(drop_labels(labels, rate, config.seed, step, first, null))
            t, weight = self.timesteps.draw(size, config.seed, step, first, self.device)
            last = k == config.accumulate - 1
            with synchronised(self._network, last):
                with autocast(self.device, config.bf16):
                    losses, sums = self.loss.with_sums(
                        self._network, x0, t, cond, seed=config.seed, row=step, first_index=first
                    )
                (weight * losses).sum().div(size * config.accumulate).backward()
            seen.append(torch.stack((t.float(), weight, losses.detach())))
            by_t += sums
        # of the whole batch, in its order: every process knows the same
        t, weight, losses = self.world.gather(torch.cat(seen, 1))
        loss, norm = (weight * losses).mean(), self._gradient_norm()
        self.watch.see(step, t, losses, loss, norm)
        if (step + 1) % self.check_every == 0:
            self._check()
        # of losses that are not finite nothing is learnt, nor of those after them
        self.timesteps.update(t.long(), losses.masked_fill(self.watch.bad, torch.nan))
        self.metrics.add(loss, norm, self.world.sum(by_t), self.watch.bad)
        self._update(norm)
        return loss

    def _sent(self, x: Tensor) -> Tensor:
        # from pinned memory the copy is made while the host goes on
        x = x.pin_memory() if self.device.type == "cuda" else x
        return x.to(self.device, non_blocking=True)

    def _gradient_norm(self) -> Tensor:
        for name, parameter in self.model.named_parameters():
            self.weights[name].grad = None if parameter.grad is None else local(parameter.grad)
        norm = torch.nn.utils.get_total_norm(
            [w.grad for w in self.weights.values() if w.grad is not None]
        )
        return self.world.sum(norm.square()).sqrt() if self.sharded else norm

    def _update(self, norm: Tensor) -> None:
        """Update weights and averages; the weights only if all went well since the last check."""
        config, optimizer = self.config, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step)
        # the fused update divides the gradient by grad_scale, and does nothing where found_inf
        optimizer.found_inf = self.watch.bad.float()  # type: ignore[attr-defined]
        scale = (norm / config.clip_grad).clamp(min=1) if config.clip_grad else None
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        self.model.zero_grad()
        optimizer.zero_grad()
        self.averages.update(self.step)
        self.step += 1

    def _check(self) -> None:
        """Raise if a step since the last check was not finite, with the state before it saved."""
        broken = self.watch.look()
        if broken is None:
            return
        config, self.step = self.config, broken.step
        self._save()
        index = self.data.indices(self.step, config.batch_size, config.seed)
        raise FloatingPointError(
            f"{broken.message(index)}. The weights before this step are saved in {self.out}: "
            f"resume it with a smaller lr (now {config.lr}), a smaller clip_grad or in fp32; if it "
            "stops here again, remove this state and resume from the one before"
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, bar: Any) -> None:
        if not self.leads:
            self.metrics.reset()
            return
        lr = self.config.learning_rate(self.step - 1)
        rate = self.metrics.write(self.step, self.config.batch_size, lr, self.seconds)
        bar.set_postfix_str(f"loss {self.metrics.loss:.4f}, {rate:.0f} images/s", refresh=False)

    def _save(self) -> None:
        self._check()
        tensors = collect(self)
        if self.leads:
            record = {
                "step": self.step,
                "seconds": self.seconds,
                "loss": self.metrics.loss,
                "config": self.config.to_json(),
                "learns": self._learns(),
            }
            self.store.save(self.step, tensors, record, self.metrics.loss)


def _objective(
    model: Network, schedule: NoiseSchedule, config: TrainConfig
) -> DiffusionLoss | ClassifierLoss:
    """What a network of its kind minimises."""
    if not isinstance(model, EncoderUNet):
        learned = model.config.learned_variance
        return DiffusionLoss(schedule, config.prediction, config.weighting, learned)
    if config.label_dropout:
        raise ValueError(
            f"label_dropout={config.label_dropout}: a classifier learns from every label; give 0"
        )
    return ClassifierLoss(schedule)


def _check_pictures(
    model: UNet, schedule: NoiseSchedule, config: TrainConfig, distilled: Distilled | None
) -> None:
    if (channels := model.config.in_channels) not in (1, 3):
        raise ValueError(
            f"sample_every={config.sample_every}: pictures have 1 or 3 channels, the model's "
            f"images {channels}; give 0"
        )
    if distilled is None and config.sample_steps > len(schedule):
        raise ValueError(
            f"sample_steps={config.sample_steps}: must be at most {len(schedule)}, the schedule's"
        )


def _check_data(model: Network, data: ImageSet) -> None:
    config, shape = model.config, data.shape
    if shape != (wanted := (config.in_channels, config.image_size, config.image_size)):
        raise ValueError(
            f"data with images {shape}: the model takes {wanted}; pad or choose another"
        )
    if not model.conditional:
        return
    if data.labels is None:
        raise ValueError("data without labels: the model is told classes, or captions' tokens")
    if config.vocabulary is not None:
        check_tokens("the labels of data", data.labels, len(data), config)
        return
    if data.labels.ndim != 1:
        raise ValueError("data with captions: the model has classes; give a label an image")
    classes = model.outputs if isinstance(model, EncoderUNet) else config.num_classes
    if classes is not None and (high := int(data.labels.max())) >= classes:
        raise ValueError(f"data with label {high}: the model has {classes} classes")
