"""The states of a run: several generations, each a file that tells when it is damaged."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import explain, make_folder, read_tensors, sweep, write_bytes, write_tensors

LOCK = ".lock"


class Store:
    """Saves states of a run in a folder, and gives back the newest that is whole.

    A state is one file, `state-<step>.safetensors`: the tensors, and in its metadata the record
    and a checksum of every byte. It takes its name once it is on the disk, and only then are
    older ones removed: a process or machine that dies at any moment leaves the newest state or
    the one before it.

    Args:
        folder: where the states are; made when the first is saved.
        keep: how many of the newest states stay, beside the one with the best score.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(self, folder: str | Path, keep: int = 3) -> None:
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep={keep!r}: must be an int of 1 or more")
        self.folder, self.keep = Path(folder), keep
        self._locked = False

    def exists(self) -> bool:
        """Whether the folder holds states, be they damaged."""
        return bool(self._states())

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        score: float | None = None,
    ) -> Path:
        """Write the state of a step, then remove those that are no longer to be kept.

        Args:
            step: orders the states, 0 or more; that of an older file replaces it.
            tensors: on any device; streamed to the disk, so that no second copy is made.
            record: what else there is to know; JSON values.
            score: the lowest is the best; None or a number that is not finite is no score.

        Raises:
            OSError: it cannot be written; says why and what to do. Older states are whole.
            BlockingIOError: another process writes to the folder.
        """
        if type(step) is not int or step < 0:
            raise ValueError(f"step={step!r}: must be an int of 0 or more")
        if score is not None and not math.isfinite(score):
            score = None
        metadata = {"score": json.dumps(score), "record": json.dumps(record)}
        path = self.folder / f"state-{step:09d}.safetensors"
        with self.lock():
            write_tensors(path, tensors, metadata)
            self._remove_old(path)
        return path

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and record of the newest whole state; warns of damaged ones, by name.

        Raises:
            FileNotFoundError: there are no states.
            ValueError: all are damaged.
        """
        damaged: list[str] = []
        for path in reversed(self._states()):
            try:
                tensors, metadata = read_tensors(path, stamped=True)
                if "record" not in metadata:
                    raise ValueError(f"{path}: holds no state of a run")
            except (ValueError, OSError) as error:
                damaged.append(str(error))
                continue
            for complaint in damaged:
                warnings.warn(f"{complaint}. Used in its place: {path.name}", stacklevel=2)
            return tensors, json.loads(metadata["record"])
        if damaged:
            raise ValueError("no state is whole: " + "; ".join(damaged))
        raise FileNotFoundError(f"{self.folder}: holds no state of a run")

    def check(self, size: int = 0) -> None:
        """Raise unless states can be written here; call it before the work that makes them.

        Args:
            size: bytes of a state; there must be room for all that are kept, and one more.

        Raises:
            OSError: the folder cannot be made or written, or lacks the room.
            BlockingIOError: another process writes to the folder.
        """
        with self.lock():
            probe = self.folder / ".writable"
            write_bytes(probe, b"")
            probe.unlink()
            held = sum(path.stat().st_size for path in self._states())
            needed, free = (self.keep + 2) * size - held, shutil.disk_usage(self.folder).free
            if size and needed > free:
                raise OSError(
                    f"{self.folder}: {self.keep + 2} states of {size / 1e6:,.1f} MB need "
                    f"{needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, keep fewer "
                    "or choose another folder"
                )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process alone; the system lets go of it when the process dies.

        `save` and `check` hold it by themselves for as long as they take: a run holds it from its
        beginning to its end.

        Raises:
            BlockingIOError: another process holds it.
        """
        if self._locked:
            yield
            return
        file = self._open_lock()
        try:
            _HELD.add(file)
            self._locked = True
            sweep(self.folder)
            yield
        finally:
            self._locked = False
            _HELD.discard(file)
            os.close(file)

    def _open_lock(self) -> int:
        path = self.folder / LOCK
        make_folder(self.folder)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            explain(self.folder, 0, error)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            raise BlockingIOError(
                f"{self.folder}: another run ({holder or 'unknown'}) writes here; "
                "wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{path}: cannot be locked ({error.strerror}): see that no other run writes here",
                stacklevel=4,
            )
        with suppress(OSError):  # who holds it is said for people; a full disk may lack room
            os.ftruncate(file, 0)
            os.write(file, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        return file

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))

    def _remove_old(self, newest: Path) -> None:
        # later steps than the newest are damaged, or they would have been loaded: load warns of
        # them until they are overwritten
        states = [path for path in self._states() if path <= newest]
        scores = {path: score for path in states if (score := _score(path)) is not None}
        best = min(reversed(scores), key=scores.__getitem__, default=newest)
        for path in states[: -self.keep]:
            if path != best:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    warnings.warn(f"{path}: not removed: {error.strerror}", stacklevel=3)


def _score(path: Path) -> float | None:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["score"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


# a forked child (a data loader's worker) must not hold on to what its dead parent held
_HELD: set[int] = set()


def _let_go() -> None:
    while _HELD:  # once: the numbers are soon those of other files
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)
