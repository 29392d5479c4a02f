"""The trainer: it learns, resumes bit for bit, and stops well."""

import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from test_no_sync import NoWaiting

from fastdiff import cli
from fastdiff.checkpoint import load
from fastdiff.data import ImageSet, fashion_mnist
from fastdiff.models import UNet, UNetConfig
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import TrainConfig, Trainer
from fastdiff.train.state import collect

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
RECIPE = Path(__file__).parents[1] / "recipes" / "fashion-mnist.json"
TINY = UNetConfig(
    image_size=32,
    in_channels=1,
    channels=8,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    dropout=0.1,
    num_classes=10,
    norm_groups=4,
)
CONFIG = TrainConfig(steps=8, batch_size=4, lr=1e-3, warmup=2, decay="cosine", save_every=3, seed=5)


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(out, config=CONFIG, model=TINY):
    torch.manual_seed(0)
    return Trainer(UNet(model), NoiseSchedule.cosine(100), fashion_mnist(SAMPLE), config, out)


def stop_after(run, step, number=signal.SIGINT):
    """Have the run interrupted, as by Ctrl-C, while it makes its `step`-th step."""
    loss, sent = run.loss.with_sums, []

    def interrupting(*args, **kwargs):
        if run.step == step - 1 and not sent:
            sent.append(os.kill(os.getpid(), number))
        return loss(*args, **kwargs)

    run.loss.with_sums = interrupting


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bf16": True, "channels_last": False},
        {"accumulate": 2, "ema": (0.9, 0.5), "posthoc_every": 4, "timesteps": "loss_aware"},
    ],
    ids=["fp32", "bf16-channels-last", "all"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, change):
    config = dataclasses.replace(CONFIG, **change)
    whole = trainer(tmp_path / "whole", config)
    whole.fit(progress=False)

    first = trainer(tmp_path / "parts", config)
    stop_after(first, 5)
    first.fit(progress=False)
    assert first.step == 5
    torch.manual_seed(99)  # what the new process draws elsewhere must not matter
    second = trainer(tmp_path / "parts", config)
    second.fit(resume=True, progress=False)

    assert second.step == whole.step == 8
    expected, resumed = collect(whole), collect(second)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)
    for path in ["model.safetensors", *(p.name for p in whole.out.glob("ema-*.safetensors"))]:
        assert (whole.out / path).read_bytes()[:64] and torch.equal(
            *(load(run.out / path).out[2].weight for run in (whole, second))
        )


