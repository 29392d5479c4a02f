"""The stages: each halves the steps of the model before it, and is a run of the Trainer."""

from __future__ import annotations

import copy
import json
import math
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import errors
from ..checkpoint import CONFIG, load
from ..data import ImageSet
from ..engine import optimize
from ..engine.remembered import read_choices
from ..engine.tune import measured, recall
from ..files import make_folder, read_object, write_bytes
from ..integrations.diffusers import from_diffusers
from ..job import checksum
from ..losses.distillation import DistillationLoss
from ..models import UNet
from ..models.distilled import Distilled
from ..schedule import NoiseSchedule
from ..train import TrainConfig, Trainer
from ..train.distributed import World
from .config import DistillConfig
from .report import REPORT, write_report

# Salimans & Ho 2022, table 1 and appendix: Adam, no average of the weights, rate falling to 0
TRAIN = TrainConfig(
    steps=10_000,
    lr=1e-4,
    warmup=0,
    decay="linear",
    ema=0.0,
    weighting="snr_trunc",
    label_dropout=0.0,
)


CHOICES = "engine.json"  # what the engine measured of the teacher
BEGUN = "distill.json"  # what all the stages come from
# how much larger an error in eps may be in x0 where sampling starts: 157 on the linear schedule
MAGNIFIED = 1000.0


