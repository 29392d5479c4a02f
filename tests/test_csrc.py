"""The plain C++ tests of csrc/tests, under the address and undefined-behaviour sanitizers."""

import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
sys.path.insert(0, str(CSRC))
import ninja_build  # noqa: E402


@pytest.mark.parametrize(
    ("said", "host"), [("true", "true"), ("true -m64", "true"), ("env true -O1", "true")]
)
def test_the_compiler_is_the_one_that_is_asked_for(said, host, monkeypatch, capsys):
    monkeypatch.setenv("CXX", said)
    assert (ninja_build.compiler(), ninja_build._host_compiler()) == (said, host)
    monkeypatch.setenv("CXX", "nowhere -m64")
    assert ninja_build.compiler() in (None, "g++", "c++", "clang++")
    assert "CXX=nowhere -m64 is not found" in capsys.readouterr().err


@pytest.mark.skipif(ninja_build.compiler() is None, reason="no C++ compiler")
def test_kernels_in_plain_cpp(tmp_path):
    run = subprocess.run(
        [sys.executable, CSRC / "ninja_build.py", tmp_path], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("0 failures\n")
    assert "scalar: tested" in run.stdout and "emulated: tested" in run.stdout
    if sys.platform == "linux":  # AVX-512 is emulated where it is missing
        assert ("avx512: tested" in run.stdout) == ("avx2: tested" in run.stdout)