def test_learns_to_predict_a_single_image(tmp_path):
    data = fashion_mnist(SAMPLE)
    data = dataclasses.replace(data, images=data.images[:1], labels=data.labels[:1])
    config = TrainConfig(steps=80, batch_size=8, lr=3e-3, warmup=10, ema=0.9, save_every=0)
    torch.manual_seed(0)
    run = Trainer(UNet(TINY), NoiseSchedule.cosine(100), data, config, tmp_path)
    run.fit(progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").open()]
    assert len(losses) == 8
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_a_cut_step_is_the_whole_one(tmp_path):
    model = dataclasses.replace(TINY, dropout=0.0)
    config = dataclasses.replace(CONFIG, batch_size=8, timesteps="loss_aware")
    whole = trainer(tmp_path, config, model)
    cut = trainer(tmp_path, dataclasses.replace(config, accumulate=4), model)
    for run in (whole, cut):
        for _ in range(3):
            loss = run._train_step()
    assert loss.isfinite() and not whole.watch.bad and not cut.watch.bad
    # the first moments are linear in the gradients; where those are 0 but for rounding, the
    # weights' updates are not
    for name, expected in collect(whole).items():
        if name.endswith("exp_avg") or name.startswith("window"):
            torch.testing.assert_close(collect(cut)[name], expected, rtol=1e-4, atol=1e-6)


def test_recomputed_activations_give_the_same_step(tmp_path):
    plain = trainer(tmp_path)
    again = trainer(tmp_path, dataclasses.replace(CONFIG, recompute=True))
    kept = []
    for run in (plain, again):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            run._train_step()
        kept.append(None)
    split = kept.index(None)
    assert len(kept) - split < split  # or nothing was left out
    for name, expected in collect(plain).items():
        torch.testing.assert_close(collect(again)[name], expected, rtol=1e-5, atol=1e-7)


def test_a_learned_variance_is_trained_and_drawn(tmp_path):
    model = dataclasses.replace(TINY, learned_variance=True)
    config = dataclasses.replace(
        CONFIG, prediction="eps", weighting="hybrid", sample_every=4, sample_steps=2
    )
    trainer(tmp_path, config, model).fit(progress=False)
    assert load(tmp_path).config.learned_variance and (tmp_path / "samples-000004.png").exists()


def test_sigterm_saves_and_stops(tmp_path):
    run = trainer(tmp_path)
    stop_after(run, 5, signal.SIGTERM)
    run.fit(progress=False)
    assert run.step == 5 and run.store.load()[1]["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_is_torchs(tmp_path, limit):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, clip_grad=limit))
    update, given = run._update, []

    def spying(norm):
        given.extend(w.grad.clone() for w in run.weights.values())
        update(norm)

    run._update = spying
    run._train_step()
    expected = [torch.zeros_like(g, requires_grad=True) for g in given]
    for parameter, grad in zip(expected, given, strict=True):
        parameter.grad = grad
    torch.nn.utils.clip_grad_norm_(expected, limit)
    for parameter, weight in zip(expected, run.weights.values(), strict=True):
        moment = run.optimizer.state[weight]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * parameter.grad, rtol=1e-4, atol=1e-12)


def test_an_unread_non_finite_step_changes_no_weight(tmp_path):
    """As on an accelerator, where numbers are read back now and then only."""
    run, good = trainer(tmp_path), trainer(tmp_path / "good")
    run.check_every = 10
    loss = run.loss.with_sums

    def breaking(*args, **kwargs):
        value, sums = loss(*args, **kwargs)
        return value * (math.nan if run.step == 4 else 1.0), sums

    run.loss.with_sums = breaking
    for _ in range(7):
        run._train_step()
    for _ in range(4):
        good._train_step()
    expected = {k: v for k, v in collect(good).items() if not k.startswith("ema")}
    assert all(torch.equal(v, collect(run)[k]) for k, v in expected.items())
    with pytest.raises(FloatingPointError, match="step 4: the loss of 4 of 4 images"):
        run._check()
    assert run.store.load()[1]["step"] == run.step == 4


def test_average_follows_its_formula(tmp_path):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, ema=0.3))
    name = "out.2.weight"
    average = run.model.state_dict()[name].double().clone()
    for step in range(4):
        run._train_step()
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * run.model.state_dict()[name].double()
    torch.testing.assert_close(run.ema.state_dict()[name].double(), average, rtol=1e-5, atol=1e-7)
    assert average.abs().max() > 0


def test_leaves_a_checkpoint_metrics_and_a_sample_grid(tmp_path):
    config = dataclasses.replace(CONFIG, steps=12, sample_every=10, sample_steps=2)
    ema = trainer(tmp_path, config).fit(progress=False)
    names = {"config.json", "metrics.jsonl", "model.safetensors", "samples-000010.png", ".lock"}
    states = {f"state-{step:09d}.safetensors" for step in (6, 9, 12)}
    assert {p.name for p in tmp_path.iterdir()} == names | states
    model = load(tmp_path)
    assert model.class_names[9] == "Ankle boot" and model.prediction == "v"
    assert all(torch.equal(v, ema.state_dict()[k]) for k, v in model.state_dict().items())
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").open())
    assert line["step"] == 10 and line["loss"] > 0 and line["images_per_s"] > 0
    recorded = json.loads((tmp_path / "config.json").read_text())["training"]
    assert TrainConfig.from_json(recorded["config"]) == config and recorded["step"] == 12


