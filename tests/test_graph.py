"""Rows as graphs: equal to the plain loop bit for bit, captured once, and again only when needed.

On the CPU a tape stands in for the GPU's stream (`tape.py`); where there is a GPU, it is used too.
"""

import gc
import warnings
import weakref

import networks
import pytest
import torch
from tape import NOT_PERMITTED, TapeLane

import fastdiff
from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    HeunSampler,
    LangevinSampler,
    NoiseSchedule,
    graph,
    tables,
)
from fastdiff.sampler import Sampler

schedule = NoiseSchedule.cosine(1000)
SHAPE = (2, 3, 5, 6)


class Net(torch.nn.Module):
    """Different at each timestep and condition; counts how often its Python runs."""

    def __init__(self, channels=3):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, channels, 3, padding=1)
        self.register_buffer("scale", torch.tensor(0.8))
        self.calls, self.reads_back = 0, False

    def forward(self, x, t, cond=None):
        self.calls += 1
        if self.reads_back and t.sum().item() < 0:
            return x
        t = t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000
        out = torch.sin(self.mix(x) + self.scale * t)
        return out if cond is None else out * cond.reshape(-1, 1, 1, 1).to(x.dtype)


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(90, 1)

    def forward(self, x, t, *cond):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.layer(x.flatten(1)).tanh().sum(), x)[0]


@pytest.fixture(params=["cpu", "cuda"])
def lane(request, monkeypatch):
    """The device's lane, counting its captures; models and tensors go to `lane.device`."""
    if request.param == "cpu":
        counted = type("Counted", (TapeLane,), {})
    elif not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    else:

        class counted(graph.Lane):
            captures = 0

            def capture(self, work):
                replay = super().capture(work)
                type(self).captures += 1
                return replay

    counted.on = torch.device(request.param)
    monkeypatch.setitem(graph.LANES, request.param, counted)
    return counted


def make(lane, channels=3, dtype=torch.float32):
    torch.manual_seed(0)
    return Net(channels).to(lane.on, dtype)


def both_ways(sampler, model, shape=SHAPE, **how):
    """The samples with graphs, and without."""
    plain = sampler.sample(model, shape, graph=False, **how)
    return sampler.sample(model, shape, graph=True, **how), plain


def agree(sampler, model, **how):
    ours, plain = both_ways(sampler, model, **how)
    return torch.equal(ours, plain) and bool(plain.isfinite().all())


RUNS = {
    "ddim": lambda: DDIMSampler(schedule, 6, prediction="v", clip=1.0),
    "ddim-noisy": lambda: DDIMSampler(schedule, 6, eta=1.0, prediction="v"),
    "ddpm": lambda: DDPMSampler(schedule, 6, prediction="v"),
    "learned": lambda: DDPMSampler(schedule, 6, "learned_range", prediction="v"),
    "dpmpp": lambda: DPMSolverSampler(schedule, 6, eta=1.0, prediction="v"),
    "heun": lambda: HeunSampler(schedule, 3, spacing="leading", prediction="v", S_churn=2.0),
    "langevin": lambda: LangevinSampler(NoiseSchedule.geometric(0.1, 2.0, 2), inner=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RUNS)
def test_rows_are_those_of_the_plain_loop(name, dtype, lane):
    sampler, model = RUNS[name](), make(lane, 6 if name == "learned" else 3, dtype)
    assert agree(sampler, model, seed=1)
    first = model.calls
    assert agree(sampler, model, seed=2) and lane.captures == 1
    rows = len(sampler.table)
    assert model.calls == first + rows  # the plain loop's; the graph runs no Python of the model


def test_other_numbers_replay_the_same_graph(lane):
    model = make(lane)
    cond = torch.tensor([1.0, 0.5], device=lane.on)
    noisy = {
        "eta": DDIMSampler(schedule, 6, eta=0.3, prediction="v"),
        "other eta": DDIMSampler(schedule, 6, eta=0.9, prediction="v"),
        "steps": DDIMSampler(schedule, 11, eta=0.9, prediction="v"),
        "fewer": DDIMSampler(schedule, 2, eta=0.9, prediction="v"),
        "spacing": DDIMSampler(schedule, 7, eta=0.5, spacing="trailing", prediction="v"),
        "another solver": DDPMSampler(schedule, 70, prediction="v"),
    }
    for sampler in noisy.values():
        assert agree(sampler, model, seed=3, cond=cond, uncond=0 * cond, guidance=1.0)
    sampler = noisy["eta"]
    x_T = torch.randn(SHAPE, device=lane.on)
    for how in ({"guidance": 4.0}, {"x_T": x_T}, {"seed": [7, 9]}, {"cond": 3 * cond}):
        given = {"cond": cond, "uncond": 0 * cond, "guidance": 1.0} | how
        assert agree(sampler, model, **given)
    assert lane.captures == 1


def test_a_graph_reads_the_weights_of_now(lane):
    sampler, model = RUNS["ddim"](), make(lane)
    assert agree(sampler, model)
    with torch.no_grad():
        model.mix.weight.mul_(1.5)
        model.scale.fill_(0.3)
    assert agree(sampler, model) and lane.captures == 1


def _moved(model):
    model.mix.weight.data = model.mix.weight.data * 2


def _set_to_training(model):
    model.mix.train(not model.mix.training)


def _another_layer(model):
    model.mix = torch.nn.Conv2d(3, 6, 3, padding=1).to(model.scale.device)


def _hooked(model):
    model.mix.register_forward_hook(lambda module, args, out: 2 * out)


def _cast(model):
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [_moved, _set_to_training, _another_layer, _hooked, _cast])
def test_another_model_is_captured_anew(change, lane):
    sampler, model = RUNS["ddim"](), make(lane)
    assert agree(sampler, model) and lane.captures == 1
    change(model)
    assert agree(sampler, model) and lane.captures == 2


