"""Timesteps by importance, against the algorithm as it is written: one loss after the other."""

import pytest
import torch
from test_no_sync import NoWaiting
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import DiffusionLoss, NoiseSchedule, ops
from fastdiff.losses import (
    LossAwareTimesteps,
    UniformTimesteps,
    denoising_score_matching,
    sliced_score_matching,
)

KINDS = [UniformTimesteps, LossAwareTimesteps]


class InOrder:
    """Nichol & Dhariwal 2021, section 3.3: lists of the latest losses, oldest first."""

    def __init__(self, T, history=10, uniform=0.001):
        self.lists, self.history, self.uniform = [[] for _ in range(T)], history, uniform

    def update(self, t, losses):
        for k, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.lists[k] = [*self.lists[k], loss][-self.history :]

    def p(self):
        T = len(self.lists)
        if any(len(kept) < self.history for kept in self.lists):
            return torch.full((T,), 1 / T, dtype=torch.float64)
        size = torch.tensor(self.lists, dtype=torch.float64).square().mean(1).sqrt()
        return (1 - self.uniform) * size / size.sum() + self.uniform / T


def probabilities(timesteps):
    """p_t by what draw weighs: 1 / (T p_t), asked at every t."""
    t, weight = timesteps.draw(20_000, seed=1)
    p = torch.full((timesteps.T,), torch.nan, dtype=torch.float64)
    p[t] = 1 / (timesteps.T * weight.double())
    return p


