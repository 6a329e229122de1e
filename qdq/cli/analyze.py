"""How a recipe's sensitivity analysis ranks and chooses, as options of its command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveFloat

from qdq.errors import ArgumentError


@Parameter(name="*")  # --mode, not --analysis-options.mode
@dataclass(frozen=True)
class AnalysisOptions:
    """Options of `analyze_layers` that a command line can say.

    Args:
        max_float_layers: At most so many layers are left in float by the analysis.
        target_sqnr: Leave no more in float once the outputs reach this SQNR in dB.
        mode: A layer is measured with only it in int8, or with only it in float.
        metric: What ranks the layers; top1 needs calibration images with labels.
        groups: Left in float together: block, shared (one range at their inputs), or patterns that each make a group.
        confirm: Rank by an estimate, and measure only so many layers exactly; all if left out.
        target_metric: Leave no more in float once the metric reaches this value.
        target_drop: Leave no more in float once the metric is worse than the float model's by no more than this.
        max_float_share: At most this share of all multiplications is in float, 0 to 1, excluded layers included.
        budget: Seconds; what the analysis has not measured by then stays in int8.
        gpu: Choose by gain for each microsecond on this GPU: a10, a100, h100, l4, l40s, orin, rtx3090, rtx4090, t4.
        profile: Likewise by times of an engine, the JSON that trtexec exports as its profile.
    """

    max_float_layers: NonNegativeInt = 4
    target_sqnr: PositiveFloat | None = None
    mode: Literal["one-at-a-time", "leave-one-out"] = "one-at-a-time"
    metric: Literal["sqnr", "cosine", "kl", "top1"] = "sqnr"
    groups: tuple[str, ...] = ()
    confirm: NonNegativeInt | None = None
    target_metric: float | None = None
    target_drop: NonNegativeFloat | None = None
    max_float_share: NonNegativeFloat | None = None
    budget: PositiveFloat | None = None
    gpu: str | None = None
    profile: Path | None = None

    def check_labels(self, labels: Sequence[int] | None) -> None:
        """Refuse top1 where the calibration images have no labels, before any work.

        Raises:
            ArgumentError: They have none.
        """
        if self.metric == "top1" and labels is None:
            raise ArgumentError(
                "--metric top1 needs calibration images with labels, and these have none.",
                "give --data-dir with a folder for each class, or use --metric kl, which needs none.",
            )

    def as_arguments(self) -> dict[str, Any]:
        """The arguments of `analyze_layers`, refused here, before any work, where they cannot be meant.

        Raises:
            ArgumentError: An unknown GPU, a share above 1, a target for a metric that is not given, or options that
                contradict each other.
            DataError: The profile cannot be read.
        """
        from qdq.analyze import check_options

        arguments = dict(vars(self))
        groups = arguments.pop("groups")
        try:
            check_options(**arguments)
        except ArgumentError as error:
            raise ArgumentError(_name_options(error.message), _name_options(error.fix)) from error
        return {
            **arguments,
            "groups": groups[0] if groups in (("block",), ("shared",)) else list(groups) or None,
        }


def _name_options(text: str) -> str:
    """A message of `analyze_layers` in the words of the command line."""
    for field in fields(AnalysisOptions):
        if "_" in field.name:  # the other names are words as well
            text = text.replace(field.name, f"--{field.name.replace('_', '-')}")
    return text
