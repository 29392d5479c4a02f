"""The gate: an op that is wrong in any case, by the rule of `fastdiff.verify`, is not timed."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fastdiff.op import Op
from fastdiff.verify import fault


def refused(ops: Iterable[Op], timed: Collection[str], device: str) -> dict[str, str]:
    """By the name of each op that is wrong: in which case, and by how much.

    Every small case is run, and of the large ones those named "op/case" in `timed`.
    """
    wrong = {}
    for op in ops:
        for case in op.cases():
            if case.large and f"{op.name}/{case.name}" not in timed:
                continue
            try:
                complaint = fault(op, case, device)
            except Exception as error:  # a kernel that does not run is wrong, and others go on
                said = (str(error).splitlines() or [""])[0]
                complaint = f"{type(error).__name__} in case {case.name!r}: {said}"
            if complaint:
                wrong[op.name] = complaint
                break
    return wrong
