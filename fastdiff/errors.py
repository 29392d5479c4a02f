"""Checks shared by the public functions: every message names the argument and what it takes."""

import math
import os
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """What is refused within names the argument that the user gave, too."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _alike(a: object, b: object) -> bool:
    """False of an int beside True or 1.0, which equal it."""
    return type(a) is type(b) or not isinstance(b, bool | float | complex)


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    array = isinstance(value, Tensor) or not isinstance(value, Hashable)  # equal to nothing
    if array or not any(a == value and _alike(a, value) for a in allowed):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def is_a(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless `value` is of this class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: must be a {kind.__name__}, got {type(value).__name__}")


def is_callable(name: str, value: object) -> None:
    """Raise TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name}: must be callable, got {type(value).__name__}")


def is_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a torch.Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, got {type(value).__name__}")


def is_batch(name: str, value: object) -> None:
    """Raise unless `value` is a tensor [B, ...]."""
    is_tensor(name, value)
    assert isinstance(value, Tensor)
    if not value.dim():
        raise ValueError(f"{name}: has shape (), must be [B, ...]; unsqueeze it")


def number(name: str, value: object, infinite: bool = False) -> float:
    """The value as a float; raise unless it is a finite number, or, if that is allowed, inf."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name}: must be a number, got {type(value).__name__}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) or (infinite and found == math.inf)):
        raise ValueError(f"{name}={value}: must be finite")
    return found


def numbers(name: str, values: object, kinds: str = "iuf") -> NDArray[Any]:
    """The values as an array; raise TypeError unless numpy's kind of its numbers is one of these.

    By default integers and floats; "iu" is integers alone.
    """
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged; or a GPU's, or with a gradient
        raise TypeError(f"{name}: must be numbers, in the host's memory ({error})") from None
    if array.dtype.kind not in kinds and array.size:
        wanted = "a number or a list of numbers" if "f" in kinds else "a list of integers"
        got = f"{type(values).__name__} of {array.dtype}"
        raise TypeError(f"{name}: must be {wanted}, got {got}")
    return array


def path(name: str, value: object) -> Path:
    """The value as a path; raise TypeError unless it is a str or a path."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: must be a str or a path, got {type(value).__name__}")
    if value == "":
        raise ValueError(f"{name}='': must be a path; '.' is the folder one is in")
    return Path(value)


def is_pictures(name: str, value: object) -> None:
    """Raise unless `value` is a tensor of uint8 images [N, C, H, W]."""
    is_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype != torch.uint8 or value.dim() != 4:
        raise ValueError(
            f"{name}: are {value.dtype} {tuple(value.shape)}, must be uint8 [N, C, H, W]"
        )


def has_dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless the tensor's dtype is one of `allowed`."""
    if value.dtype not in allowed:
        takes = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: has dtype {got}, must be {takes}; convert it with .to()")


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `value` has the shape and device of `other`; nothing is broadcast."""
    is_tensor(name, value)
    if value.shape != other.shape:
        raise ValueError(
            f"{name}: has shape {tuple(value.shape)}, must be {tuple(other.shape)} as {other_name}"
        )
    on_device(name, value, other_name, other)


def on_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless `value` is on the device of `other`."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: is on {value.device}, {other_name} is on {other.device}; "
            f"move one with .to({str(other.device)!r})"
        )


def per_sample(
    name: str, value: Tensor, dtype: torch.dtype | None, other_name: str, other: Tensor
) -> None:
    """Raise unless `value` is a tensor [B], one entry a sample of `other` [B, ...].

    Its numbers are of `dtype`, or, if that is None, integers or floats of any size.
    """
    is_tensor(name, value)
    if dtype is not None:
        has_dtype(name, value, (dtype,))
    elif value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name}: has dtype {value.dtype}, must be integer or floating point")
    on_device(name, value, other_name, other)
    if value.shape != other.shape[:1]:
        raise ValueError(
            f"{name}: has shape {tuple(value.shape)}, must be ({len(other)},), one for each "
            f"sample of {other_name}"
        )


def in_range(name: str, value: Tensor, count: int) -> None:
    """Raise ValueError unless all of `value` is in [0, count); a GPU's is not read back."""
    if torch.compiler.is_compiling() or value.device.type != "cpu" or not value.numel():
        return
    low, high = (int(v) for v in value.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: spans {low} to {high}, must be within 0 and {count - 1}")


def no_gradient(**tensors: Tensor | None) -> None:
    """Raise RuntimeError if a gradient would be asked of an op that has none."""
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        if value is not None and value.requires_grad:
            raise RuntimeError(
                f"{name}: requires a gradient, this op is for inference; call it under "
                "torch.no_grad(), or use torch's own functions to train"
            )
