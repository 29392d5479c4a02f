"""Guidance beyond the table's own (w + 1) m_cond - w m_uncond."""

from ..checkpoint import load_encoder as load_classifier
from .classifier import ClassifierGuidance

__all__ = ["ClassifierGuidance", "load_classifier"]
