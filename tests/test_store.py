"""The store: a state is whole or not there, and damage is found, named and stepped over."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdiff import files
from fastdiff.files import DTYPES, read_tensors, write_bytes, write_tensors
from fastdiff.store import Store

fork = multiprocessing.get_context("fork")


def tensors(seed=0):
    torch.manual_seed(seed)
    return {"weight": torch.randn(16, 3), "step": torch.tensor(float(seed))}


def name(step):
    return f"state-{step:09d}.safetensors"


def steps(folder):
    return [int(p.name[6:15]) for p in sorted(folder.glob("state-*"))]


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], v) for k, v in expected.items()
    )


def has(folder, *expected):
    """The folder holds the states of these steps, whole, and nothing unfinished."""
    assert {p.name for p in folder.iterdir()} == {".lock", *map(name, expected)}
    for step in expected:
        found, metadata = read_tensors(folder / name(step), stamped=True)
        assert same(found, tensors(step)) and json.loads(metadata["record"]) == {"step": step}


@pytest.fixture
def store(tmp_path):
    """A store with the states of steps 1 and 2."""
    store = Store(tmp_path / "run")
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    return store


def test_what_is_saved_comes_back(tmp_path):
    store = Store(str(tmp_path / "deep" / "run"))
    assert not store.exists()
    with pytest.raises(FileNotFoundError, match="holds no state of a run"):
        store.load()
    record = {"seed": 2**63, "loss": 0.1 + 0.2, "names": ["ö", '"'], "none": None}
    path = store.save(12, tensors(3), record, score=1.0)
    found, back = Store(tmp_path / "deep" / "run").load()
    assert store.exists() and same(found, tensors(3)) and back == record
    assert path == tmp_path / "deep" / "run" / name(12)


def test_the_file_is_a_safetensors_file(tmp_path):
    path = tmp_path / "a.safetensors"
    written = {str(d): torch.arange(-3, 4).to(d) for d in DTYPES}
    written |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3, dtype=torch.bool),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "part": torch.randn(6, 8)[1:5, ::2],
        "every other": torch.randn(6)[::2],
        "transposed": torch.randn(3, 4).t().requires_grad_(),
        "one of two": torch.randn(5).expand(2, 5),
        'ö"\\\n': torch.tensor([math.nan, -0.0, math.inf]),
    }
    write_tensors(path, written, {"who": "me"})
    for found in (load_file(path), read_tensors(path)[0]):
        assert found.keys() == written.keys()
        for key, value in written.items():
            assert found[key].dtype == value.dtype and found[key].shape == value.shape
            torch.testing.assert_close(found[key], value.detach(), rtol=0, atol=0, equal_nan=True)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for key, value in written.items():  # aligned, so that the file can be mapped
        assert (8 + length + header[key]["data_offsets"][0]) % value.element_size() == 0
    assert torch.signbit(load_file(path)['ö"\\\n'])[1]
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["who"] == "me"
    save_file(load_file(path), tmp_path / "b.safetensors")  # what another program wrote
    assert read_tensors(tmp_path / "b.safetensors")[0].keys() == written.keys()
    with pytest.raises(ValueError, match="carries no checksum"):
        read_tensors(tmp_path / "b.safetensors", stamped=True)


@pytest.mark.parametrize("count", range(8))
def test_headers_of_any_length_end_at_a_multiple_of_8(tmp_path, count):
    write_tensors(tmp_path / "a", {}, {"who": "m" * count})
    assert load_file(tmp_path / "a") == read_tensors(tmp_path / "a")[0] == {}
    assert (tmp_path / "a").stat().st_size % 8 == 0


def test_tensors_of_no_place_in_the_format_are_refused(tmp_path):
    for wrong in (torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match=r"odd: .*must be dense, of float64, float32"):
            write_tensors(tmp_path / "a", {"odd": wrong})
    with pytest.raises(TypeError, match="not JSON serializable"):
        Store(tmp_path / "run").save(1, {}, {"what": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None])
def test_bad_numbers_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"keep=.* must be an int of 1 or more"):
        Store(tmp_path, keep=wrong)
    with pytest.raises(ValueError, match=r"step=.* must be an int of 0 or more"):
        Store(tmp_path).save(wrong or None, {}, {})


def test_the_newest_and_the_best_stay(tmp_path):
    store, kept = Store(tmp_path, keep=2), []
    for step, score in enumerate([None, 3.0, 2.0, math.nan, -math.inf, 2.0, 5.0, 2.5, None]):
        store.save(step, tensors(step), {"step": step}, score)
        kept.append(steps(tmp_path))
    assert kept == [[0], [0, 1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6], [5, 6, 7], [5, 7, 8]]
    has(tmp_path, 5, 7, 8)


def test_older_ones_go_only_when_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    store, order = Store(tmp_path, keep=1), []
    store.save(1, tensors(1), {})

    def note(owner, call, what):
        real = getattr(owner, call)

        def noting(*args, **kwargs):
            order.append((call, what(*args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, call, noting)

    note(os, "write", lambda file, _: "bytes")
    note(os, "fsync", lambda file: "folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
    note(os, "replace", lambda old, new: new.name)
    note(Path, "unlink", lambda path: path.name)
    with store.lock():
        store.save(2, tensors(2), {})
    last = [call for call, _ in order].index("fsync")
    assert {call for call, _ in order[:last]} == {"write"}
    expected = [("fsync", "file"), ("replace", name(2)), ("fsync", "folder"), ("unlink", name(1))]
    assert [o for o in order[last:] if not o[1].endswith(".tmp")] == expected
    assert steps(tmp_path) == [2]


def failing(monkeypatch, call, when, error):
    """Have the `when`-th call of os.<call> fail, and all after it of the same kind."""
    real, count = getattr(os, call), iter(range(10_000))

    def broken(first, *args):
        if next(count) < when:
            return real(first, *args)
        if call == "write" and when % 2 and next(count) == when + 1:
            return real(first, args[0][: max(1, len(args[0]) // 2)])  # a short one first
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, call, broken)


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_whatever_fails_whenever_loses_nothing(store, monkeypatch, call, error):
    failures = 0
    for when in range(100):
        with monkeypatch.context() as patch, contextlib.suppress(StopIteration), store.lock():
            failing(patch, call, when, error)
            try:
                store.save(3, tensors(3), {"step": 3})
            except OSError as raised:
                failures += 1
                said = str(raised)
                assert raised.errno == error and str(store.folder / name(3)) in said
                assert "files already there are whole" in said
                if error == errno.ENOSPC:
                    assert re.search(r"needs 0\.0 MB, [\d,.]+ MB free; make room", said)
            else:
                break
        there = steps(store.folder)
        has(store.folder, 1, 2, *([3] if 3 in there else []))
        with warnings.catch_warnings(action="error"):
            assert store.load()[1] == {"step": there[-1]}
        (store.folder / name(3)).unlink(missing_ok=True)
    has(store.folder, 1, 2, 3)
    # header, two tensors and checksum; file and folder; once; temporary, folder
    assert failures == {"write": 4, "fsync": 2, "replace": 1, "open": 2}[call]


def test_a_real_limit_of_the_system(store, monkeypatch):
    real = shutil.disk_usage

    def usage(folder):
        assert not list(folder.glob(".*.tmp"))  # what is said to be free is so afterwards
        return real(folder)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    big = {"weight": torch.randn(1 << 20)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"needs 4\.2 MB, [\d,.]+ MB free; make room"):
            store.save(3, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    has(store.folder, 1, 2)


def test_folders_that_cannot_be_written(tmp_path, store):
    (tmp_path / "file").write_text("here")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/sys/run")):
        for act in (Store(folder).check, lambda at=folder: Store(at).save(1, {}, {})):
            with pytest.raises(OSError, match=re.escape(f"{folder}") + ".*; .*choose another"):
                act()
    assert (tmp_path / "file").read_text() == "here"
    with store.lock():
        shutil.rmtree(store.folder)
        with pytest.raises(FileNotFoundError, match=f"{name(3)}: not written.*folder is gone"):
            store.save(3, tensors(3), {})


def test_check_says_before_the_work_what_would_fail_after_it(tmp_path, monkeypatch):
    store = Store(tmp_path / "new" / "run", keep=2)
    store.check(size=1000)
    assert [p.name for p in store.folder.iterdir()] == [".lock"]
    with pytest.raises(OSError, match=r"4 states of [\d,.]+ MB need .* are free; make room"):
        store.check(size=shutil.disk_usage(tmp_path).free)
    with monkeypatch.context() as patch:
        failing(patch, "open", 1, errno.EROFS)  # the lock is there, nothing else can be
        with pytest.raises(OSError, match="not written: Read-only file system; allow writing"):
            store.check()


def test_a_removal_that_fails_is_told_and_harms_nothing(store, monkeypatch):
    store.keep = 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no")))
        patch.setattr(Path, "unlink", lambda *_, **__: os.unlink())
        with pytest.warns(UserWarning, match="not removed: no") as caught:
            store.save(3, tensors(3), {"step": 3})
    assert [Path(str(c.message).partition(":")[0]).name for c in caught] == [name(1), name(2)]
    has(store.folder, 1, 2, 3)
    store.save(4, tensors(4), {"step": 4})
    has(store.folder, 4)


def damaged(store, raw, says=""):
    """With these bytes in place of the newest state, the one before it is used."""
    (store.folder / name(2)).write_bytes(raw)
    path = re.escape(str(store.folder / name(2)))
    with pytest.warns(UserWarning, match=f"{path}: {says}.*Used in its place: {name(1)}") as caught:
        found, record = store.load()
    assert len(caught) == 1 and record == {"step": 1} and same(found, tensors(1))


def test_every_truncation_is_found(store):
    raw = (store.folder / name(2)).read_bytes()
    for length in range(len(raw)):
        damaged(store, raw[:length], "(truncated|carries no checksum)")
    damaged(store, raw + b"\0", "truncated")


def test_every_changed_byte_is_found(store):
    raw = (store.folder / name(2)).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in range(len(raw)):
        change = int(torch.randint(1, 256, (), generator=generator))
        damaged(store, raw[:place] + bytes([raw[place] ^ change]) + raw[place + 1 :])
    for begin in range(0, len(raw) - 64, 16):  # a block that never reached the disk
        damaged(store, raw[:begin] + bytes(64) + raw[begin + 64 :])


def test_files_of_others_are_found(store, tmp_path):
    save_file(tensors(9), tmp_path / "foreign", {"record": '{"step": 2}'})
    write_tensors(tmp_path / "weights", tensors(9))
    damaged(store, b"")
    damaged(store, b"\x80\x04 a pickle")
    damaged(store, (tmp_path / "foreign").read_bytes(), "carries no checksum")
    damaged(store, (tmp_path / "weights").read_bytes(), "holds no state of a run")
    (store.folder / name(2)).unlink()
    (store.folder / name(2)).mkdir()
    with pytest.warns(UserWarning, match=f"{name(2)}: missing"):
        assert store.load()[1] == {"step": 1}


def test_with_none_whole_all_are_named(store):
    (store.folder / name(1)).write_bytes(b"")
    (store.folder / name(2)).write_bytes((store.folder / name(2)).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"no state is whole: .*{name(2)}: trunc.*{name(1)}: carr"):
        store.load()
    assert store.exists()  # so that no run is started over them
    store.save(2, tensors(2), {"step": 2})
    with warnings.catch_warnings(action="error"):
        assert store.load()[1] == {"step": 2}


def test_a_step_made_again_after_damage_is_the_one_loaded(store):
    store.keep = 1
    store.save(5, tensors(5), {"step": 5}, score=1.0)
    store.save(9, tensors(9), {"step": 9})
    (store.folder / name(9)).write_bytes(b"")
    store.save(7, tensors(7), {"step": 7})
    with pytest.warns(UserWarning, match=name(9)):
        assert store.load()[1] == {"step": 7}


@contextlib.contextmanager
def child(work):
    """A process that does some work, says so, and stays; killed at the end."""
    said, says = fork.Pipe(duplex=False)

    def run():
        with work():
            says.send(os.getpid())
            time.sleep(60)

    process = fork.Process(target=run, daemon=True)
    process.start()
    assert said.poll(20)
    said.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_two_processes_do_not_write_to_one_folder(store):
    with child(store.lock) as process:
        message = re.escape(f"{store.folder}: another run (pid {process.pid} on ")
        for act in (lambda: store.save(3, {}, {}), store.check, lambda: store.lock().__enter__()):
            with pytest.raises(BlockingIOError, match=message):
                act()
        assert store.load()[1] == {"step": 2}  # reading is free
    store.save(3, tensors(3), {"step": 3})
    with store.lock(), store.lock():
        store.save(4, tensors(4), {"step": 4})
        with pytest.raises(BlockingIOError, match=f"pid {os.getpid()} "):
            Store(store.folder).save(5, {}, {})
    has(store.folder, 2, 3, 4)


def test_a_worker_does_not_hold_what_its_dead_parent_held(store):
    orphans, tells = fork.Pipe(duplex=False)

    @contextlib.contextmanager
    def work():
        with store.lock():
            if (pid := os.fork()) == 0:
                time.sleep(60)
                os._exit(0)
            tells.send(pid)
            yield

    with child(work):
        orphan = orphans.recv()
    try:
        os.kill(orphan, 0)  # lives
        store.check()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_workers_child_closes_nothing_of_its_own(store):
    with store.lock():
        if (pid := os.fork()) == 0:
            taken = os.open(os.devnull, os.O_RDONLY)  # the number that was the lock's
            if (pid := os.fork()) == 0:
                os.fstat(taken)
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_the_dead_leave_unfinished_is_removed_and_the_living_left_alone(store):
    @contextlib.contextmanager
    def work():
        with files.replacing(store.folder / name(3), 100) as file:
            os.write(file, b"half")
            yield

    def unfinished():
        return list(store.folder.glob(".state*.tmp"))

    with child(work):
        store.save(4, tensors(4), {"step": 4})
        assert len(unfinished()) == 1
    assert len(unfinished()) == 1
    with child(work):
        assert len(unfinished()) == 1  # another in the place of the dead one's
    (mine := store.folder / ".notes.tmp").write_text("no temporary file of the store's")
    store.check()
    assert not unfinished() and mine.exists()


def test_a_file_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = files.fcntl.flock, []

    def late(file, how):
        if not swept:
            (path,) = tmp_path.glob(".a.*.tmp")
            held = os.open(path, os.O_WRONLY)
            lock(held, how)
            swept.append(path)
            threading.Timer(0.05, lambda: (path.unlink(), os.close(held))).start()
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write_bytes(tmp_path / "a", b"whole")
    assert swept and (tmp_path / "a").read_bytes() == b"whole"


def test_a_sweep_never_takes_a_living_writers_file(tmp_path):
    stop = threading.Event()

    def sweep():
        while not stop.is_set():
            files.sweep(tmp_path)

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for i in range(100):
            write_bytes(tmp_path / "a", b"%d" % i)
            assert (tmp_path / "a").read_bytes() == b"%d" % i
    finally:
        stop.set()
        for sweeper in sweepers:
            sweeper.join()