def test_metrics_after_the_last_save_are_replaced(tmp_path):
    config = dataclasses.replace(CONFIG, steps=20)
    run = trainer(tmp_path, config)
    stop_after(run, 15)
    run.fit(progress=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "loss": 1.0}\n')  # as a run that was killed would leave it
    trainer(tmp_path, config).fit(resume=True, progress=False)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [10, 20]


def test_a_run_is_not_started_over_nor_resumed_from_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        trainer(tmp_path).fit(resume=True)
    trainer(tmp_path, dataclasses.replace(CONFIG, steps=1)).fit(progress=False)
    with pytest.raises(FileExistsError, match="already holds a run; resume it"):
        trainer(tmp_path).fit()
    state = tmp_path / "state-000000001.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(ValueError, match=re.escape(f"{state}: truncated")):
        trainer(tmp_path).fit(resume=True)
    with trainer(tmp_path / "held").store.lock(), pytest.raises(BlockingIOError, match="writes"):
        trainer(tmp_path / "held").fit()


def test_a_run_of_another_model_is_not_resumed(tmp_path):
    trainer(tmp_path, dataclasses.replace(CONFIG, steps=1)).fit(progress=False)
    with pytest.raises(ValueError, match="does not fit its configuration"):
        trainer(tmp_path, model=dataclasses.replace(TINY, channels=16)).fit(resume=True)


OTHER = {
    "prediction=eps": {"prediction": "eps"},
    "weighting=min_snr": {"weighting": "min_snr"},
    "timesteps=loss_aware": {"timesteps": "loss_aware"},
    "steps=2: the run in .* has made 3": {"steps": 2},
}


