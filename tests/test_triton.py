"""The Triton kernels: in Triton's interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.ops import OPS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def test_in_the_interpreter():
    """tests/triton_interpreter.py, every test of it."""
    tests = Path(__file__).with_name("triton_interpreter.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_an_op_without_a_kernel_says_so_and_falls_back_where_nobody_asked(monkeypatch):
    x = torch.randn(2, 8, 3, 3)
    with fastdiff.backend("triton"), pytest.raises(RuntimeError, match="group_norm_silu has no"):
        fastdiff.ops.group_norm_silu(x, 4, None, None, 1e-5)
    monkeypatch.setattr("fastdiff.op._best", lambda device: "triton")
    assert OPS["group_norm_silu"].launcher("cuda") == OPS["group_norm_silu"]._copy_reference


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this process interprets")
def test_cpu_tensors_need_the_interpreter():
    with fastdiff.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        fastdiff.ops.cfg(torch.zeros(1, 4), torch.zeros(1, 4), 1.0)
