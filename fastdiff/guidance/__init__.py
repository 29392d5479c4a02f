"""Guidance beyond one weight: by a classifier or CLIP, by models that are guided, by row."""

from ..checkpoint import load_encoder as load_classifier
from .apg import APG
from .cfg_plus_plus import cfg_plus_plus
from .classifier import ClassifierGuidance
from .clip import CLIPGuidance
from .guided import Guided
from .rescale import GuidanceRescale
from .threshold import DynamicThreshold

__all__ = [
    "APG",
    "CLIPGuidance",
    "ClassifierGuidance",
    "DynamicThreshold",
    "GuidanceRescale",
    "Guided",
    "cfg_plus_plus",
    "load_classifier",
]
