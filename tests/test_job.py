"""A large set of samples: the same however it is drawn, and whatever is killed."""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from fastdiff import DDIMSampler, NoiseSchedule, cli
from fastdiff import job as jobs
from fastdiff.data import ShardedImages, export_png
from fastdiff.data import shards as files
from fastdiff.data.shards import Shards
from fastdiff.draw import draw_batches
from fastdiff.files import read_tensors, write_tensors
from fastdiff.job import fill

SHAPE, NUM, EACH, BATCH = (1, 4, 4), 200, 8, 3
SAMPLER = DDIMSampler(NoiseSchedule.cosine(100), 4)
LABELS, KILLS = torch.tensor([2, 0, 1]), 50


def model(x, t, cond):
    """Every sample by itself, whatever the batch; slow enough to be killed within."""
    time.sleep(0.002)
    return x * 0.3 + cond[:, None, None, None] * 0.1


def of(folder, **how):
    given = {"num": NUM, "shape": SHAPE, "per_shard": EACH, "made_of": {"seed": 5}, **how}
    return Shards(Path(folder), **given)


def drawn(folder, **how):
    return fill(of(folder, **how), model, SAMPLER, LABELS, None, 5, BATCH)


def expected():
    labels = LABELS.repeat(NUM)[:NUM]
    return torch.cat(list(draw_batches(model, SAMPLER, SHAPE, NUM, labels, seed=5))), labels


def held(folder):
    shards = Shards.open(folder)
    images, labels = zip(*map(shards.read, range(len(shards))), strict=True)
    return torch.cat(images), torch.cat(labels)


def same(folder):
    return all(torch.equal(a, b) for a, b in zip(held(folder), expected(), strict=True))


def test_a_folder_of_shards_holds_what_one_call_draws(tmp_path):
    assert drawn(tmp_path) == NUM and same(tmp_path)
    assert drawn(tmp_path) == 0  # all are there
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sum(s["count"] for s in manifest["shards"].values()) == NUM
    assert len(manifest["shards"]) == len(of(tmp_path)) == 25