def test_another_kind_of_run_is_captured_anew(lane):
    model, cond = make(lane, channels=6), torch.ones(2, device=lane.on)
    sampler, learned = RUNS["ddpm"](), RUNS["learned"]()
    first, second = (lambda x, t: x, lambda x, t: -x)
    guiding = DDPMSampler(schedule, 6, prediction="v", classifier_scale=0.5)
    runs = [
        (sampler, {}), (learned, {}), (RUNS["ddim"](), {}), (RUNS["dpmpp"](), {}),
        (sampler, {"shape": (3, *SHAPE[1:])}),
        (sampler, {"cond": cond}), (sampler, {"cond": cond.to(torch.int64)}),
        (sampler, {"callback": lambda *_: None}),
        (guiding, {"gradient": first}), (guiding, {"gradient": second}),
    ]  # fmt: skip
    for n, (sampler, how) in enumerate(runs, 1):
        assert agree(sampler, model, **how) and lane.captures == n


def test_other_surroundings_are_captured_anew(lane):
    sampler, model = RUNS["ddim"](), make(lane)
    with torch.inference_mode():
        assert agree(sampler, model)
    assert agree(sampler, model) and lane.captures == 2
    with fastdiff.backend("reference"):
        assert agree(sampler, model) and lane.captures == 3


def test_under_autocast_weights_are_cast_in_the_graph(lane):
    sampler, model = RUNS["ddim"](), make(lane)
    short = DDIMSampler(schedule, 2, prediction="v")
    for factor in (1.0, 2.0):
        with torch.no_grad():
            model.mix.weight.mul_(factor)
        with torch.autocast(lane.on.type, torch.bfloat16):
            assert agree(short, model)  # ends with the capture, which has computed nothing
            assert agree(sampler, model)  # so its casts are of no use to the plain loop here
    assert lane.captures == 1
    assert agree(sampler, model) and lane.captures == 2


def test_a_guidance_interval_is_two_graphs(lane):
    sampler, model = DDIMSampler(schedule, 12, prediction="v"), make(lane)
    cond = torch.tensor([1.0, 0.5], device=lane.on)
    how = {"cond": cond, "uncond": 0 * cond, "guidance": 2.0}
    assert agree(sampler, model, guidance_interval=(0.3, 3.0), **how)
    calls = model.calls
    assert agree(sampler, model, guidance_interval=(0.1, 2.0), **how)
    assert lane.captures == 2 and model.calls == calls + 12


def test_a_classifier_is_in_the_graph(lane):
    sampler = DDPMSampler(schedule, 6, prediction="v", classifier_scale=0.5)
    model, classifier = make(lane), Classifier().to(lane.on)
    assert agree(sampler, model, gradient=classifier)
    with torch.no_grad():
        classifier.layer.weight.mul_(2)
    assert agree(sampler, model, gradient=classifier) and lane.captures == 1
    assert agree(sampler, model, gradient=Classifier().to(lane.on)) and lane.captures == 2


