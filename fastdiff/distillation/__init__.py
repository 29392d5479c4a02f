"""Progressive distillation: students that take half their teacher's steps, again and again."""

from .config import DistillConfig
from .distill import distill

__all__ = ["DistillConfig", "distill"]