def test_what_a_run_learns_stays_when_it_is_resumed(tmp_path):
    trainer(tmp_path, dataclasses.replace(CONFIG, steps=3)).fit(progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for said, change in OTHER.items():
        with pytest.raises(ValueError, match=said):
            trainer(tmp_path, dataclasses.replace(CONFIG, **change)).fit(resume=True)
    for schedule in (NoiseSchedule.linear(100), NoiseSchedule.cosine(50)):
        another = Trainer(UNet(TINY), schedule, fashion_mnist(SAMPLE), CONFIG, tmp_path)
        with pytest.raises(ValueError, match=r"schedule=.*: the run in .* was begun with .*cosine"):
            another.fit(resume=True)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    free = dataclasses.replace(CONFIG, steps=4, lr=2e-3, clip_grad=0.5, decay="constant")
    trainer(tmp_path, free).fit(resume=True, progress=False)


def test_a_model_whose_states_are_gone_is_not_overwritten(tmp_path):
    trainer(tmp_path, dataclasses.replace(CONFIG, steps=1)).fit(progress=False)
    (tmp_path / "state-000000001.safetensors").unlink()
    with pytest.raises(FileExistsError, match="already holds a run"):
        trainer(tmp_path).fit()


def test_samples_that_cannot_be_drawn_are_refused_before_training(tmp_path):
    drawing = dataclasses.replace(CONFIG, sample_every=2, sample_steps=101)
    with pytest.raises(ValueError, match="sample_steps=101: must be at most 100"):
        trainer(tmp_path, drawing)
    latents = ImageSet(torch.zeros(8, 4, 32, 32, dtype=torch.uint8))
    model = UNet(dataclasses.replace(TINY, in_channels=4, num_classes=None))
    with pytest.raises(ValueError, match="sample_every=2: pictures have 1 or 3 channels"):
        Trainer(model, NoiseSchedule.cosine(200), latents, drawing, tmp_path)


def test_metrics_that_cannot_be_written_stop_no_run(tmp_path, monkeypatch):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, steps=10, save_every=0))
    start = run.metrics.start

    def started(step):
        start(step)
        run.metrics._path = tmp_path  # a folder cannot be opened

    monkeypatch.setattr(run.metrics, "start", started)
    with pytest.warns(UserWarning, match="a line is not written"):
        run.fit(progress=False)
    assert run.step == 10 and (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_non_finite_numbers_stop_and_keep_the_last_state(tmp_path, broken):
    run = trainer(tmp_path)
    loss = run.loss.with_sums

    def breaking(*args, **kwargs):
        value, sums = loss(*args, **kwargs)
        if run.step < 4:
            return value, sums
        # sqrt at 0 has a finite value and an infinite slope
        return value * math.nan if broken == "loss" else value + (
            value - value.detach()
        ).sqrt(), sums

    run.loss.with_sums = breaking
    with pytest.raises(
        FloatingPointError, match=r"step 4: .* resume it with a smaller lr"
    ) as raised:
        run.fit(progress=False)
    index = run.data.indices(4, 4, CONFIG.seed).tolist()
    t = run.timesteps.draw(4, CONFIG.seed, 4)[0].tolist()
    assert all(f"{i} at t={time}" in str(raised.value) for i, time in zip(index, t, strict=True))
    good = trainer(tmp_path / "good")
    for _ in range(4):
        good._train_step()
    assert run.step == 4
    assert all(torch.equal(v, collect(run)[k]) for k, v in collect(good).items())
    again = trainer(tmp_path)
    assert again.store.load()[1]["step"] == 4
    again.fit(resume=True, progress=False)
    assert again.step == 8


def test_labels_are_dropped_at_the_rate_asked_for(tmp_path):
    config = dataclasses.replace(CONFIG, batch_size=1000, label_dropout=0.1)
    run = trainer(tmp_path, config, dataclasses.replace(TINY, channels=4))
    given = []
    run.loss.with_sums = lambda network, x0, t, cond, **_: given.append(cond) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        run._train_step()
    labels = run.data.batch(0, 1000, config.seed)[1]
    dropped = given[0] == -1
    assert dropped.float().mean() == pytest.approx(0.1, abs=4 * (0.09 / 1000) ** 0.5)
    assert torch.equal(given[0][~dropped], labels[~dropped])


def test_noise_and_data_are_functions_of_seed_and_step(tmp_path):
    def step_four(seed):
        run = trainer(tmp_path, dataclasses.replace(CONFIG, seed=seed))
        run.step = 4
        return run._train_step().item()

    assert step_four(1) == step_four(1) != step_four(2)


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, steps=2))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run.fit(progress=False)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", {0: 0.25, 3: 1, 52: 1, 99: 1}),
        ("linear", {0: 0.25, 3: 1, 4: 1, 52: 0.5, 76: 0.25}),
        ("cosine", {0: 0.25, 4: 1, 52: 0.5, 28: (1 + math.sqrt(0.5)) / 2}),
        ("cooldown", {0: 0.25, 4: 1, 52: 1, 71: 1, 76: 0.25 / 0.3}),
    ],
)
def test_learning_rate(decay, expected):
    config = TrainConfig(steps=100, lr=2e-3, warmup=4, decay=decay)
    for step, factor in expected.items():
        assert config.learning_rate(step) == pytest.approx(2e-3 * factor)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps=0: must be 1 or more"),
        ({"steps": 1.5}, TypeError, "steps=1.5: must be int"),
        ({"lr": 0.0}, ValueError, "lr=0.0"),
        ({"lr": math.nan}, ValueError, "lr=nan"),
        ({"ema": 1.0}, ValueError, r"ema=1.0: must be in \[0, 1\)"),
        ({"decay": "step"}, ValueError, "decay='step': must be one of 'constant'"),
        ({"prediction": "noise"}, ValueError, "prediction='noise'"),
        ({"weighting": "sine"}, ValueError, "weighting='sine'"),
        ({"save_every": -1}, ValueError, "save_every=-1"),
        ({"ema": (0.9, 0.9)}, ValueError, "must be one decay or more, each once"),
        ({"ema": ()}, ValueError, "must be one decay or more"),
        ({"ema": "0.9"}, TypeError, "ema='0.9': must be float"),
        ({"accumulate": 3}, ValueError, "accumulate=3: must divide batch_size=4"),
        ({"timesteps": "importance"}, ValueError, "timesteps='importance'"),
        ({"keep": 0}, ValueError, "keep=0"),
    ],
)
def test_bad_configurations_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(CONFIG, **change)


