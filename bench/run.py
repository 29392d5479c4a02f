"""python bench/run.py --steps 50: fastdiff against diffusers and plain PyTorch, on this machine."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler reports to stderr below it
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # of the script's folder, its parent
    from bench.command import main

    sys.exit(main())
