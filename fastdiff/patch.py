"""patch: what a user already has, made faster in place; unpatch: as it was.

An object changes its class to a subclass that does the same faster; whoever holds the object holds
the faster one, and all that it has (configuration, weights, hooks) stays.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from .engine.optimize import DTYPES, MEMORY
from .errors import one_of
from .inplace import OPTIONS, Fast, fast_class, fast_parts, faster_parts

# releases of diffusers that the tests have run with
DIFFUSERS = ("0.42",)


def patch(
    *objects: Any, dtype: str | None = None, memory: str = "high", bug_compatible: bool = False
) -> Any:
    """Make pipelines, schedulers and U-Nets faster, in place, with the same results.

        >>> fastdiff.patch(pipe)  # doctest: +SKIP
        >>> pipe("a photo of a cat")  # doctest: +SKIP

    A pipeline of diffusers gets our scheduler for its DDIM, DDPM or DPM-Solver++ one (another is
    kept, with a warning) and its U-Net runs in `fastdiff.optimize`'s engine wherever no gradient
    is recorded. Weights that change, adapters and attention processors are noticed at the next
    call. What is patched is saved, copied and pickled as what it was.

    Args:
        objects: pipelines, schedulers or nn.Modules.
        dtype, memory: of the engine, as for `optimize`.
        bug_compatible: reproduce what diffusers' schedulers get wrong
            (`fastdiff.integrations.diffusers.DDIMScheduler`'s documentation lists it).

    Returns:
        The object, or a tuple of several.

    Raises:
        TypeError: an object is none of these, or a scheduler is one we do not have.
        ValueError: a scheduler's configuration has an option that we do not support; names it.
            Nothing is changed then.
    """
    if dtype is not None:
        one_of("dtype", dtype, DTYPES)
    one_of("memory", memory, MEMORY)
    found = []
    for i, thing in enumerate(objects):
        _warn_of_version(thing)
        for part in _parts(f"objects[{i}]", thing):
            if part is thing or isinstance(part, nn.Module) or _known(part):
                found.append(part)
                continue
            warnings.warn(
                f"scheduler: fastdiff has none for {type(part).__name__}, which stays; it has "
                f"{', '.join(cls.__name__ for cls in _schedulers())}",
                stacklevel=2,
            )
    classes = [_faster(part) for part in found]
    for part, cls in zip(found, classes, strict=True):
        part.__dict__[OPTIONS] = {"dtype": dtype, "memory": memory}
        part.__class__ = cls
        if isinstance(part, nn.Module):
            for inner, faster in faster_parts(part):
                inner.__class__ = faster
        else:
            part.bug_compatible = bug_compatible
            part._forget()
    return objects[0] if len(objects) == 1 else objects


def unpatch(*objects: Any) -> Any:
    """Put back what `patch` changed, in place; an object that is not patched stays as it is."""
    for i, thing in enumerate(objects):
        for part in _parts(f"objects[{i}]", thing):
            if part.__dict__.pop(OPTIONS, None) is None:
                continue
            for name in getattr(part, "OWN", ()):
                part.__dict__.pop(name, None)
            for inner in fast_parts(part) if isinstance(part, nn.Module) else [part]:
                inner.__class__ = type(inner).__bases__[-1]
    return objects[0] if len(objects) == 1 else objects


def _parts(name: str, thing: Any) -> Iterator[Any]:
    """The schedulers and networks of an object."""
    diffusers = sys.modules.get("diffusers")
    if diffusers is not None and isinstance(thing, diffusers.DiffusionPipeline):
        parts = (getattr(thing, name, None) for name in ("unet", "scheduler"))
        yield from (part for part in parts if part is not None)
    elif isinstance(thing, nn.Module) or hasattr(thing, "set_timesteps"):
        yield thing
    else:
        raise TypeError(
            f"{name}: is a {type(thing).__name__}, must be a diffusers pipeline or scheduler, or "
            "an nn.Module"
        )


def _schedulers() -> dict[type, type]:
    """Ours, by diffusers' class."""
    if "diffusers" not in sys.modules:
        return {}
    from .integrations.diffusers import schedulers

    ours = [getattr(schedulers, name) for name in schedulers.__all__]
    return {cls.__bases__[-1]: cls for cls in ours}


def _known(scheduler: Any) -> bool:
    ours = _schedulers()
    return type(scheduler) in (*ours, *ours.values())


def _faster(part: Any) -> type:
    """The class that a part is to have; raises where there is none."""
    cls: Any = type(part)
    if isinstance(part, nn.Module):
        return cls if issubclass(cls, Fast) else fast_class(cls)
    if not _known(part):
        takes = ", ".join(cls.__name__ for cls in _schedulers())
        raise TypeError(f"scheduler: is a {cls.__name__}, must be exactly one of {takes}")
    faster: Any = _schedulers().get(cls, cls)
    faster.check(part.config)
    return faster


def _warn_of_version(thing: Any) -> None:
    """Warn if a thing is of a release of diffusers that was not tested."""
    diffusers = sys.modules.get("diffusers")
    of_diffusers = any(cls.__module__.split(".")[0] == "diffusers" for cls in type(thing).__mro__)
    if diffusers is None or not of_diffusers or diffusers.__version__.startswith(DIFFUSERS):
        return
    warnings.warn(
        f"diffusers {diffusers.__version__}: fastdiff is tested with {', '.join(DIFFUSERS)}; "
        "compare an image with an unpatched pipeline's",
        stacklevel=3,
    )