def test_data_that_does_not_fit_the_model_is_refused(tmp_path):
    data, schedule = fashion_mnist(SAMPLE), NoiseSchedule.cosine(10)
    for change, message in (
        ({"in_channels": 3}, r"data with images \(1, 32, 32\): the model takes \(3, 32, 32\)"),
        ({"num_classes": 5}, "data with label 9: the model has 5 classes"),
        ({"learned_variance": True}, "learned_variance=True: weighting='simple' would leave"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(UNet(dataclasses.replace(TINY, **change)), schedule, data, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="data without labels"):
        Trainer(UNet(TINY), schedule, ImageSet(data.images, pad=2), CONFIG, tmp_path)


def recipe(tmp_path, **change):
    parts = {
        "model": TINY.to_json(),
        "schedule": {"name": "cosine", "T": 100},
        "data": {"name": "fashion-mnist"},
        "train": {"steps": 3, "batch_size": 4},
        **change,
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(parts))
    return path


def command(path, out, *flags):
    data = ("--data", str(SAMPLE)) if "--data" not in flags else ()
    return cli.main(["train", "--config", str(path), "--out", str(out), *data, *flags])


def test_command_trains_and_resumes(tmp_path, capfd):
    path, out = recipe(tmp_path), tmp_path / "run"
    assert command(path, out, "--steps", "2", "--lr", "1e-3", "--bf16", "--ema", "0.9", "0.5") == 0
    assert "finished at step 2" in capfd.readouterr().out
    trained = json.loads((out / "config.json").read_text())["training"]["config"]
    assert (trained["steps"], trained["lr"], trained["bf16"]) == (2, 1e-3, True)
    assert trained["ema"] == [0.9, 0.5] and load(out / "ema-0.5.safetensors").prediction == "v"
    assert command(path, out) == 1
    assert "already holds a run" in capfd.readouterr().err
    assert command(path, out, "--resume") == 1
    assert "the run's state has no ema.0.999; resume with the ema" in capfd.readouterr().err
    assert command(path, out, "--resume", "--ema", "0.9", "0.5") == 0
    assert json.loads((out / "config.json").read_text())["training"]["step"] == 3


def test_command_refuses_bad_recipes(tmp_path, capfd):
    for change, message in (
        ({"extra": {}}, "must have the parts"),
        ({"train": {"step": 3}}, "has no fields ['step']"),
        ({"model": {"depth": 3}}, "has no fields ['depth']"),
        ({"schedule": {"name": "sine"}}, "sine"),
        ({"data": {"name": "cifar"}}, "must be one of 'fashion-mnist', 'folder'"),
        ({"data": {"name": "fashion-mnist", "padding": 2}}, "padding"),
    ):
        assert command(recipe(tmp_path, **change), tmp_path / "run") == 1
        assert message in capfd.readouterr().err
    assert command(tmp_path / "none.json", tmp_path / "run") == 1
    assert "none.json: no such recipe" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipe_is_one(tmp_path):
    parts = json.loads(RECIPE.read_text())
    config = UNetConfig.from_json(parts["model"])
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(config).parameters())
    assert count <= 6_000_000 and TrainConfig.from_json(parts["train"]).label_dropout == 0.1


def test_nothing_is_read_back_between_checks(tmp_path, monkeypatch):
    """On the CPU, without the checks of values that are made there only."""
    monkeypatch.setattr(UNet, "check", lambda *_: None)
    monkeypatch.setattr("fastdiff.errors.in_range", lambda *_: None)
    run = trainer(
        tmp_path, dataclasses.replace(CONFIG, accumulate=2, posthoc_every=9, timesteps="loss_aware")
    )
    run.check_every = 3
    with NoWaiting():
        run._train_step()
        run._train_step()
        with pytest.raises(AssertionError, match="reads a value back"):
            run._train_step()
