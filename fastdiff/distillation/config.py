"""How to distil: one frozen record for `distill`, the command line and the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.optimize import DTYPES
from ..errors import one_of
from ..record import Record


@dataclass(frozen=True)
class DistillConfig(Record):
    """What is distilled into what; how a stage is trained is `TrainConfig`'s to say.

    Attributes:
        start_steps: DDIM steps of the teacher. The first student takes half of them.
        end_steps: steps of the last student; start_steps must be 2, 4, 8, ... times as many.
        guidance: weight w of the guided teacher that is distilled, so that a student's step is one
            evaluation; not given, the teacher is distilled without guidance.
        guidance_max: give the students the weight as an input, from 0 to this, in place of one
            weight (Meng et al. 2022).
        updates: training steps of each stage, in their order; a stage that is not listed has
            TrainConfig's.
        lrs: peak learning rates of the stages, likewise.
        engine: what the teacher's network is computed in: "float32", "bfloat16", or "off" for the
            network as it is.
        report_images: held-out images that a stage is reported on; 0 makes no report.
    """

    start_steps: int = 64
    end_steps: int = 4
    guidance: float | None = None
    guidance_max: float | None = None
    updates: tuple[int, ...] = ()
    lrs: tuple[float, ...] = ()
    engine: str = "bfloat16"
    report_images: int = 1000

    @property
    def stages(self) -> tuple[int, ...]:
        """Steps of each student: half of start_steps, a quarter, ..., end_steps."""
        count = (self.start_steps // self.end_steps).bit_length() - 1
        return tuple(self.start_steps >> k for k in range(1, count + 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("engine", self.engine, (*DTYPES, "off"))
        for name in ("start_steps", "end_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        ratio, rest = divmod(self.start_steps, self.end_steps)
        if rest or ratio < 2 or ratio & (ratio - 1):
            fits = ", ".join(str(self.end_steps << k) for k in range(1, 7))
            raise ValueError(
                f"start_steps={self.start_steps}: must halve down to end_steps={self.end_steps}, "
                f"so it must be one of {fits}, ..."
            )
        if self.guidance is not None and self.guidance_max is not None:
            raise ValueError(
                f"guidance={self.guidance}, guidance_max={self.guidance_max}: give one weight, or "
                "the range that students take as an input, not both"
            )
        if self.guidance_max is not None and not self.guidance_max > 0:
            raise ValueError(f"guidance_max={self.guidance_max}: must be greater than 0")
        for name in ("updates", "lrs"):
            values = getattr(self, name)
            if len(values) > len(self.stages) or not all(value > 0 for value in values):
                raise ValueError(
                    f"{name}={values}: must be positive, at most one for each of the stages "
                    f"{self.stages}"
                )
        if self.report_images < 0:
            raise ValueError(f"report_images={self.report_images}: must be 0 or more")
