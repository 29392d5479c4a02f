"""The GPUs that kernels are compiled for, and what their data sheets state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU.

    name, backend, arch, warp   its compiler's names, and the threads of a warp
    device        the product whose figures follow
    bandwidth     of its memory, bytes a second
    processors    SMs (NVIDIA) or CUs (AMD)
    clock         boost, Hz
    lanes         threads whose next instruction a processor can issue in one clock
    tensor        dense products and sums of 16-bit floats, operations a second
    threads, registers, shared   what the programs on one processor share: threads, 32-bit
                  registers, bytes
    """

    name: str
    device: str
    backend: str
    arch: int | str
    warp: int
    bandwidth: float
    processors: int
    clock: float
    lanes: int
    tensor: float
    threads: int
    registers: int
    shared: int

    @property
    def issue(self) -> float:
        """Instructions a second, each of one thread."""
        return self.processors * self.lanes * self.clock

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Threads on a processor at once, of programs with so many threads, registers, bytes."""
        granule = 8  # registers of a thread are given out in eights
        of_registers = threads * -(-registers // granule) * granule
        limits = [self.threads // threads, self.registers // of_registers]
        if shared:
            limits.append(self.shared // shared)
        return threads * min(*limits, 32)


TARGETS = (
    Target(
        name="sm_80",
        device="A100 SXM 80GB",
        backend="cuda",
        arch=80,
        warp=32,
        bandwidth=2.039e12,
        processors=108,
        clock=1.41e9,
        lanes=128,
        tensor=312e12,
        threads=2048,
        registers=1 << 16,
        shared=164 << 10,
    ),
    Target(
        name="sm_90",
        device="H100 SXM",
        backend="cuda",
        arch=90,
        warp=32,
        bandwidth=3.35e12,
        processors=132,
        clock=1.83e9,
        lanes=128,
        tensor=989e12,
        threads=2048,
        registers=1 << 16,
        shared=228 << 10,
    ),
    Target(
        name="sm_100",
        device="B200",
        backend="cuda",
        arch=100,
        warp=32,
        bandwidth=8.0e12,
        processors=148,
        clock=1.965e9,
        lanes=128,
        tensor=2250e12,
        threads=2048,
        registers=1 << 16,
        shared=228 << 10,
    ),
    Target(
        name="gfx942",
        device="MI300X",
        backend="hip",
        arch="gfx942",
        warp=64,
        bandwidth=5.3e12,
        processors=304,
        clock=2.1e9,
        lanes=64,
        tensor=1307e12,
        threads=2048,
        registers=1 << 17,
        shared=64 << 10,
    ),
)