def batches(T, sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        # a few timesteps often, so that one batch holds more of one t than are kept
        t = torch.randint(T, (size,), generator=generator)
        t[: size // 2] = t[: size // 2] % 3
        yield t, torch.rand(size, generator=generator) * (1 + t)


@pytest.mark.parametrize("history", [1, 4, 10])
def test_history_is_that_of_losses_in_order(history):
    ours, theirs = LossAwareTimesteps(7, history), InOrder(7, history)
    for t, losses in batches(7, [1, 0, 64, 5, 130, 64, 33]):
        ours.update(t, losses)
        theirs.update(t, losses)
        kept, seen = ours.state_dict().values()
        for k in range(7):
            mine = kept[k, : min(int(seen[k]), history)].tolist()
            assert sorted(mine) == pytest.approx(sorted(theirs.lists[k]), abs=0), k
        torch.testing.assert_close(probabilities(ours), theirs.p(), rtol=1e-6, atol=0)
    assert probabilities(ours).std() > 0.01  # it has become another than uniform


def test_uniform_until_every_timestep_has_its_history():
    ours, plain = LossAwareTimesteps(5, 3), UniformTimesteps(5)
    every = torch.arange(5).repeat(3)
    ours.update(every[:-1], 10.0 ** torch.arange(14))
    assert torch.equal(ours.draw(500, 3)[0], plain.draw(500, 3)[0])
    assert (ours.draw(500, 3)[1] == 1).all()
    ours.update(every[-1:], torch.ones(1))
    assert not torch.equal(ours.draw(500, 3)[0], plain.draw(500, 3)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_and_last_word_of_every_timestep(kind, monkeypatch):
    first = torch.arange(4) << 30
    for words in (first, first + (1 << 30) - 1):
        monkeypatch.setattr("fastdiff.losses.timesteps.random_words", lambda *_, w=words: w)
        assert kind(4).draw(4, 0)[0].tolist() == [0, 1, 2, 3]


class OnePlaceEach(TorchDispatchMode):
    """Raises where several values are written to one place that counts: who wins is the GPU's."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_put_.default:
            row, slot = args[1]
            places = (row * 1000 + slot)[row < len(args[0]) - 1]
            assert len(places.unique()) == len(places)
            self.seen += 1
        return func(*args, **(kwargs or {}))


def test_no_two_losses_of_a_batch_go_to_one_place():
    timesteps = LossAwareTimesteps(7, 3)
    with OnePlaceEach() as mode:
        for t, losses in batches(7, [64, 130]):
            timesteps.update(t, losses)
    assert mode.seen == 2


def test_draws_have_their_probabilities_and_weights_undo_them():
    timesteps, T = LossAwareTimesteps(20), 20
    timesteps.update(torch.arange(T).repeat(10), torch.arange(T).repeat(10).float() + 0.1)
    t, weight = timesteps.draw(100_000, seed=5)
    expected = 100_000 / (T * weight.double())
    counts = t.bincount(minlength=T).double()
    at = torch.zeros(T, dtype=torch.float64).index_put((t,), expected)
    assert ((counts - at) ** 2 / at).sum() < 43.8  # chi-squared, 19 degrees, p = 0.001
    values = (torch.arange(T) - 3.0) ** 2
    assert (weight * values[t]).mean() == pytest.approx(float(values.mean()), rel=0.02)


def test_uniform_draws_are_uniform():
    counts = UniformTimesteps(20).draw(20_000, 0)[0].bincount(minlength=20).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_drawn_in_parts(kind):
    timesteps = kind(1000)
    whole, _ = timesteps.draw(64, seed=7, row=3)
    parts = [timesteps.draw(32, seed=7, row=3, first_index=k)[0] for k in (0, 32)]
    assert torch.equal(whole, torch.cat(parts))
    for other in ({"seed": 8, "row": 3}, {"seed": 7, "row": 4}):
        assert not torch.equal(whole, timesteps.draw(64, **other)[0])
    alone = timesteps.draw(2, seed=[7, 9], row=3)[0]
    assert alone[0] == whole[0] and alone[1] == timesteps.draw(1, seed=9, row=3)[0]


def test_timesteps_and_noise_share_no_words():
    """Else t would tell part of the noise that it comes with."""
    words = ops.randbits((64, 8), 7, row=3).to(torch.int64).flatten()
    t, _ = UniformTimesteps(1 << 30).draw(64, seed=7, row=3)
    assert not torch.isin(t, words >> 2).any()
    shifted = ops.randbits((64, 1), 7, row=3, first_index=1 << 62).to(torch.int64).flatten()
    assert torch.equal(t, shifted >> 2)


def test_what_is_not_finite_is_left_out():
    clean, dirty = LossAwareTimesteps(3, 2), LossAwareTimesteps(3, 2)
    t = torch.tensor([0, 1, 1, 2, 0, 2, 1])
    losses = torch.tensor([1.0, torch.nan, 2.0, 3.0, 4.0, torch.inf, 5.0])
    dirty.update(t, losses)
    clean.update(t[losses.isfinite()], losses[losses.isfinite()])
    for a, b in zip(dirty.state_dict().values(), clean.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_losses_that_are_all_zero_leave_it_uniform():
    timesteps = LossAwareTimesteps(4, 2)
    timesteps.update(torch.arange(4).repeat(2), torch.zeros(8))
    assert (timesteps.draw(100, 0)[1] == 1).all()


def test_a_state_goes_on_where_it_was():
    first, second = LossAwareTimesteps(7), LossAwareTimesteps(7)
    *before, last = batches(7, [64, 130, 64, 50])
    for t, losses in before:
        first.update(t, losses)
    second.load_state_dict(first.state_dict())
    for timesteps in (first, second):
        timesteps.update(*last)
    assert all(map(torch.equal, *(d.draw(300, 1, 2) for d in (first, second))))
    held = first.state_dict()
    first.update(*last)
    assert not torch.equal(held["seen"], first.state_dict()["seen"])  # a copy
    UniformTimesteps(7).load_state_dict(UniformTimesteps(7).state_dict())


def test_score_matching_reads_nothing_back():
    x0, schedule = torch.zeros(4, 3, 8, 8, device="meta"), NoiseSchedule.geometric(0.1, 7.0, 5)
    with NoWaiting():
        for loss in (denoising_score_matching, sliced_score_matching):
            assert loss(lambda x, t: torch.sin(x), x0, schedule, seed=1).device.type == "meta"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_read_back(device):
    if device == "cpu":
        timesteps, T = LossAwareTimesteps(7), 7
        mode = NoWaiting()
        mode.rows = True
        with mode:
            t, _ = timesteps.draw(20, 0)
        assert t.max() < T
        return  # update checks t there, by reading it
    with NoWaiting():
        timesteps, loss = LossAwareTimesteps(50), DiffusionLoss(NoiseSchedule.cosine(50), "v")
        for row in range(2):
            t, weight = timesteps.draw(20, 0, row, device="meta")
            x0 = torch.zeros(20, 3, 8, 8, device="meta")
            losses = loss.per_sample(lambda x, t: x, x0, t, seed=0, row=row)
            timesteps.update(t, losses)
            assert (losses * weight).device.type == "meta"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="T=0: must be between 1"):
        UniformTimesteps(0)
    with pytest.raises(ValueError, match="history=0"):
        LossAwareTimesteps(5, 0)
    with pytest.raises(ValueError, match=r"uniform=0: must be in \(0, 1\]"):
        LossAwareTimesteps(5, uniform=0)
    timesteps = LossAwareTimesteps(5)
    with pytest.raises(ValueError, match="t: spans 0 to 5"):
        timesteps.update(torch.tensor([0, 5]), torch.ones(2))
    with pytest.raises(ValueError, match=r"t: has shape \(3,\)"):
        timesteps.update(torch.zeros(3, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match=r"state\['losses'\]: has shape \(6, 10\)"):
        timesteps.load_state_dict(LossAwareTimesteps(6).state_dict())
    with pytest.raises(ValueError, match="state: has"):
        timesteps.load_state_dict({})
    with pytest.raises(ValueError, match="uniform timesteps have none"):
        UniformTimesteps(5).load_state_dict(timesteps.state_dict())
    with pytest.raises(ValueError, match="first_index"):
        timesteps.draw(2, 0, first_index=1 << 62)
