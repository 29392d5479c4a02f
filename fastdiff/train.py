"""The trainer: a resumable loop whose data and noise are functions of (seed, step)."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import fit_state, read_tensors, save, write_bytes, write_tensors
from .data import ImageSet
from .images import grid
from .losses import DiffusionLoss
from .models import UNet
from .samplers import DDIMSampler
from .schedule import NoiseSchedule
from .train_config import TrainConfig

__all__ = ["TrainConfig", "Trainer"]

STATE, METRICS, LOG_EVERY = "state.safetensors", "metrics.jsonl", 10


class Trainer:
    """Trains a U-Net; `fit()` runs to the end, `fit(resume=True)` continues a stopped run.

    The run's folder gets `state.safetensors` (weights, their average, optimizer, step),
    `metrics.jsonl` (a line every ten steps) and, when it stops, a checkpoint of the averaged
    weights that `fastdiff.load` reads. A resumed run is the uninterrupted one, bit for bit, on
    the same machine.

    Args:
        model: the network, on the device to train on; trained in place.
        schedule: noise schedule; t runs over its whole length.
        data: the images, and labels if the model has classes.
        config: how to train.
        out: the run's folder.

    Raises:
        ValueError: the data's images or labels do not fit the model.
    """

    def __init__(
        self,
        model: UNet,
        schedule: NoiseSchedule,
        data: ImageSet,
        config: TrainConfig,
        out: str | Path = "runs/model",
    ) -> None:
        _check_data(model, data)
        self.model, self.schedule, self.data, self.config = model, schedule, data, config
        self.out = Path(out)
        self.step, self.seconds = 0, 0.0
        self.device = next(model.parameters()).device
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(memory_format=self.layout)  # type: ignore[call-overload]
        model.schedule, model.prediction = schedule, config.prediction
        model.class_names = data.class_names
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.loss = DiffusionLoss(schedule, config.prediction, config.weighting)
        self._network = torch.compile(model) if config.compile else model

    def fit(self, resume: bool = False, progress: bool = True) -> UNet:
        """Train to `config.steps` and return the averaged model.

        Args:
            resume: continue from the state in the run's folder.
            progress: show a bar with loss and rate.

        Raises:
            FileExistsError: the folder holds a run and `resume` is false.
            FileNotFoundError: `resume` is true and it holds none.
            FloatingPointError: the loss or gradient is not finite; the last state stays.
        """
        state = self.out / STATE
        if resume:
            self._restore(state)
        elif state.exists():
            raise FileExistsError(
                f"{self.out}: already holds a run; resume it (--resume) or choose another folder"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        devices = [self.device] if self.device.type == "cuda" else []
        first, before, started = self.step, self.seconds, time.perf_counter()
        bar = tqdm(initial=first, total=self.config.steps, unit="step", disable=not progress)
        self.model.train()
        with bar, _interruption() as interrupted, torch.random.fork_rng(devices):
            while self.step < self.config.steps and not interrupted.is_set():
                loss = self._train_step()
                self.seconds = before + time.perf_counter() - started
                rate = (self.step - first) * self.config.batch_size / (self.seconds - before)
                bar.update()
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)
                if self.step % LOG_EVERY == 0:
                    self._log({"step": self.step, "loss": loss, "images_per_s": round(rate, 1)})
                if self._due(self.config.save_every):
                    self._save()
                if self._due(self.config.sample_every):
                    self._draw()
        self._save()
        record = {"config": self.config.to_json(), "step": self.step, "seconds": self.seconds}
        prediction, names = self.config.prediction, self.data.class_names
        save(self.out, self.ema, self.schedule, prediction, names, record)
        return self.ema

    def _train_step(self) -> float:
        config, step = self.config, self.step
        images, labels = self.data.batch(step, config.batch_size, config.seed)
        # one seed a step: a resumed run draws what the uninterrupted one would have
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
        x0 = images.to(self.device, memory_format=self.layout)
        cond = self._drop_labels(labels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            loss = self.loss(self._network, x0, cond=cond)
        loss.backward()
        limit = config.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"step {step}: loss {value}, gradient norm {norm.item()}; the last saved state in "
                f"{self.out} is good: resume it with a smaller lr (now {config.lr}) or fp32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.ema.parameters()), [p.detach() for p in self.model.parameters()], 1 - decay
        )
        self.step += 1
        return value

    def _drop_labels(self, labels: Tensor | None) -> Tensor | None:
        if self.model.config.num_classes is None or labels is None:
            return None
        kept = torch.rand(len(labels)) >= self.config.label_dropout
        return torch.where(kept, labels, -1).to(self.device)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.config.steps

    def _log(self, line: dict[str, float]) -> None:
        with open(self.out / METRICS, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _draw(self) -> None:
        config, count = self.model.config, 100
        cond = torch.arange(count, device=self.device) // 10 % (config.num_classes or 1)
        sampler = DDIMSampler(
            self.schedule,
            steps=self.config.sample_steps,
            spacing="trailing",
            prediction=self.config.prediction,
            clip=1.0,
        )
        x = sampler.sample(
            self.ema,
            (count, config.in_channels, config.image_size, config.image_size),
            seed=self.config.seed,
            cond=cond if config.num_classes else None,
        )
        grid(x, columns=10).save(self.out / f"samples-{self.step:06d}.png")

    def _save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        record = {"step": self.step, "seconds": self.seconds, "config": self.config.to_json()}
        write_tensors(self.out / STATE, tensors, {"run": json.dumps(record)})

    def _restore(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing; there is no run to resume, leave out --resume"
            )
        tensors, metadata = read_tensors(path)
        if "run" not in metadata:
            raise ValueError(f"{path}: holds no run's state; it was not written by the trainer")
        for prefix, module in (("model.", self.model), ("ema.", self.ema)):
            part = _part(tensors, prefix)
            fit_state(path, module, part)
            module.load_state_dict(part)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                # laid out as the parameter is: the fused update runs through memory in order
                k: torch.empty_like(parameter).copy_(v) if v.ndim else v.to(self.device)
                for k, v in _part(tensors, f"optimizer.{name}.").items()
            }
        run = json.loads(metadata["run"])
        self.step, self.seconds = run["step"], run["seconds"]
        metrics = self.out / METRICS
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        # steps after the last save are made again
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        write_bytes(metrics, "".join(f"{line}\n" for line in kept).encode())


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _check_data(model: UNet, data: ImageSet) -> None:
    config, shape = model.config, tuple(data.images.shape[1:])
    if shape != (wanted := (config.in_channels, config.image_size, config.image_size)):
        raise ValueError(
            f"data with images {shape}: the model takes {wanted}; pad or choose another"
        )
    if config.learned_variance:
        raise ValueError("model.config.learned_variance=True: the trainer's losses do not learn it")
    if config.num_classes is not None:
        if data.labels is None:
            raise ValueError(f"data without labels: the model has {config.num_classes} classes")
        if (high := int(data.labels.max())) >= config.num_classes:
            raise ValueError(f"data with label {high}: the model has {config.num_classes} classes")


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a run stops between steps; a second raises."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
