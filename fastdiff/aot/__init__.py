"""Every Triton kernel compiled ahead of time, without a GPU, and what that tells.

Each case of each op's record is compiled for each target exactly as its launch would be. Nothing
runs: times are what data sheets allow (bytes over bandwidth, instructions over issue rate).
`python -m fastdiff.aot` writes the account; `docs/gpu_static.md` is one.
"""

from .report import Prediction, Report, predictions, reports
from .targets import TARGETS, Target

__all__ = ["TARGETS", "Prediction", "Report", "Target", "predictions", "reports"]
