"""fastdiff: the fastest, clearest way to sample from, train and distil diffusion models."""

from .interrupts import held

with held():  # Ctrl-C within torch's own import would end in an abort
    import torch as torch  # first: its OpenMP runtime is the one our kernels share

from . import ops
from .checkpoint import load, save
from .distillation import DistillConfig, distill
from .edit import image_to_image, inpaint
from .engine import optimize
from .interpolate import interpolate
from .losses import DiffusionLoss
from .models import UNet, UNetConfig
from .op import backend
from .patch import patch, unpatch
from .sampler import Sampler
from .samplers import DDIMSampler, DDPMSampler, DPMSolverSampler, HeunSampler, LangevinSampler
from .schedule import NoiseSchedule
from .table import Table
from .train import TrainConfig, Trainer
from .version import __version__ as __version__

__all__ = [
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverSampler",
    "DiffusionLoss",
    "DistillConfig",
    "HeunSampler",
    "LangevinSampler",
    "NoiseSchedule",
    "Sampler",
    "Table",
    "TrainConfig",
    "Trainer",
    "UNet",
    "UNetConfig",
    "backend",
    "distill",
    "image_to_image",
    "inpaint",
    "interpolate",
    "load",
    "ops",
    "optimize",
    "patch",
    "save",
    "unpatch",
]
