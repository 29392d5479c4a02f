"""Training objectives, and what they are measured by: bits per dimension."""

from .bits import BitsPerDim, bits_per_dim
from .classification import ClassifierLoss
from .diffusion import HYBRID_LAMBDA, DiffusionLoss
from .distillation import DistillationLoss
from .score_matching import denoising_score_matching, sliced_score_matching
from .timesteps import LossAwareTimesteps, UniformTimesteps
from .weightings import MIN_SNR_GAMMA, WEIGHTINGS

__all__ = [
    "HYBRID_LAMBDA",
    "MIN_SNR_GAMMA",
    "WEIGHTINGS",
    "BitsPerDim",
    "ClassifierLoss",
    "DiffusionLoss",
    "DistillationLoss",
    "LossAwareTimesteps",
    "UniformTimesteps",
    "bits_per_dim",
    "denoising_score_matching",
    "sliced_score_matching",
]
