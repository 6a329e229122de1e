"""Options of a recipe's sensitivity analysis on the command line."""

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
    """Options of `analyze_layers` that the command line has.

    Args:
        max_float_layers: The analysis leaves at most this many layers in float.
        target_sqnr: Leave no more layers in float once the outputs reach this SQNR, in dB.
        mode: one-at-a-time measures a layer with only that layer in int8, leave-one-out with only that layer in float.
        rank_by: Metric that ranks the layers; top1 needs calibration samples with labels.
        groups: Layers that go to float together: block, shared (their inputs share one range), or patterns, each of
            which makes a group.
        confirm: Rank by an estimate, and measure only this many layers exactly. By default all, and of 200
            layers or more the first 32.
        target_metric: Leave no more layers in float once the metric reaches this value.
        target_drop: Leave no more layers in float once the metric is within this distance of the float model's.
        max_float_share: Upper limit on the fraction of MACs left in float (0 to 1), counting excluded and already-float
            layers.
        budget: Time limit of the analysis in seconds; layers that are not measured by then stay in int8.
        gpu: Rank by gain per microsecond on this GPU, and predict whether int8 or FP8 pays there: a10, a100, h100, l4,
            l40s, orin, orinnano, rtx3090, rtx4090, rtxpro6000 or t4. By default the prediction is that for the target.
        profile: Rank by gain per microsecond, with the times of an engine: the JSON file of trtexec --exportProfile.
    """

    max_float_layers: NonNegativeInt = 4
    target_sqnr: PositiveFloat | None = None
    mode: Literal["one-at-a-time", "leave-one-out"] = "one-at-a-time"
    rank_by: Literal["sqnr", "cosine", "kl", "top1"] = "sqnr"
    groups: tuple[str, ...] = ()
    confirm: NonNegativeInt | None = None
    target_metric: float | None = None
    target_drop: NonNegativeFloat | None = None
    max_float_share: NonNegativeFloat | None = None
    budget: PositiveFloat | None = None
    gpu: str | None = None
    profile: Path | None = None

    def check_labels(self, labels: Sequence[int] | None) -> None:
        """Refuse top1 if the calibration images have no labels, before any work.

        Raises:
            ArgumentError: There are no labels.
        """
        if self.rank_by == "top1" and labels is None:
            raise ArgumentError(
                "--rank-by top1 needs calibration samples with labels, and these have none.",
                "pass --data with a folder for each class, or use --rank-by kl, which needs none.",
            )

    def as_arguments(self) -> dict[str, Any]:
        """The arguments of `analyze_layers`, checked before any work.

        Raises:
            ArgumentError: An unknown GPU, a fraction above 1, a target without its metric, or options that contradict
                each other.
            DataError: The profile cannot be read.
        """
        from qdq.analyze import check_options

        arguments = dict(vars(self))
        groups = arguments.pop("groups")
        arguments["metric"] = arguments.pop("rank_by")
        try:
            check_options(**arguments)
        except ArgumentError as error:
            raise ArgumentError(_name_options(error.message), _name_options(error.fix)) from error
        return {**arguments, "groups": _choose_groups(groups)}


def _choose_groups(names: tuple[str, ...]) -> str | list[str] | None:
    """The argument `groups` of `analyze_layers`: a kind of group, a list of patterns, or None."""
    if names in (("block",), ("shared",)):
        return names[0]
    return list(names) or None


def _name_options(text: str) -> str:
    """A message of `analyze_layers` with the flags of the command line instead of the parameters."""
    for field in fields(AnalysisOptions):
        if "_" in field.name:  # the other names are also ordinary words
            text = text.replace(field.name, f"--{field.name.replace('_', '-')}")
    return text
