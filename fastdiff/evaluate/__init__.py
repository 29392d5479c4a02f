"""How good images are: Fréchet distance, precision and recall, class accuracy, and copies.

Each figure stands beside what real images, blurred ones and noise get, in the same features: those
of a small classifier that ships, or Inception's where its weights are given.
"""

from .classifier import accuracy, describe, framed, load_classifier, save_classifier
from .frechet import frechet_distance
from .inception import inception_features
from .judge import Judge, Row, balanced, blurred, uniform_noise
from .manifold import precision_recall
from .neighbours import nearest

__all__ = [
    "Judge",
    "Row",
    "accuracy",
    "balanced",
    "blurred",
    "describe",
    "framed",
    "frechet_distance",
    "inception_features",
    "load_classifier",
    "nearest",
    "precision_recall",
    "save_classifier",
    "uniform_noise",
]
