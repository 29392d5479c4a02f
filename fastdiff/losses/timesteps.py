"""Which timesteps a batch is trained at: functions of (seed, row, position), as the noise is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import errors
from ..spacing import count
from . import streams
from .device import at

_MASS = 1 << 30  # of all timesteps: times 32 random bits it fits in an int64


def random_words(
    batch: int, seed: int | Sequence[int], row: int, first_index: int, device: torch.device | str
) -> Tensor:
    """32 random bits a sample, int64 [B]."""
    shape = batch, 1
    words = streams.draw(streams.TIMESTEP, shape, seed, row, first_index, device, bits=True)
    return words.to(torch.int64).flatten()


def uniform_timesteps(
    T: int,
    batch: int,
    seed: int | Sequence[int] | None,
    row: int,
    first_index: int,
    device: torch.device | str,
) -> Tensor:
    """Uniform in 0 .. T - 1, int64 [B]; without a seed torch's generator draws them."""
    if seed is None:
        return torch.randint(T, (batch,), device=device)
    return random_words(batch, seed, row, first_index, device) * T >> 32


class UniformTimesteps:
    """Every timestep of 0 .. T - 1 equally often.

    Args:
        T: the schedule's length.
    """

    def __init__(self, T: int) -> None:
        self.T = count("T", T, 1, _MASS)

    def draw(
        self,
        batch: int,
        seed: int | Sequence[int],
        row: int = 0,
        first_index: int = 0,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """Timesteps int64 [B], and what each sample's loss is to be multiplied by, fp32 [B].

        Args:
            batch: how many samples.
            seed: an int, or one a sample; with `row`, say the training step, it decides.
            first_index: position of the first sample in the whole batch, of which this is a part.
        """
        t = uniform_timesteps(self.T, batch, seed, row, first_index, device)
        return t, torch.ones(batch, device=device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Nothing is learnt from losses here."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError if there is a state."""
        errors.is_a("state", state, Mapping)
        if state:
            raise ValueError(f"state: has {sorted(state)}, uniform timesteps have none")


class LossAwareTimesteps(UniformTimesteps):
    """Timesteps by importance: p_t ~ sqrt(E[L_t^2]) over the latest losses at t, weights 1/(T p_t).

    Nichol & Dhariwal 2021, section 3.3. p is mixed with `uniform` of the uniform distribution, and
    is uniform until every timestep has `history` losses. Everything lies on the device, and
    nothing is read back. Probabilities are whole numbers of 2^-30, so that sums have no rounding
    and t does not depend on the device; the weights are exactly those of what is drawn.

    Args:
        T: the schedule's length.
        history: losses that are kept for each timestep.
        uniform: the part of p that is uniform, in (0, 1].
    """

    def __init__(self, T: int, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__(count("T", T, 1, _MASS >> 14))
        if not 0 < errors.number("uniform", uniform) <= 1:
            raise ValueError(f"uniform={uniform}: must be in (0, 1]; at 0 a timestep could be lost")
        self.uniform = uniform
        # timestep T takes what is not to be kept
        self._losses = torch.zeros(T + 1, count("history", history, 1, 1 << 12))
        self._seen = torch.zeros(T + 1, dtype=torch.int64)

    def draw(
        self,
        batch: int,
        seed: int | Sequence[int],
        row: int = 0,
        first_index: int = 0,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        self._to(device)
        mass = self._masses()
        total = mass.cumsum(0)
        place = random_words(batch, seed, row, first_index, device) * total[-1] >> 32
        t = torch.searchsorted(total, place, right=True)
        return t, (total[-1] / (self.T * mass[t].double())).float()

    def _masses(self) -> Tensor:
        """Whole numbers in the ratios of p, int64 [T]."""
        size = self._losses[:-1].double().square().mean(1).sqrt()
        p = (1 - self.uniform) * size / size.sum().clamp(min=1e-300) + self.uniform / self.T
        learnt = (p * _MASS).round().to(torch.int64).clamp(min=1)
        ready = (self._seen[:-1] >= self._losses.shape[1]).all()
        return torch.where(ready, learnt, _MASS // self.T)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn what the losses were: in order, so that of several at one t the latest stay.

        Args:
            t: int64 [B]; in data parallel those of all ranks, in the order of the whole batch.
            losses: [B], as `DiffusionLoss.per_sample` gives them, not yet times draw's weights.
                What is not finite is left out.
        """
        errors.is_tensor("losses", losses)
        errors.has_dtype("losses", losses, (*errors.MODEL_DTYPES, torch.float64))
        if losses.dim() != 1:
            raise ValueError(f"losses: have shape {tuple(losses.shape)}, must be [B], one a sample")
        errors.per_sample("t", t, torch.int64, "losses", losses)
        errors.in_range("t", t, self.T)
        self._to(t.device)
        losses, history = losses.detach().float(), self._losses.shape[1]
        t, order = torch.sort(torch.where(losses.isfinite(), t, self.T), stable=True)
        place = torch.arange(len(t), device=t.device)
        before = place - torch.searchsorted(t, t)  # earlier ones of the batch at the same t
        after = torch.searchsorted(t, t, right=True) - 1 - place
        kept = torch.where(after < history, t, self.T)  # or two would go to one place
        self._losses[kept, (self._seen[t] + before) % history] = losses[order]
        self._seen.index_add_(0, t, torch.ones_like(t))

    def _to(self, device: torch.device | str) -> None:
        self._losses, self._seen = at(device, self._losses), at(device, self._seen)

    def state_dict(self) -> dict[str, Tensor]:
        """losses, fp32 [T, history], a ring for each timestep, and seen, int64 [T]: copies."""
        return {"losses": self._losses[:-1].clone(), "seen": self._seen[:-1].clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave. ValueError for other names or shapes."""
        errors.is_a("state", state, Mapping)
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"state: has {sorted(state)}, must have {sorted(own)}")
        for name, value in state.items():
            errors.is_tensor(f"state[{name!r}]", value)
            errors.has_dtype(f"state[{name!r}]", value, (own[name].dtype,))
            if value.shape != own[name].shape:
                raise ValueError(
                    f"state[{name!r}]: has shape {tuple(value.shape)}, must be "
                    f"{tuple(own[name].shape)}; it is of another schedule or history"
                )
        self._losses[:-1].copy_(state["losses"])
        self._seen[:-1].copy_(state["seen"])
