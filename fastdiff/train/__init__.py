"""Training: the record that says how, the loop, its averages, metrics and processes."""

from .config import TrainConfig
from .curves import draw_curves
from .posthoc import posthoc
from .trainer import Trainer

__all__ = ["TrainConfig", "Trainer", "draw_curves", "posthoc"]
