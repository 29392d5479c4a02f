"""Large sets of images as a folder of shards: files that are whole, and say what they belong to.

job.json              what the set is: how many images, of what shape, and of what they are made
shard-000000.safetensors, ...   images uint8 [n, C, H, W], labels int64 [n] or, of captions, their
                      tokens [n, L]; a checksum of all
manifest.json         the shards with their checksums; written when all are there
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from .. import errors
from ..files import explain, make_folder, read_tensors, stamp_of, write_bytes, write_tensors
from ..spacing import count, sizes

JOB, MANIFEST = "job.json", "manifest.json"
NAME = re.compile(r"shard-(\d{6,})\.safetensors")
FIELDS = {"num", "shape", "per_shard", "made_of"}


@dataclass(frozen=True)
class Shards:
    """A folder of shards, and what it is to hold.

    Attributes:
        folder: the folder.
        num: images in all.
        shape: (C, H, W) of an image.
        per_shard: images a shard; the last may have fewer.
        made_of: what decides the images: JSON values, in any order.
    """

    folder: Path
    num: int
    shape: tuple[int, int, int]
    per_shard: int
    made_of: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("num", "per_shard"):
            object.__setattr__(self, name, count(name, getattr(self, name), 1))
        shape = sizes("shape", self.shape)
        object.__setattr__(self, "shape", shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape={shape}: must be (C, H, W), each 1 or more")
        # as it is read again: of lists, not tuples
        object.__setattr__(self, "made_of", json.loads(json.dumps(self.made_of)))

    @classmethod
    def open(cls, folder: str | Path) -> Shards:
        """The shards of a folder.

        Raises:
            FileNotFoundError: it holds none.
            ValueError: what its job.json says cannot be.
        """
        folder = errors.path("folder", folder)
        path = folder / JOB
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; takes a folder of fastdiff sample --out DIR")
        try:
            record = json.loads(path.read_text())
            if not isinstance(record, dict) or record.keys() != FIELDS:
                raise ValueError(f"must be an object of {sorted(FIELDS)}")
            return cls(folder, **{**record, "shape": tuple(record["shape"])})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged, or no job of fastdiff's ({error})") from None

    def begin(self) -> None:
        """Write job.json, or see that the folder's is the same.

        Raises:
            ValueError: the folder holds other images; says in what they differ.
        """
        make_folder(self.folder)
        if not (self.folder / JOB).exists():
            if any(NAME.fullmatch(p.name) for p in self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder}: holds shards without {JOB}; choose another folder"
                )
            write_bytes(self.folder / JOB, self._job)
            return
        there = Shards.open(self.folder)
        if there != self:
            mine, theirs = self._facts(), there._facts()
            odd = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
            said = ", ".join(f"{k}={theirs.get(k)!r} (asked for {mine.get(k)!r})" for k in odd)
            raise ValueError(
                f"{self.folder}: holds images of another kind: {said}; "
                "ask for the same, or choose another folder"
            )

    def _facts(self) -> dict[str, Any]:
        own = {"num": self.num, "shape": self.shape, "per_shard": self.per_shard}
        return {**own, **self.made_of}

    @cached_property
    def _job(self) -> bytes:
        record = {
            "num": self.num,
            "shape": self.shape,
            "per_shard": self.per_shard,
            "made_of": self.made_of,
        }
        return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()

    @property
    def mark(self) -> str:
        """What a shard carries to show that it is one of these."""
        return f"{zlib.crc32(self._job):08x}"

    def __len__(self) -> int:
        """Shards in all."""
        return -(-self.num // self.per_shard)

    def path(self, k: int) -> Path:
        return self.folder / f"shard-{k:06d}.safetensors"

    def span(self, k: int) -> tuple[int, int]:
        """The first image of shard k, and how many it has."""
        first = k * self.per_shard
        return first, min(self.per_shard, self.num - first)

    def write(self, k: int, images: Tensor, labels: Tensor) -> str:
        """Write shard k, whole or not at all; returns its checksum."""
        tensors = {"images": images, "labels": labels}
        return write_tensors(
            self.path(k), tensors, {"set": self.mark, "first": str(self.span(k)[0])}
        )

    def read(self, k: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [n, C, H, W] and labels int64 [n] or [n, L] of shard k, checked.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is damaged, or of another set; says which.
        """
        path, (first, count) = self.path(k), self.span(k)
        tensors, metadata = read_tensors(path, stamped=True)
        if (metadata.get("set"), metadata.get("first")) != (self.mark, str(first)):
            raise ValueError(f"{path}: is of another set, or of another place in it; remove it")
        images, labels = tensors.get("images"), tensors.get("labels")
        if (
            images is None
            or labels is None
            or images.dtype != torch.uint8
            or labels.dtype != torch.int64
            or images.shape != (count, *self.shape)
            or labels.ndim not in (1, 2)
            or len(labels) != count
        ):
            found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
            raise ValueError(
                f"{path}: has {found}; must have images uint8 {(count, *self.shape)} and labels "
                f"int64 ({count},), or tokens ({count}, L)"
            )
        return images, labels

    def problems(self, progress: bool = False) -> dict[int, str]:
        """Why a shard is none, by its number: missing, damaged, or of another set.

        Raises:
            OSError: one is there and cannot be read, which says nothing of it.
        """
        found: dict[int, str] = {}
        for k in tqdm(range(len(self)), desc="shards", disable=not progress):
            try:
                self.read(k)
            except (FileNotFoundError, ValueError) as error:
                found[k] = str(error)
            except OSError as error:
                why = f"cannot be read ({error.strerror}); mend that, or remove the file"
                raise OSError(error.errno, why, str(self.path(k))) from None
        return found

    def strangers(self) -> list[Path]:
        """Shard files of numbers that the set does not have."""
        mine = {self.path(k) for k in range(len(self))}
        return sorted(p for p in self.folder.iterdir() if NAME.fullmatch(p.name) and p not in mine)

    def manifest(self) -> dict[str, Any]:
        """What manifest.json is to say of shards that are all there."""
        shards = {}
        for k in range(len(self)):
            first, count = self.span(k)
            stamp = stamp_of(self.path(k))
            shards[self.path(k).name] = {"first": first, "count": count, "checksum": stamp}
        return {"set": self.mark, "num": self.num, "shards": shards}

    def finish(self) -> None:
        """Write manifest.json: the set is whole."""
        text = json.dumps(self.manifest(), indent=1) + "\n"
        write_bytes(self.folder / MANIFEST, text.encode())