@pytest.mark.parametrize("name", ["adm", "UNet2DConditionModel"])
def test_guided_networks_are_captured(name, lane, monkeypatch):
    model, (x, _, cond) = networks.network(name).to(lane.on), networks.inputs(name)
    if name == "adm":  # on the CPU it checks its labels, by reading them
        monkeypatch.setattr(model, "check", lambda *_: None)
    cond = cond.to(lane.on)
    sampler = DDIMSampler(schedule, 3, prediction="v")
    for seed in (1, 2):
        how = {"cond": cond, "uncond": torch.zeros_like(cond), "guidance": 1.0}
        assert agree(sampler, model, shape=x.shape, seed=seed, **how)
    assert lane.captures == 1


def test_inversion_replays_too(lane):
    sampler, model = RUNS["ddim"](), make(lane)
    x0 = torch.rand(SHAPE, device=lane.on)
    plain = sampler.invert(model, x0, graph=False)
    assert torch.equal(sampler.invert(model, x0, graph=True), plain) and lane.captures == 1


def test_callbacks_see_every_row_and_may_keep_x0(lane):
    sampler, model = RUNS["dpmpp"](), make(lane)
    seen = {True: [], False: []}
    for _ in range(2):
        for wanted, rows in seen.items():

            def keep(row, x, x0, rows=rows):
                rows.append((row, x.clone(), x0, x0.clone()))

            sampler.sample(model, SHAPE, callback=keep, graph=wanted)
    assert [row for row, *_ in seen[True]] == [*range(6), *range(6)]
    for (_, *ours), (_, *plain) in zip(seen[True], seen[False], strict=True):
        assert all(map(torch.equal, ours, plain)) and torch.equal(*ours[1:])


def test_the_bar_counts_the_rows(lane, capsys):
    sampler, model = RUNS["ddim"](), make(lane)
    plain = sampler.sample(model, SHAPE, graph=False)
    for _ in range(2):
        assert torch.equal(sampler.sample(model, SHAPE, progress=True, graph=True), plain)
        assert "6/6" in capsys.readouterr().err


def test_results_belong_to_the_caller(lane):
    sampler, model = RUNS["ddim"](), make(lane)
    x_T, cond = torch.randn(SHAPE, device=lane.on), torch.ones(2, device=lane.on)
    given = x_T.clone(), cond.clone()
    first = sampler.sample(model, SHAPE, x_T=x_T, cond=cond, graph=True)
    kept = first.clone()
    sampler.sample(model, SHAPE, seed=5, cond=3 * cond, graph=True)
    assert torch.equal(first, kept)
    assert torch.equal(x_T, given[0]) and torch.equal(cond, given[1])


def test_models_do_not_mix(lane):
    sampler, models = RUNS["ddpm"](), [make(lane), make(lane)]
    with torch.no_grad():
        models[1].mix.weight.neg_()
    for model in (*models, *models):
        assert agree(sampler, model)
    assert lane.captures == 2


def test_a_run_within_a_run_of_the_same_model(lane):
    sampler, model = RUNS["ddpm"](), make(lane)
    inner = []

    def nested(row, x, x0):
        inner.append(sampler.sample(model, SHAPE, seed=4, graph=True))

    plain = sampler.sample(model, SHAPE, graph=False)
    for _ in range(2):
        assert torch.equal(sampler.sample(model, SHAPE, callback=nested, graph=True), plain)
    expected = sampler.sample(model, SHAPE, seed=4, graph=False)
    assert all(torch.equal(x, expected) for x in inner)


def test_an_error_in_a_callback_or_the_model_leaves_all_usable(lane):
    sampler, model = RUNS["dpmpp"](), make(lane)

    def stop(row, x, x0):
        if row == at:
            raise KeyError("mine")

    for at in (0, 1, 2, 3, 4):  # noqa: B007 - in the plain row, the watched one, and replays
        with pytest.raises(KeyError, match="mine"):
            sampler.sample(model, SHAPE, callback=stop, graph=True)
    at = None
    assert agree(sampler, model, callback=stop) and lane.captures == 1
    with pytest.raises(ValueError, match="model: its output has shape"):
        sampler.sample(Wrong().to(lane.on), SHAPE, graph=True)
    assert agree(sampler, model, callback=stop) and lane.captures == 1


