"""Guidance beyond one weight: models that are guided, and weights by row."""

from .apg import APG
from .cfg_plus_plus import cfg_plus_plus
from .guided import Guided
from .rescale import GuidanceRescale
from .threshold import DynamicThreshold

__all__ = ["APG", "DynamicThreshold", "GuidanceRescale", "Guided", "cfg_plus_plus"]
