"""Distillation in stages: what is left in the folder, resumed, killed, guided, refused."""

import dataclasses
import json
import math
import multiprocessing
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from fastdiff import DDIMSampler, DistillConfig, NoiseSchedule, TrainConfig, distill, load, optimize
from fastdiff.checkpoint import save
from fastdiff.cli import main
from fastdiff.data import fashion_mnist
from fastdiff.models import UNet, UNetConfig

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
TINY = UNetConfig(
    image_size=32,
    in_channels=1,
    patch_size=2,
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    num_classes=10,
    norm_groups=4,
)
TRAIN = TrainConfig(
    steps=60,
    batch_size=16,
    lr=1e-3,
    warmup=0,
    decay="linear",
    ema=0.0,
    weighting="snr_trunc",
    label_dropout=0.0,
    save_every=5,
)


def teacher(config=TINY, prediction="v", schedule=None):
    torch.manual_seed(0)
    model = UNet(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    model.schedule, model.prediction = schedule or NoiseSchedule.cosine(1000), prediction
    model.class_names = tuple("abcdefghij")
    return model.eval()


def data(split="train"):
    return fashion_mnist(SAMPLE, split, pad=2)


def run(out, model=None, start=8, end=2, train=TRAIN, resume=False, **options):
    how = {"engine": "float32", "report_images": 64, **options}
    return distill(
        model or teacher(), None, start, end, data(), out,
        train=train, held_out=data("test"), resume=resume, progress=False, **how,
    )  # fmt: skip


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    out, threads = tmp_path_factory.mktemp("guided"), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are killed: torch's sums depend on it
    student = run(out, guidance=1.0)
    torch.set_num_threads(threads)
    return out, student


def test_every_stage_is_a_student_of_half_the_steps(guided):
    out, last = guided
    assert sorted(p.name for p in out.iterdir()) == ["2", "4", "distill.json", "engine.json"]
    schedule = NoiseSchedule.cosine(1000)
    for steps in (4, 2):
        student = load(out / str(steps))
        # a student's timesteps are the trailing ones of its number of steps
        assert student.distilled.timesteps == tuple(schedule.timesteps(steps, "trailing"))
        assert student.distilled.guidance == 1.0
        assert (student.prediction, student.class_names) == ("v", data().class_names)
    assert all(torch.equal(v, last.state_dict()[k]) for k, v in student.state_dict().items())


def test_a_student_comes_nearer_to_two_steps_of_its_teacher_at_every_timestep(guided):
    """The report's errors are those of one guided step against two, by hand."""
    out, _ = guided
    first, model = load(out / "4"), teacher()
    sampler = DDIMSampler(model.schedule, steps=8, spacing="trailing", prediction="v")
    own = DDIMSampler(model.schedule, spacing=first.distilled.timesteps, prediction="v")
    test, index = data("test"), torch.arange(64) % 20
    x0, cond = test.load(index), test.labels[index]
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    said = json.loads((out / "4" / "report.json").read_text())["mean squared error"]
    assert [row["t"] for row in said] == list(first.distilled.timesteps)
    for k, row in enumerate(said):
        assert row["student"] < 0.7 * row["start"], row
        t = row["t"]
        x = (model.schedule.alpha[t] * x0 + model.schedule.sigma[t] * z).float()
        x_t = x
        with torch.no_grad():
            for i in (2 * k, 2 * k + 1):
                when = torch.full((64,), int(sampler.timesteps[i]))
                m = 2 * model(x, when, cond) - model(x, when, model.null_cond(cond))
                x = sampler.step(m, i, x)
            when = torch.full((64,), t)
            ours = own.step(first(x_t, when, cond), k, x_t)
            plain = own.step(model(x_t, when, cond), k, x_t)
        b = float(own.table.b[k] * abs(own.table.pm[k]))  # of the state in the output
        error = (ours - x).square().mean().item() / b**2
        assert error == pytest.approx(row["student"], rel=0.25), k
        assert error < (plain - x).square().mean().item() / b**2


def test_a_stage_starts_as_its_teacher(tmp_path):
    """A student that is not trained is its teacher; with the weight as an input, too."""
    still = dataclasses.replace(TRAIN, steps=1, lr=1e-30)
    model = teacher()
    plain = run(tmp_path / "a", model, 4, 2, still)
    weighted = run(tmp_path / "b", model, 4, 1, still, guidance_max=2.0)
    x, t, cond = torch.randn(3, 1, 32, 32), torch.tensor([999, 499, 3]), torch.tensor([1, -1, 9])
    with torch.no_grad():
        expected = model(x, t, cond)
        assert torch.equal(plain(x, t, cond), expected)
        torch.testing.assert_close(weighted.at_guidance(1.5)(x, t, cond), expected)


def test_the_weight_as_an_input_is_learned(tmp_path):
    student = run(tmp_path, start=4, end=2, guidance_max=4.0)
    assert student.config.guidance_max == 4.0 and student.distilled.guidance is None
    sampler = DDIMSampler(student.schedule, spacing=student.distilled.timesteps, prediction="v")
    how = {"shape": (20, 1, 32, 32), "cond": torch.arange(20) % 10, "seed": 0}
    none, some, much = (sampler.sample(student.at_guidance(w), **how) for w in (0.0, 2.0, 4.0))
    assert (much - none).norm() > (some - none).norm() > 0.01 * none.norm()
    fast = sampler.sample(optimize(student.at_guidance(2.0)), **how)
    torch.testing.assert_close(fast, some, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"takes a weight from 0 to 4.0; give that"):
        distill(student, None, 2, 1, data(), tmp_path / "b", guidance_max=2.0)
    for w in (-0.1, 4.1):
        with pytest.raises(ValueError, match=rf"w={w}: must be in \[0, 4.0\]"):
            student.at_guidance(w)
    with pytest.raises(ValueError, match="does not take a guidance weight"):
        teacher().at_guidance(1.0)
    with pytest.raises(ValueError, match=r"w: was not given, guidance_max is 4.0"):
        student(torch.zeros(1, 1, 32, 32), torch.tensor([3]))


def test_an_eps_teacher_of_a_discrete_schedule_is_distilled_exactly_or_refused(tmp_path):
    linear = teacher(prediction="eps", schedule=NoiseSchedule.linear(1000))
    student = run(tmp_path / "a", linear, 4, 2, dataclasses.replace(TRAIN, lr=1e-4))
    assert student.prediction == "eps"
    said = json.loads((tmp_path / "a" / "2" / "report.json").read_text())
    assert said["prediction"] == "eps"
    assert all(row["student"] < row["start"] for row in said["mean squared error"])
    with pytest.raises(ValueError, match=r"error at timestep 999 is 2.*predicts 'v' or 'x0'"):
        run(tmp_path / "b", teacher(prediction="eps"))
    assert not (tmp_path / "b").exists()


def test_teachers_that_predict_both_are_distilled_and_come_back(tmp_path):
    both = teacher(dataclasses.replace(TINY, predict_both=True), "x0")
    student = run(tmp_path / "a", both, 4, 2)
    said = json.loads((tmp_path / "a" / "2" / "report.json").read_text())["mean squared error"]
    assert all(row["student"] < 0.7 * row["start"] for row in said)
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([999, 499])
    assert torch.equal(load(tmp_path / "a" / "2")(x, t), student(x, t))
    with pytest.raises(ValueError, match="prediction='v': a model with predict_both outputs 'x0'"):
        run(tmp_path / "b", teacher(dataclasses.replace(TINY, predict_both=True)))


def test_a_student_can_be_distilled_further(guided, tmp_path):
    out, two = guided
    one = distill(load(out / "2"), None, 2, 1, data(), tmp_path, train=TRAIN, progress=False)
    assert one.distilled.timesteps == (999,) and one.distilled.guidance == 1.0
    with pytest.raises(ValueError, match="was distilled to 2 steps; start there"):
        distill(two, None, 4, 1, data(), tmp_path)
    with pytest.raises(ValueError, match="has its guidance in it"):
        distill(two, None, 2, 1, data(), tmp_path, guidance=1.0)


def child(out):
    torch.set_num_threads(1)
    run(out, resume=out.exists(), guidance=1.0)


def test_stages_that_are_killed_go_on_where_they_were(guided, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", __name__])
    out = tmp_path / "students"
    out.mkdir()
    # the choices of the uninterrupted run, which a folder keeps, are these two runs' alone to share
    (out / "engine.json").write_bytes((guided[0] / "engine.json").read_bytes())
    for folder, step in (("4", 10), ("4", 45), ("2", 20)):
        process = context.Process(target=child, args=(out,))
        process.start()
        wanted, end = out / folder / f"state-{step:09d}.safetensors", time.monotonic() + 120
        while not wanted.exists() and not list((out / folder).glob("state-*6?.safetensors")):
            assert process.is_alive() and time.monotonic() < end
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = context.Process(target=child, args=(out,))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    for steps in ("4", "2"):
        ours, whole = (load(folder / steps).state_dict() for folder in (out, guided[0]))
        assert all(torch.equal(ours[k], whole[k]) for k in whole)
        assert (out / steps / "report.json").exists() and (out / steps / "samples.png").exists()


def test_a_folder_that_holds_stages_is_not_overwritten(guided):
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(guided[0], guidance=1.0)
    path = guided[0] / "4" / "report.json"
    run(guided[0], guidance=1.0, resume=True)  # there is nothing left to do
    said = path.read_text()
    path.write_text(said.replace('"step": 60', '"step": 30'))  # of a student trained less
    run(guided[0], guidance=1.0, resume=True)
    assert json.loads(path.read_text())["step"] == 60


def test_stages_of_something_else_are_not_gone_on_with(guided, tmp_path):
    """Nor are those begun whose folders are taken."""
    other = teacher()
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    for said, change in {
        "guidance=3.0: the stages in .* were begun with 1.0": {"guidance": 3.0},
        "guidance=None: .* were begun with 1.0": {"guidance_max": 2.0},
        "start_steps=16: .* were begun with 8": {"start": 16, "guidance": 1.0},
        "teacher=": {"model": other, "guidance": 1.0},
    }.items():
        with pytest.raises(ValueError, match=said):
            run(guided[0], resume=True, end=1, **change)
    taken = tmp_path / "2"
    taken.mkdir()
    (taken / "model.safetensors").write_bytes((guided[0] / "2" / "model.safetensors").read_bytes())
    with pytest.raises(FileExistsError, match=r"2: already holds a run"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_damaged_files_of_a_folder_are_named(guided, tmp_path):
    for name, text in {"distill.json": "[1]", "engine.json": "[1]", "4/config.json": "{}"}.items():
        out = tmp_path / name.replace("/", "-")
        shutil.copytree(guided[0], out)
        (out / name).write_text(text)
        shutil.rmtree(out / "2")
        with pytest.raises(ValueError, match=re.escape(str(out / name))):
            run(out, guidance=1.0, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 6}, "start_steps=6: must halve down to end_steps=2, so it must be one of 4, 8"),
        ({"start": 2}, "start_steps=2: must halve"),
        ({"end": 0}, "end_steps=0: must be 1 or more"),
        ({"start": 2048}, "start_steps=2048: must be at most 1000"),
        ({"guidance": 1.0, "guidance_max": 2.0}, "give one weight, or"),
        ({"guidance_max": 0.0}, "guidance_max=0.0: must be greater"),
        ({"updates": (5, 5, 5)}, r"updates=\(5, 5, 5\): must be positive, at most one"),
        ({"lrs": (-1.0,)}, "lrs="),
        ({"engine": "float64"}, "engine='float64': must be one of"),
        ({"report_images": -1}, "report_images=-1"),
    ],
)
def test_bad_requests_are_named_before_any_work(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_teachers_that_cannot_be_distilled_are_refused(tmp_path):
    learned = teacher(dataclasses.replace(TINY, learned_variance=True))
    with pytest.raises(ValueError, match="learned variance"):
        run(tmp_path, learned)
    with pytest.raises(ValueError, match="has no classes"):
        run(tmp_path, teacher(dataclasses.replace(TINY, num_classes=None)), guidance=1.0)
    model = teacher()
    with pytest.raises(ValueError, match="was trained with"):
        distill(model, NoiseSchedule.linear(1000), 4, 2, data(), tmp_path)
    model.schedule = None
    with pytest.raises(ValueError, match="carries none"):
        distill(model, None, 4, 2, data(), tmp_path)


def test_stages_have_budgets_and_rates_of_their_own():
    config = DistillConfig(start_steps=16, end_steps=1, updates=(7, 8), lrs=(2e-3,))
    assert config.stages == (8, 4, 2, 1)
    assert DistillConfig.from_json(config.to_json()) == config
    from fastdiff.distillation.distill import _training

    made = [_training(TRAIN, config, k) for k in range(4)]
    assert [c.steps for c in made] == [7, 8, 60, 60]
    assert [c.lr for c in made] == [2e-3, 1e-3, 1e-3, 1e-3]


def test_the_command_distils_and_the_students_are_sampled(tmp_path, capsys):
    save(tmp_path / "teacher", teacher(), NoiseSchedule.cosine(1000), "v", tuple("abcdefghij"))
    recipe = {
        "teacher": str(tmp_path / "teacher"),
        "data": {"name": "fashion-mnist", "pad": 2},
        "distill": {"start_steps": 4, "end_steps": 1, "guidance": 1.0, "report_images": 20},
        "train": {**TRAIN.to_json(), "steps": 3},
    }
    path, out = tmp_path / "recipe.json", tmp_path / "students"
    path.write_text(json.dumps(recipe))
    words = ["distill", "--config", str(path), "--data", str(SAMPLE), "--out", str(out)]
    assert main([*words, "--updates", "2", "4"]) == 0
    assert "students of 2, 1 steps" in capsys.readouterr().out
    made = json.loads((out / "1" / "config.json").read_text())
    assert made["distilled"] == {"timesteps": [999], "guidance": 1.0}
    assert made["training"]["step"] == 4
    picture = ["sample", "--model", str(out / "2"), "--num", "10", "--engine", "off"]
    assert main([*picture, "--out", str(tmp_path / "x.png")]) == 0
    assert "2 steps" in capsys.readouterr().out
    assert main([*picture, "--guidance", "2", "--out", str(tmp_path / "x.png")]) == 1
    assert "was distilled at 1; leave it out" in capsys.readouterr().err
    assert main([*picture, "--steps", "5", "--out", str(tmp_path / "x.png")]) == 1
    assert "was distilled to 2 steps" in capsys.readouterr().err
    assert (
        main([*picture, "--steps", "2", "--guidance", "1", "--out", str(tmp_path / "y.png")]) == 0
    )
    assert main([*words, "--prediction", "eps"]) == 1
    assert "students predict as their teacher" in capsys.readouterr().err
    assert main(words) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main([*words, "--resume", "--updates", "2", "4"]) == 0


def test_curves_and_metrics_are_those_of_a_run(guided):
    lines = [json.loads(line) for line in (guided[0] / "2" / "metrics.jsonl").open()]
    assert lines[-1]["step"] == 60 and len(lines[-1]["loss_by_t"]) == 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
