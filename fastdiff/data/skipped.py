"""What could not be read: counted and named once, at the end; or an error at once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

SHOWN = 5


@dataclass
class Skipped:
    """The unreadable of `count` things of a source.

    Attributes:
        source: the folder or dataset, for messages.
        count: things in all.
        strict: the first unreadable thing is a ValueError.
        reasons: of those skipped, by name.
    """

    source: str
    count: int
    strict: bool = False
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        """One more, and why."""
        self.reasons[name] = (reason.splitlines() or ["unknown"])[0]
        if self.strict:
            raise ValueError(
                f"{self.source}: {name}: {self.reasons[name]}; mend or remove it, or leave out "
                "strict=True"
            )

    def report(self) -> None:
        """Warn of the skipped, if there are some; ValueError if nothing else is left."""
        if not self.reasons:
            return
        first = [f"{name} ({why})" for name, why in list(self.reasons.items())[:SHOWN]]
        more = len(self.reasons) - len(first)
        named = "; ".join(first) + (f"; and {more} more" if more else "")
        if len(self.reasons) == self.count:
            raise ValueError(f"{self.source}: no image could be read of {self.count}: {named}")
        warnings.warn(
            f"{self.source}: skipped {len(self.reasons)} of {self.count}: {named}", stacklevel=3
        )
