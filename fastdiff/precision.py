"""Where bfloat16 pays: on GPUs, and on CPUs that compute in it."""

from __future__ import annotations

import torch


def bfloat16_pays(device: torch.device | str) -> bool:
    """Whether the device is faster in bfloat16; CPUs before AVX-512 are ten times slower in it."""
    on_cpu = torch.device(device).type == "cpu"
    return not on_cpu or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device: torch.device | str, bf16: bool) -> torch.autocast:
    """Autocast to bfloat16, if it is asked for and pays; else float32, which is also closer."""
    enabled = bf16 and bfloat16_pays(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)
