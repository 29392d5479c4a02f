"""What is told of GPUs, and of why there is none. Only torch's answers are made up."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from pretended import triton_alone

from fastdiff import gpu
from fastdiff.commands import doctor
from fastdiff.op import BACKENDS

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, L2_cache_size=50 << 20,
    memory_clock_rate=2_619_000, memory_bus_width=5120,
)  # fmt: skip


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: H100)
    triton_alone(monkeypatch)


@pytest.fixture
def none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "TRACES", ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def told():
    return "\n".join(f"{finding.mark} {finding.text}" for finding in doctor._gpu())


def test_doctor_names_the_gpu_and_its_bandwidth(monkeypatch, h100):
    real = gpu.copy_bandwidth
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: real("cpu", 2**20))
    text = told()
    assert "ok GPU 0: NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB" in text
    assert "% of its memory's 3352" in text  # the data sheet: 3.35 TB/s
    assert "driver" in text and gpu.runtime() in text
    assert "ops on GPUs by" in text and "group_norm_silu" in text


def test_doctor_tells_a_gpu_that_torch_cannot_use(h100):
    if torch.backends.cuda.is_built():
        pytest.skip("this torch can use GPUs")
    assert "!!   torch cannot use it (Torch not compiled with CUDA enabled)" in told()


def test_doctor_tells_a_gpu_that_others_use(monkeypatch, h100):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "copy_bandwidth", full)
    assert "--   too little of its memory is free" in told() and "!!" not in told()


@pytest.mark.parametrize("backend", [b for b in doctor.GPU_BACKENDS if b in BACKENDS])
def test_doctor_tells_what_a_gpu_lacks(monkeypatch, h100, backend):
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(doctor, "missing", {backend: "it is not there"}.get)
    assert (
        f"-- no {doctor.GPU_BACKENDS[backend]} kernels: it is not there; GPUs do without" in told()
    )


def test_a_torch_for_the_cpu_on_a_machine_with_a_gpu(monkeypatch, none, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(gpu, "TRACES", (str(tmp_path / "nvidia0"),))
    text = told()
    assert "is for the CPU alone, though this machine has a GPU's driver" in text
    assert "nvidia0" in text and "everything runs on the CPU" in text


def test_an_old_driver_is_told_in_torchs_words(monkeypatch, none):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\nand more")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert gpu.why_none() == "The NVIDIA driver on your system is too old"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.why_none().endswith("too old (CUDA_VISIBLE_DEVICES='')")


def test_torchs_own_warning_is_not_shown_twice(monkeypatch, none):
    def warns():
        warnings.warn("CUDA initialization: ...", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.why_none() is not None


def test_copy_bandwidth_is_bytes_over_seconds(monkeypatch):
    seconds = iter([0.0, 5e-3, 0.0, 1e-3, 0.0, 9e-3, 0.0, 9e-3])
    monkeypatch.setattr(gpu, "_now", lambda device: next(seconds))
    assert gpu.copy_bandwidth("cpu", 1000) == pytest.approx(2 * 1000 * gpu.COPIES / 1e-3)


def test_the_driver_is_asked_of_nvidia_smi(monkeypatch, tmp_path):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 575.57.08\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if gpu.Path("/proc/driver/nvidia/version").exists():
        pytest.skip("the kernel module tells first")
    assert gpu.driver() == "575.57.08"
