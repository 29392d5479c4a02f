"""A large set of samples, drawn by any number of processes, that nothing can lose."""

from __future__ import annotations

import json
import time
import zlib
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .data.shards import Shards
from .draw import draw_batches
from .engine.remembered import read_choices
from .engine.tune import measured, recall
from .files import write_bytes
from .rollout import Model
from .sampler import Sampler
from .store import Store
from .table import ARRAYS
from .train.distributed import World

CHOICES = "engine.json"  # what the engine measured: another choice rounds otherwise


def checksum(network: nn.Module) -> str:
    """Of all its weights, with their names."""
    total = 0
    for name, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(plain.data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def fill(
    shards: Shards,
    network: Model,
    sampler: Sampler,
    labels: Tensor | None,
    guidance: float | None,
    seed: int,
    batch: int,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> int:
    """Draw all shards that are not there yet; returns how many images that were.

    With several processes (`fastdiff.train.distributed`), which see one folder, each draws its
    part. Image k is that of the stream (seed, k) and of label labels[k % len(labels)]: the shards
    are the same however many processes draw them, and however often they are stopped. Whole shards
    stay; a damaged one is drawn again. The last thing written is manifest.json.

    Args:
        shards: what is to be drawn, and where.
        network, sampler: what draws; the engine's choices are kept in the folder.
        labels: the classes, int64 [C], or captions' tokens [C, L], in turn; None for a network
            that is told nothing.
        guidance: weight w; None leaves it to the sampler's table.
        seed: of the noise.
        batch: images at a time.

    Raises:
        ValueError: the folder holds another set, or shards that the set does not have.
        BlockingIOError: another job writes to the folder.
        OSError: a file cannot be written; what is there stays, and the same call goes on.
    """
    world = World()
    leads = world.rank == 0
    with Store(shards.folder).lock() if leads else nullcontext():
        found: Any = None
        if leads:
            try:
                found = _begin(shards, progress)
            except (OSError, ValueError) as error:
                found = error
        found = world.share(found)  # what is wrong is known to the first process alone
        if isinstance(found, Exception):
            raise found
        missing, choices = found
        if choices is None:
            if leads:
                choices = _settle(shards, network, sampler, labels, guidance, batch, device)
            choices = world.share(choices)
        recall(choices)
        done = shards.num - sum(shards.span(k)[1] for k in missing)
        with tqdm(
            total=shards.num, initial=done, unit="image", disable=not (progress and leads)
        ) as bar:
            for k in tuple(missing[world.rank :: world.size]):
                _draw(shards, k, network, sampler, labels, guidance, seed, batch, device)
                missing = _shown(shards, missing, bar)
            while leads and missing:  # until the others have drawn theirs
                time.sleep(0.1)
                missing = _shown(shards, missing, bar)
            if leads:
                shards.finish()
    return shards.num - done


def _shown(shards: Shards, missing: list[int], bar: tqdm) -> list[int]:
    """Those that are missing still, once the bar says so."""
    left = [k for k in missing if not shards.path(k).is_file()]
    bar.update(shards.num - sum(shards.span(k)[1] for k in left) - bar.n)
    return left


def _begin(shards: Shards, progress: bool) -> tuple[list[int], Any]:
    """The shards that are missing, and the engine's choices if they are known."""
    shards.begin()
    if strangers := shards.strangers():
        raise ValueError(f"{strangers[0]}: the set has no such shard; remove it")
    missing = shards.problems(progress)
    for k, why in missing.items():
        if shards.path(k).exists():
            tqdm.write(f"{why}. It is drawn again")
            shards.path(k).unlink()
    path = shards.folder / CHOICES
    return list(missing), read_choices(path) if path.is_file() else None


def _settle(
    shards: Shards,
    network: Model,
    sampler: Sampler,
    labels: Tensor | None,
    guidance: float | None,
    batch: int,
    device: torch.device | str,
) -> Any:
    """The engine's choices of backends, measured once for the folder, at every size of a batch."""
    table = sampler.table
    row = Sampler(replace(table, **{name: getattr(table, name)[:1] for name in ARRAYS}))
    for count in {shards.span(k)[1] for k in (0, len(shards) - 1)}:
        for size in {min(batch, count), count % batch} - {0}:
            mine = _labels(labels, 0, size)
            deque(draw_batches(network, row, shards.shape, size, mine, guidance, device=device), 0)
    choices = measured()
    write_bytes(shards.folder / CHOICES, json.dumps(choices).encode())
    return choices


def _labels(labels: Tensor | None, first: int, count: int) -> Tensor | None:
    if labels is None:
        return None
    return labels[torch.arange(first, first + count) % len(labels)]


def _draw(
    shards: Shards,
    k: int,
    network: Model,
    sampler: Sampler,
    labels: Tensor | None,
    guidance: float | None,
    seed: int,
    batch: int,
    device: torch.device | str,
) -> None:
    first, count = shards.span(k)
    mine = _labels(labels, first, count)
    batches = draw_batches(
        network, sampler, shards.shape, count, mine, guidance, seed, batch, first, device
    )
    images = torch.cat(list(batches))
    shards.write(k, images, torch.zeros(count, dtype=torch.int64) if mine is None else mine)