class ShardedImages(IterableDataset[tuple[Tensor, int | Tensor]]):
    """The images of a folder of shards, one by one: (uint8 [C, H, W], label), in order.

    A label is an int or, of captions, tokens int64 [L].

    Processes of torch.distributed, and a DataLoader's workers in each, take every so-many-th shard.
    A shard is in memory at a time.

    Args:
        folder: of `fastdiff sample --out DIR`.

    Raises:
        FileNotFoundError, ValueError: as `Shards.open`; while iterating as `Shards.read`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.shards = Shards.open(folder)

    def __iter__(self) -> Iterator[tuple[Tensor, int | Tensor]]:
        joined = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for k in range(rank * workers + mine, len(self.shards), size * workers):
            for image, label in zip(*self.shards.read(k), strict=True):
                yield image, label if label.ndim else int(label)

    def __len__(self) -> int:
        return self.shards.num


def export_png(folder: str | Path, out: str | Path, progress: bool = False) -> int:
    """Write every image of a folder of shards as out/000000000.png, ...; returns how many.

    Raises:
        ValueError: images of neither 1 nor 3 channels.
        FileNotFoundError, ValueError, OSError: as reading the shards, and writing.
    """
    shards, out = Shards.open(folder), Path(out)
    if shards.shape[0] not in (1, 3):
        raise ValueError(f"{folder}: has {shards.shape[0]} channels, PNG takes 1 or 3")
    make_folder(out)
    for k in tqdm(range(len(shards)), desc="shards", disable=not progress):
        images, _ = shards.read(k)
        for j, image in enumerate(images, shards.span(k)[0]):
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            path = out / f"{j:09d}.png"
            try:  # not one by one to the disk, which takes longer than to write them
                Image.fromarray(pixels.numpy()).save(path)
            except OSError as error:
                path.unlink(missing_ok=True)
                explain(path, 0, error)
    return shards.num
