"""Run a trained U-Net fast on the CPU: `optimize`, and the engine it returns.

A network is captured as a graph (capture.py), simplified and fused into layers (simplify.py,
fuse.py; layers.py says what each means), given memory and bound to calls (program.py, arena.py),
each by the backend that measures fastest (backends.py, tune.py).
"""

from .engine import Engine
from .optimize import optimize

__all__ = ["Engine", "optimize"]
