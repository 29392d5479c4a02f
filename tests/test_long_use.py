"""Long and shared use: nothing grows, and what is computed does not depend on who else computes."""

import asyncio
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastdiff import DDIMSampler, DDPMSampler, NoiseSchedule, load, optimize
from fastdiff.engine import tune
from fastdiff.ops.randn import randn

COSINE = NoiseSchedule.cosine(1000)


def held():
    """Bytes, file descriptors and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        pages * resource.getpagesize(),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


@needs_proc
def test_a_hundred_thousand_steps_leave_nothing_behind():
    sampler = DDPMSampler(COSINE, clip=1.0)
    looped = DDIMSampler(COSINE, 50, eta=0.5)
    x = randn((2, 1, 8, 8), 0)
    model = lambda x, t: x  # noqa: E731

    def some():
        y = x
        for i in range(1000):
            y = sampler.step(y, i, y, seed=3)
        for seed in range(20):
            looped.sample(model, x.shape, seed=seed)

    for _ in range(5):
        some()
    before = held()
    for _ in range(50):
        some()
    after = held()
    assert after[0] - before[0] < 4 << 20 and after[1:] == before[1:]


@pytest.fixture(scope="module")
def engine():
    network = load("fashion-mnist-1")
    fast = optimize(network, "bfloat16")
    x, t, cond = randn((4, 1, 32, 32), 0), torch.full((4,), 999), torch.arange(4)
    with torch.no_grad():
        return network, fast, (x, t, cond), fast(x, t, cond).clone()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_threads_or_runs(engine, dtype):
    network, _, given, _ = engine
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(optimize(network, dtype)(*given).clone())
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)
    assert tune.measured()


RUN = """
import sys, torch, zlib
from fastdiff import load, optimize, ops
torch.set_num_threads(int(sys.argv[1]))
x, t, cond = ops.randn((4, 1, 32, 32), 0), torch.full((4,), 999), torch.arange(4)
with torch.no_grad():
    print(zlib.crc32(optimize(load("fashion-mnist-1"))(x, t, cond).numpy()))
"""


def test_bits_are_the_same_from_process_to_process(tmp_path):
    found = [
        subprocess.run(
            [sys.executable, "-c", RUN, threads], cwd=Path(__file__).parents[1], check=True,
            env={**os.environ, "FASTDIFF_CACHE": str(cache)}, capture_output=True,
        ).stdout
        for threads, cache in (("2", tmp_path), ("1", tmp_path), ("2", tmp_path))
    ]  # fmt: skip
    assert len(set(found)) == 1 and len(list(tmp_path.glob("engine-*.json"))) == 1
    (path,) = tmp_path.glob("engine-*.json")
    path.write_text("{}")  # damaged: measured again
    again = subprocess.run(
        [sys.executable, "-c", RUN, "2"], cwd=Path(__file__).parents[1], check=False,
        env={**os.environ, "FASTDIFF_CACHE": str(tmp_path)}, capture_output=True,
    )  # fmt: skip
    assert again.returncode == 0 and again.stdout


@torch.no_grad()
def test_two_engines_in_two_threads(engine):
    _, fast, given, expected = engine
    other = optimize(load("fashion-mnist-2"), "bfloat16")
    x, t, cond = given
    expected_other = other(x, t, cond).clone()
    errors = []

    def work(network, right):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(network(x, t, cond), right):
                    errors.append(network)

    threads = [
        threading.Thread(target=work, args=pair)
        for pair in ((fast, expected), (other, expected_other), (fast, expected))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_asyncio_takes_turns_with_it(engine):
    _, fast, given, expected = engine

    async def main():
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(3) as pool:
            return await asyncio.gather(*(loop.run_in_executor(pool, run) for _ in range(6)))

    def run():
        with torch.no_grad():
            return fast(*given).clone()

    assert all(torch.equal(x, expected) for x in asyncio.run(main()))


def drawn(_):
    torch.set_num_threads(1)
    sampler = DDIMSampler(COSINE, 4, prediction="v", clip=1.0)
    return sampler.sample(lambda x, t: 0.5 * x, (2, 1, 8, 8), seed=7).numpy()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_draw_what_their_parent_does(method):
    right = drawn(0)  # so that a fork inherits a parent that has used the kernels
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert all((found == right).all() for found in pool.map(drawn, range(4)))


@pytest.mark.parametrize("moment", [0.3, 1.5, 3.0, 4.5])
def test_ctrl_c_ends_the_command_cleanly_and_keeps_what_was_finished(tmp_path, moment):
    out = tmp_path / "set"
    command = [
        sys.executable, "-m", "fastdiff", "sample", "--model", "fashion-mnist-4", "-n", "100000",
        "--per-shard", "20", "--batch", "20", "--out", str(out),
    ]  # fmt: skip
    run = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True,
        # a shell's background job ignores it, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    time.sleep(moment)
    run.send_signal(signal.SIGINT)
    try:
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    if moment > 1:  # before that Python itself may still be starting
        assert run.returncode in (130, -signal.SIGINT), said
    assert not list(out.glob(".*.tmp"))
    from fastdiff.data.shards import Shards

    if (out / "job.json").exists():
        shards = Shards.open(out)
        finished = [k for k in range(len(shards)) if shards.path(k).exists()]
        for k in finished:
            shards.read(k)
