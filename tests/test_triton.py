"""The Triton kernels: in Triton's interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from dataclasses import replace
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
    weight = fastdiff.ops.pack_linear(torch.randn(32, 16))
    with fastdiff.backend("triton"), pytest.raises(RuntimeError, match="linear has no Triton"):
        fastdiff.ops.linear(torch.randn(2, 16), weight)
    monkeypatch.setattr("fastdiff.op._usable", lambda name: name == "triton")
    assert OPS["linear"].backend("cuda") == "reference"
    assert OPS["step"].backend("cuda") == "triton"


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this process interprets")
def test_cpu_tensors_need_the_interpreter():
    with fastdiff.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        fastdiff.ops.cfg(torch.zeros(1, 4), torch.zeros(1, 4), 1.0)


def test_a_measured_choice_is_not_taken_for_other_blocks(monkeypatch):
    """Two group norms of one shape of x, with groups of 4 and of 16 channels."""
    from fastdiff.kernels import group_norm_silu, tune

    monkeypatch.setattr(tune, "_fastest", lambda launch: launch.configs[-1])
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    for groups in (8, 2):
        x = torch.zeros(1, 32, 256)
        (launch,) = group_norm_silu.plan(x, groups, *[None] * 2, 1e-5, *[None] * 2, True, x)
        launch = replace(launch, device=torch.device("cuda"), configs=launch.configs * 2)
        assert tune.choice(launch) in launch.configs
