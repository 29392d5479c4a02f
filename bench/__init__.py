"""The benchmark: `python bench/run.py`."""

import os

os.environ.setdefault("FASTDIFF_CACHE", "off")  # what is fastest is measured in every run
