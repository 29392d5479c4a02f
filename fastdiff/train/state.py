"""The state of a run as named tensors: all that a resumed run needs to be the uninterrupted one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import fit_state
from .distributed import cut, joined

if TYPE_CHECKING:
    from .trainer import Trainer


def collect(run: Trainer) -> dict[str, Tensor]:
    """Weights, averages, the optimizer's moments, and the sums of the window being counted.

    With FSDP the parts of all processes are joined, so all must call it.
    """
    tensors = {f"timesteps.{k}": v for k, v in run.timesteps.state_dict().items()}
    tensors |= {f"window.{k}": v for k, v in run.metrics.window.items()}
    for place, (name, parameter) in enumerate(run.model.named_parameters()):
        tensors[f"model.{name}"] = joined(run.weights[name], parameter)
        for average, values in run.averages.values.items():
            tensors[f"{average}.{name}"] = joined(values[place], parameter)
        for key, value in run.optimizer.state[run.weights[name]].items():
            whole = joined(value, parameter) if value.ndim else value
            tensors[f"optimizer.{name}.{key}"] = whole
    return tensors


def restore(run: Trainer, tensors: dict[str, Tensor]) -> None:
    """Put back what `collect` gave, on any number of processes.

    Raises:
        ValueError: it is the state of another model, or of other averages or timesteps.
    """
    parts = {name: _part(tensors, f"{name}.") for name in ("model", *run.averages.values)}
    for name, part in parts.items():
        if not part:
            raise ValueError(
                f"{run.out}: the run's state has no {name}; resume with the ema and posthoc_every "
                "that it was begun with, or begin another run"
            )
        fit_state(run.out, run.model, part)
    run.timesteps.load_state_dict(_part(tensors, "timesteps."))
    for key, value in run.metrics.window.items():
        value.copy_(tensors[f"window.{key}"])
    for place, (name, parameter) in enumerate(run.model.named_parameters()):
        weight = run.weights[name]
        # copied into memory laid out as the weights are: the fused update runs through it in order
        weight.detach().copy_(cut(parts["model"][name], parameter))
        for average, values in run.averages.values.items():
            values[place].copy_(cut(parts[average][name], parameter))
        run.optimizer.state[weight] = {
            k: torch.empty_like(weight).copy_(cut(v, parameter)) if v.ndim else v.to(run.device)
            for k, v in _part(tensors, f"optimizer.{name}.").items()
        }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