def distill(
    teacher: nn.Module,
    schedule: NoiseSchedule | None,
    start_steps: int,
    end_steps: int,
    data: ImageSet,
    out: str | Path = "runs/students",
    *,
    train: TrainConfig = TRAIN,
    held_out: ImageSet | None = None,
    prediction: str | None = None,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> UNet:
    """Distil a model, in stages, into one that takes end_steps DDIM steps; returns that student.

    The folder gets one of a student's steps for each stage (out/32, out/16, ...): its checkpoint,
    which `fastdiff.load` reads and whose `distilled` says how it is sampled; the states and curves
    of a training run; and, with `held_out`, report.json and a picture beside its teacher's. Any
    number of processes, as for the Trainer.

    Args:
        teacher: the network, in eval mode, on the device to train on. It stays as it is. A UNet,
            or diffusers' UNet2DModel, which `fastdiff.integrations.diffusers` makes one of.
        schedule: its noise schedule; None is `teacher.schedule`.
        start_steps, end_steps, options: fields of `DistillConfig`.
        data: images, and labels if the model has classes.
        out: the folder.
        train: how each stage is trained; students predict what their teacher does.
        held_out: images that were not trained on.
        prediction: what the teacher predicts, where it does not say (`teacher.prediction`).
        resume: go on in a folder that holds stages.
        progress: show a bar for each stage.

    Raises:
        ValueError: what does not fit together, before any work.
            So are a folder's stages of another teacher, or otherwise guided.
        FileExistsError: the folder holds stages and `resume` is false.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state is saved, `resume` goes on.
        OSError, FloatingPointError, LostWorker: as `Trainer.fit`.
    """
    config = DistillConfig(start_steps=start_steps, end_steps=end_steps, **options)
    errors.is_a("teacher", teacher, nn.Module)
    if schedule is not None:
        errors.is_a("schedule", schedule, NoiseSchedule)
    errors.is_a("train", train, TrainConfig)
    errors.is_a("data", data, ImageSet)
    errors.path("out", out)
    if not isinstance(teacher, UNet):
        teacher = from_diffusers(teacher)
    prediction = teacher.prediction or prediction
    if prediction is None:
        raise ValueError(
            "prediction: the teacher does not say what it predicts; give it: 'eps', .."
        )
    schedule = _fitting(teacher, schedule, prediction, config)
    device = next(teacher.parameters()).device
    train = replace(train, prediction=prediction)
    timesteps = schedule.timesteps(config.start_steps, "trailing").tolist()
    if teacher.distilled is not None:
        timesteps = list(teacher.distilled.timesteps)
    guidance = teacher.distilled.guidance if teacher.distilled else config.guidance
    _begin(Path(out), teacher, schedule, config, resume)
    for k, steps in enumerate(config.stages):
        stage, folder = _training(train, config, k), Path(out) / str(steps)
        loss = _objective(teacher, schedule, timesteps, stage, config, first=k == 0)
        start, timesteps = _start(teacher, config), timesteps[::2]
        made = Distilled(tuple(timesteps), guidance)
        student = copy.deepcopy(start)
        trainer = Trainer(student, schedule, data, stage, folder, loss=loss, distilled=made)
        if not (resume and _finished(folder, stage)):
            _settle_engine(trainer, loss, Path(out))
            trainer.fit(resume=resume and trainer.store.exists(), progress=progress)
            if trainer.step < stage.steps:
                raise KeyboardInterrupt
        trainer.world.share(None)  # the others read what the first process has written
        student = load(folder).to(device)
        due = config.report_images and trainer.leads and not _reported(folder, stage)
        if held_out is not None and due:
            write_report(folder, start, student, loss, held_out, config, stage.steps)
        teacher = student
    return teacher


def _fitting(
    teacher: UNet, schedule: NoiseSchedule | None, prediction: str, config: DistillConfig
) -> NoiseSchedule:
    """The schedule, once it and the configuration fit the teacher."""
    own = teacher.schedule
    if schedule is None:
        schedule = own
    if schedule is None:
        raise ValueError("schedule: the teacher carries none; give the one it was trained with")
    if own is not None and schedule != own:
        raise ValueError(
            f"schedule={schedule!r}: the teacher was trained with {own!r}, whose timesteps it "
            "knows; leave schedule out, or train the teacher on the other one"
        )
    made = teacher.distilled
    if made is not None and len(made.timesteps) != config.start_steps:
        raise ValueError(
            f"start_steps={config.start_steps}: the teacher was distilled to {len(made.timesteps)} "
            "steps; start there"
        )
    if made is not None and config.guidance is not None:
        raise ValueError(
            f"guidance={config.guidance}: the teacher was distilled and has its guidance in it; "
            "leave it out"
        )
    if teacher.config.guidance_max not in (None, config.guidance_max):
        raise ValueError(
            f"guidance_max={config.guidance_max}: the teacher takes a weight from 0 to "
            f"{teacher.config.guidance_max}; give that"
        )
    if config.start_steps > len(schedule):
        raise ValueError(
            f"start_steps={config.start_steps}: must be at most {len(schedule)}, the schedule's"
        )
    if prediction in ("eps", "score"):
        t = int(schedule.timesteps(config.start_steps, "trailing")[0])
        magnified = schedule.sigma[t] / schedule.alpha[t] if schedule.alpha[t] else math.inf
        if magnified > MAGNIFIED:
            raise ValueError(
                f"teacher: predicts {prediction!r}, of which an error at timestep {t} is "
                f"{magnified:.3g} times as large in x0, so that few steps cannot start there; "
                "train a teacher that predicts 'v' or 'x0', or on NoiseSchedule.linear"
            )
    if teacher.config.learned_variance:
        raise ValueError(
            "teacher: has a learned variance, which deterministic steps have no use for; "
            "train or load one without"
        )
    if teacher.config.vocabulary is not None:
        raise ValueError("teacher: is told captions; distil one that has classes, or neither")
    guided = config.guidance is not None or config.guidance_max is not None
    if guided and teacher.config.num_classes is None:
        raise ValueError(f"guidance={config.guidance}: the teacher has no classes; leave it out")
    return schedule


def _begin(
    out: Path, teacher: UNet, schedule: NoiseSchedule, config: DistillConfig, resume: bool
) -> None:
    """Write what the stages come from, or see that those of the folder come from the same."""
    world, wrong, path = World(), None, out / BEGUN
    own = {"teacher": checksum(teacher), "schedule": schedule.to_json()}
    own |= {name: getattr(config, name) for name in ("start_steps", "guidance", "guidance_max")}
    own = json.loads(json.dumps(own))
    if world.rank == 0:
        try:
            stages = [out / str(steps) for steps in config.stages]
            if not resume and (held := [s for s in stages if any(s.glob("*.safetensors"))]):
                raise FileExistsError(
                    f"{held[0]}: already holds a run; resume it (--resume) or choose another folder"
                )
            if not (resume and path.is_file()):
                make_folder(out)
                write_bytes(path, (json.dumps(own, indent=1) + "\n").encode())
            there = read_object(path)
            if odd := [name for name in own if there.get(name) != own[name]]:
                was, now = (textwrap.shorten(str(d.get(odd[0])), 100) for d in (there, own))
                raise ValueError(
                    f"{odd[0]}={now}: the stages in {out} were begun with {was}; resume with "
                    "that, or choose another folder"
                )
        except (OSError, ValueError) as error:
            wrong = error
    if wrong := world.share(wrong):
        raise wrong


def _training(train: TrainConfig, config: DistillConfig, k: int) -> TrainConfig:
    """How stage k is trained."""
    steps = config.updates[k] if k < len(config.updates) else train.steps
    return replace(train, steps=steps, lr=config.lrs[k] if k < len(config.lrs) else train.lr)


def _objective(
    teacher: UNet,
    schedule: NoiseSchedule,
    timesteps: list[int],
    train: TrainConfig,
    config: DistillConfig,
    first: bool,
) -> DistillationLoss:
    # later teachers are students: what they learned has its weight in it, or as an input
    guidance: float | tuple[float, float] | None = config.guidance if first else None
    if config.guidance_max is not None:
        guidance = (0.0, config.guidance_max)
    network: nn.Module = teacher.eval()
    if config.engine != "off":
        network = optimize(teacher, config.engine)
    prediction, weighting = train.prediction, train.weighting
    return DistillationLoss(
        network, schedule, timesteps, prediction, weighting=weighting, guidance=guidance
    )


def _start(teacher: UNet, config: DistillConfig) -> UNet:
    """A student before its training: the teacher, with an input for the weight if it needs one."""
    shape = replace(teacher.config, guidance_max=config.guidance_max, dropout=0.0)
    student = UNet(shape).to(next(teacher.parameters()).device)
    student.schedule = teacher.schedule
    given = teacher.config.guidance_max == config.guidance_max
    student.load_state_dict(teacher.state_dict(), strict=given)
    return student.eval()


def _settle_engine(trainer: Trainer, loss: DistillationLoss, out: Path) -> None:
    """Have the teacher's backends measured once for a folder and for all processes.

    They differ in rounding; so a run that is resumed computes what the uninterrupted one would.
    """
    path, choices = out / CHOICES, None
    if trainer.leads:
        if path.is_file():
            recall(read_choices(path))
        size = trainer.config.batch_size // trainer.parts
        i = torch.zeros(size, dtype=torch.int64, device=trainer.device)
        cond = None if trainer.model.config.num_classes is None else i
        w: Any = loss.guidance
        if loss.draws_weight:
            w = torch.zeros(size, device=trainer.device)
        loss.target_of(torch.zeros(size, *trainer.data.shape, device=trainer.device), i, cond, w)
        make_folder(out)
        write_bytes(path, json.dumps(choices := measured()).encode())
    choices = trainer.world.share(choices)
    if not trainer.leads:
        recall(choices)


def _reported(folder: Path, stage: TrainConfig) -> bool:
    """Whether the folder's report is of the stage's student."""
    path = folder / REPORT
    return path.is_file() and read_object(path).get("step") == stage.steps


def _finished(folder: Path, stage: TrainConfig) -> bool:
    """Whether the folder holds the stage's student, trained to the end."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    training = read_object(path).get("training")
    step = training.get("step") if isinstance(training, dict) else None
    if type(step) is not int:
        raise ValueError(f"{path}: does not say at which step it was written; remove the folder")
    return step >= stage.steps