class Wrong(Net):
    def forward(self, x, t):
        return super().forward(x, t)[:1]


def test_a_model_that_reads_back_runs_without_and_says_why(lane):
    sampler, model = RUNS["dpmpp"](), make(lane)
    model.reads_back = True
    plain = sampler.sample(model, SHAPE, graph=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(sampler.sample(model, SHAPE), plain)
    (warning,) = caught
    assert not graph._kept[model].kinds
    assert "waits for the GPU" in str(warning.message) and warning.filename == __file__
    assert lane.captures == 0 and model.calls == 4 * 6
    with pytest.raises(RuntimeError, match="graph=True: the model cannot be captured"):
        sampler.sample(model, SHAPE, graph=True)
    model.reads_back = False
    assert agree(sampler, model) and lane.captures == 1
    assert torch.equal(sampler.sample(model, SHAPE, graph=False), sampler.sample(model, SHAPE))


def test_a_capture_that_fails_leaves_the_state_as_it_was(lane, monkeypatch):
    """What the rehearsal does not notice fails while capturing."""

    def unnoticing(self, work):
        work()

    monkeypatch.setattr(lane, "rehearse", unnoticing)
    sampler, model, sound = RUNS["dpmpp"](), make(lane), make(lane)
    model.reads_back = True
    plain = sampler.sample(model, SHAPE, graph=False)
    with pytest.warns(UserWarning, match=NOT_PERMITTED):
        assert torch.equal(sampler.sample(model, SHAPE), plain)
    assert agree(sampler, sound) and lane.captures == 1
    assert torch.equal(sampler.sample(model, SHAPE), plain)


def test_only_modules_are_captured_unasked(lane):
    sampler, model = RUNS["ddim"](), make(lane)

    def called(x, t):
        return model(x, t)

    x_T = torch.randn(SHAPE, device=lane.on)
    plain = sampler.sample(called, SHAPE, x_T=x_T)
    assert lane.captures == 0
    assert torch.equal(sampler.sample(called, SHAPE, x_T=x_T, graph=True), plain)
    sampler.sample(model, SHAPE)
    assert lane.captures == 2


def test_graphs_are_few_and_go_with_their_model(lane):
    sampler, model = RUNS["ddim"](), make(lane)
    for batch in (*range(1, graph.KEPT + 1), 1, graph.KEPT + 1):
        sampler.sample(model, (batch, *SHAPE[1:]), graph=True)
    assert len(graph._kept[model].kinds) == graph.KEPT
    assert lane.captures == graph.KEPT + 1
    sampler.sample(model, (1, *SHAPE[1:]), graph=True)  # used later than the others: kept
    assert lane.captures == graph.KEPT + 1
    buffers = weakref.ref(next(iter(graph._kept[model].kinds.values())))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and buffers() is None


def test_forget_captures_anew(lane):
    sampler, model = RUNS["ddim"](), make(lane)
    assert agree(sampler, model)
    graph.forget(model)
    assert agree(sampler, model) and lane.captures == 2


def test_a_table_of_one_row_and_a_long_one(lane):
    model = make(lane)
    one = Sampler(tables.ddim(schedule, [999], prediction="v"))
    for _ in range(3):
        assert agree(one, model)
    long = DDIMSampler(NoiseSchedule.cosine(1100), 1100, prediction="v")
    assert agree(long, model, shape=(1, 3, 2, 2))


def test_a_condition_that_is_no_tensor_is_not_captured(lane):
    class Prompted(Net):
        def forward(self, x, t, cond):
            return super().forward(x, t) * len(cond[0])

    sampler, model = RUNS["ddim"](), Prompted().to(lane.on)
    plain = sampler.sample(model, SHAPE, cond=["one", "two"], graph=False)
    assert torch.equal(sampler.sample(model, SHAPE, cond=["one", "two"]), plain)
    with pytest.raises(RuntimeError, match="cond is a list"):
        sampler.sample(model, SHAPE, cond=["one", "two"], graph=True)


def test_without_a_gpu_there_is_nothing_to_capture():
    with pytest.raises(RuntimeError, match="graph=True: CUDA graphs need a GPU"):
        RUNS["ddim"]().sample(Net(), SHAPE, graph=True)