def worker(folder, rank, port):
    """One of two processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo")
    drawn(folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(folder, port):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", __name__])
    pair = [context.Process(target=worker, args=(folder, rank, port)) for rank in range(2)]
    for process in pair:
        process.start()
    return pair


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_killed_at_random_moments_lose_and_double_nothing(tmp_path):
    rng = random.Random(0)
    for kill in range(KILLS):
        before = len(list(tmp_path.glob("shard-*")))
        pair = launch(tmp_path, free_port())
        end = time.monotonic() + 60
        # half of the kills come once shards are being written, the others while all starts
        while kill % 2 and len(list(tmp_path.glob("shard-*"))) == before < 25:
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if kill % 2 else 0.5))
        victims = pair if kill % 5 == 0 else [pair[kill % 2]]  # the machine, or a worker
        for process in victims:
            process.kill()
        for process in pair:  # as torchrun does with those that are left
            process.terminate()
            process.join(30)
            assert process.exitcode is not None
        if kill % 10 == 9 and (shards := sorted(tmp_path.glob("shard-*"))):
            victim = rng.choice(shards)  # so that there is always something left to draw
            raw = victim.read_bytes()
            victim.unlink() if kill % 20 == 9 else victim.write_bytes(raw[: len(raw) // 2])
    pair = launch(tmp_path, free_port())
    for process in pair:
        process.join(60)
        assert process.exitcode == 0
    assert same(tmp_path) and not list(tmp_path.glob(".*.tmp"))
    assert json.loads((tmp_path / "manifest.json").read_text()) == of(tmp_path).manifest()


def sample(*flags, processes=1):
    run = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m")
    return [
        sys.executable, *(("-m", *run) if processes > 1 else ("-m",)), "fastdiff", "sample",
        "--model", "fashion-mnist-1", "-n", "60", "--batch", "10", "--per-shard", "10", *flags,
    ]  # fmt: skip


def test_the_command_in_two_processes_and_its_launcher_killed(tmp_path, capsys):
    how = {
        "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": Path(__file__).parents[1],
        "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
    }  # fmt: skip
    out = tmp_path / "two"
    launcher = subprocess.Popen(sample("--out", str(out), processes=2), **how)
    end = time.monotonic() + 120
    while not list(out.glob("shard-*")):
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    again = subprocess.run(sample("--out", str(out), processes=2), check=False, **how)
    assert again.returncode == 0 and "60 images of fashion-mnist-1" in again.stdout, again.stdout
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "engine.json").write_text((out / "engine.json").read_text())
    alone = subprocess.run(sample("--out", str(tmp_path / "one")), check=False, **how)
    assert alone.returncode == 0, alone.stdout
    assert all(torch.equal(a, b) for a, b in zip(held(out), held(tmp_path / "one"), strict=True))

    assert (
        cli.main(["verify", str(out)]) == 0 and "60 images in 6 shards" in capsys.readouterr().out
    )
    assert cli.main(["export", str(out), "--out", str(tmp_path / "png")]) == 0
    from PIL import Image

    picture = torch.frombuffer(
        bytearray(Image.open(tmp_path / "png" / "000000013.png").tobytes()), dtype=torch.uint8
    )
    assert torch.equal(picture.reshape(32, 32), held(out)[0][13, 0])
    other = sample("--out", str(out), "--seed", "1")[3:]
    assert cli.main(other) == 1 and "seed=0 (asked for 1)" in capsys.readouterr().err


def spoil(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def rename(path):
    path.rename(path.with_name("shard-000099.safetensors"))


def move(path):
    (path.parent / "shard-000004.safetensors").write_bytes(path.read_bytes())


def of_another_shape(path):
    _, metadata = read_tensors(path)
    images = torch.zeros(EACH, 1, 2, 2, dtype=torch.uint8)
    labels = torch.zeros(EACH, dtype=torch.int64)
    write_tensors(path, {"images": images, "labels": labels}, metadata | {"fastdiff": ""})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (spoil, "shard-000003.safetensors: damaged"),
        (Path.unlink, "shard-000003.safetensors: missing"),
        (rename, "shard-000099.safetensors: the set has no such shard"),
        (move, "shard-000004.safetensors: is of another set, or of another place"),
        (lambda path: (path.parent / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda path: (path.parent / "manifest.json").write_text("{}"), "does not say what"),
        (lambda path: path.write_bytes(b""), "shard-000003.safetensors: "),
    ],
)
def test_verify_names_what_is_wrong(tmp_path, capsys, wrong, said):
    drawn(tmp_path)
    wrong(tmp_path / "shard-000003.safetensors")
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "job", ["", "[]", "{}", '{"num": -1, "shape": [1, 4, 4], "per_shard": 8, "made_of": {}}']
)
def test_a_damaged_job_is_named(tmp_path, job, capsys):
    (tmp_path / "job.json").write_text(job)
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "job.json: damaged, or no job" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="takes a folder of fastdiff sample"):
        ShardedImages(tmp_path / "none")


def test_another_set_is_not_mixed_in(tmp_path):
    drawn(tmp_path)
    with pytest.raises(ValueError, match=r"num=200 \(asked for 201\)"):
        drawn(tmp_path, num=201)
    with pytest.raises(ValueError, match=r"seed=5 \(asked for 6\)"):
        drawn(tmp_path, made_of={"seed": 6})
    (tmp_path / "job.json").unlink()
    with pytest.raises(ValueError, match=r"holds shards without job\.json"):
        drawn(tmp_path)


def test_facts_in_any_order_and_of_tuples_are_the_same_set(tmp_path):
    drawn(tmp_path, made_of={"seed": 5, "words": ("a", "b")})
    assert drawn(tmp_path, made_of={"words": ["a", "b"], "seed": 5}) == 0
    assert not Shards.open(tmp_path).problems()


def test_what_cannot_be_read_is_not_thrown_away(tmp_path, monkeypatch):
    drawn(tmp_path)
    path, read = of(tmp_path).path(3), files.read_tensors

    def failing(file, **how):
        if file == path:
            raise OSError(errno.EIO, "Input/output error", str(file))
        return read(file, **how)

    monkeypatch.setattr(files, "read_tensors", failing)
    with pytest.raises(OSError, match=r"cannot be read \(Input/output error\).*shard-000003"):
        drawn(tmp_path)
    assert path.is_file()


def test_the_first_rows_are_drawn_on_the_device_too(tmp_path, monkeypatch):
    seen = []

    def watched(*args, device="cpu", **how):
        seen.append(args[9] if len(args) > 9 else device)
        return draw_batches(*args[:9])

    monkeypatch.setattr(jobs, "draw_batches", watched)
    fill(of(tmp_path), model, SAMPLER, LABELS, None, 5, BATCH, "cuda")
    assert set(seen) == {"cuda"}


def test_a_full_disk_is_named_and_the_same_call_goes_on(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    shards = of(tmp_path, num=20_000, per_shard=20_000)
    job = shards, model, SAMPLER, LABELS, None, 5, 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"shard-000000.*not written.*make room"):
            fill(*job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("shard-*"))
    assert fill(*job) == 20_000


def test_the_readers_give_every_image_once(tmp_path):
    drawn(tmp_path)
    images, labels = held(tmp_path)
    data = ShardedImages(tmp_path)
    assert len(data) == NUM
    alone = list(data)
    assert torch.equal(torch.stack([x for x, _ in alone]), images)
    assert [y for _, y in alone] == labels.tolist()
    loaded = list(DataLoader(data, batch_size=None, num_workers=2))
    found = sorted((x.flatten().tolist(), int(y)) for x, y in loaded)
    assert found == sorted((x.flatten().tolist(), int(y)) for x, y in alone)
    assert export_png(tmp_path, tmp_path / "png") == NUM == len(list((tmp_path / "png").iterdir()))


def test_a_picture_that_cannot_be_written_is_named_and_not_left_in_part(tmp_path):
    drawn(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(OSError, match=r"000000000\.png: not written: .*make room"):
            export_png(tmp_path, tmp_path / "png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "png").iterdir())


def test_damaged_choices_of_the_engine_are_named(tmp_path):
    drawn(tmp_path)
    for text in ("[[", "[1]", "{}"):
        (tmp_path / "engine.json").write_text(text)
        with pytest.raises(ValueError, match=r"engine\.json: damaged"):
            drawn(tmp_path)
