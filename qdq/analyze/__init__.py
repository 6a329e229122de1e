"""Sensitivity of every layer, and which ones to leave in float.

Every unit, a layer or a group of them, is measured in one of two modes; then units go to float until a target is met.

- "one-at-a-time": only this unit in int8, all others in float. The SQNR is that of its own error, and errors of
  different layers add up, so the ranking holds for sets of layers too.
- "leave-one-out": only this unit in float, all others in int8. What one more float layer would gain right now; after
  every step the others are measured anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.analyze.cost import LayerCost, SwitchCost, count_costs, estimate_times, load_times
from qdq.analyze.fingerprint import fingerprint_analysis
from qdq.analyze.journal import Journal
from qdq.analyze.options import MODES, Metric, Options
from qdq.analyze.probe import Probe
from qdq.analyze.ranks import Ranks
from qdq.analyze.replay import CACHE_BYTES, Replay
from qdq.analyze.result import Analysis, LayerSensitivity, MixedPoint, Step
from qdq.analyze.search import Search
from qdq.analyze.sensitivity import require_labels
from qdq.errors import ArgumentError, StateError
from qdq.forward import require_model
from qdq.patterns import Pattern
from qdq.plan import PRECISIONS, Plan
from qdq.quantizer import disable_until_exit
from qdq.samples import list_filled_batches
from qdq.units import Unit, find_units, group_units, match_precisions

__all__ = [
    "MODES",
    "Analysis",
    "LayerSensitivity",
    "MixedPoint",
    "Step",
    "analyze_layers",
    "check_options",
]


def analyze_layers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "one-at-a-time",
    metric: str | Metric | None = None,
    higher_is_better: bool | None = None,
    groups: str | Sequence[Pattern] | None = None,
    pinned: Mapping[str, str] | Plan | None = None,
    confirm: int | None = None,
    target_sqnr: float | None = None,
    target_metric: float | None = None,
    target_drop: float | None = None,
    max_float_layers: int = 0,
    max_float_share: float | None = None,
    budget: float | None = None,
    gpu: str | None = None,
    profile: Path | str | None = None,
    path: Path | str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Analysis:
    """Rank the layers by what they cost, and leave the worst in float until a target is met or enough are.

    Layers that are chosen are disabled in the model, with what exists only for them; nothing else about it changes.
    Under torchrun the processes share the work and all come to the same result.

    Args:
        model: A calibrated model. Layers that are disabled already stay so and are not ranked.
        batches: Iterated once and kept; see `trace.call_model`. "top1" needs `(images, labels)`.
        mode: "one-at-a-time" or "leave-one-out", see above.
        metric: What ranks: "sqnr" (as None), "cosine", "kl" (of the softmax, in nats) or "top1" of the outputs, or a
            function `model -> float`, which is called once for each state.
        higher_is_better: Direction of a function; True if not given. The others have their own.
        groups: What is left in float together: None (each layer by itself), "block", "shared" (layers whose inputs
            have one range) or patterns, each of which makes a group.
        pinned: Layer, or pattern of layers -> "int8" or "float": decided already, neither ranked nor changed. Or the
            plan of an earlier analysis. A name goes before patterns.
        confirm: Rank by an estimate for one to two evaluations, and measure only so many units exactly; None
            measures all.
        target_sqnr: Stop when the SQNR reaches this many dB.
        target_metric: Stop when the metric reaches this value.
        target_drop: Stop when the metric is worse than the float model's by no more than this.
        max_float_layers: At most so many layers are left in float, beyond those that are pinned or were in float
            before; 0 only ranks.
        max_float_share: At most this share of all multiplications of the model is in float, 0 to 1, what is pinned or
            was in float before included.
        budget: Seconds. Nothing but the first evaluation begins later: what is not measured by then has no gain and
            is in `unmeasured`, and a step that is not finished by then is not taken. The ranking has 3/4 of it where
            layers may be left in float.
        gpu: Weigh the gain against the time of a layer on this GPU ("a100", "orin" ...; `qdq.analyze.cost.GPUS`).
        profile: The same, with times of an engine: JSON of trtexec `--exportProfile`.
        path: File to which every measurement is appended; an analysis that was killed goes on from it.
        cache_bytes: Of activations and quantized weights in memory; activations beyond it wait in temporary files.

    Raises:
        ArgumentError: An unknown name, a target for a metric that is not given, a number out of range, options that
            contradict each other, a pattern that matches nothing, or a file that cannot be written.
        DataError: No batch, "top1" without labels, or a file that is no profile.
        StateError: No layer is quantized, one has no amax, the outputs hold NaN, or a function gives no number;
            `confirm` in `torch.inference_mode`, or with a model that was made there.
    """
    require_model(model)
    if confirm is not None:
        _require_gradients(model)
    options = Options(
        mode=mode,
        metric=metric,
        higher_is_better=higher_is_better,
        confirm=confirm,
        target_sqnr=target_sqnr,
        target_metric=target_metric,
        target_drop=target_drop,
        max_float_layers=max_float_layers,
        max_float_share=max_float_share,
        budget=budget,
        gpu=gpu,
        profile=profile,
    )
    earlier = pinned if isinstance(pinned, Plan) else None
    precisions = pinned.precisions if isinstance(pinned, Plan) else pinned or {}
    _require_precisions(precisions)
    kept = list_filled_batches(batches)
    chosen = options.chosen_metric
    require_labels(chosen.outputs, kept[0])
    began = time.monotonic()
    with ExitStack() as undo:  # an interrupted search leaves the model as it was
        units, fixed = _pin(model, find_units(model, kept[0]), precisions, undo)
        units = group_units(model, units, groups)
        costs = count_costs(model, kept[0]) if gpu or profile or max_float_share is not None else {}
        times = _estimate(model, costs, options, units)
        with Ranks() as ranks:
            fingerprint = fingerprint_analysis(model, kept, chosen.name, units)
            journal = Journal(None if path is None else Path(path), fingerprint, ranks)
            probe = Probe(
                model, kept, chosen, journal, ranks, Replay(model, cache_bytes=cache_bytes)
            )
            search = Search(model, probe, units, options, costs, times, fixed, began)
            analysis = search.run(undo, earlier)
            journal.close()
        undo.pop_all()
    return analysis


def _require_gradients(model: nn.Module) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors):
        raise StateError(
            "in torch.inference_mode there are no gradients, by which confirm estimates.",
            "make and analyze the model outside of it, or leave confirm out.",
        )


def check_options(**options: Any) -> None:
    """Refuse arguments of `analyze_layers` that cannot be meant, before the work that precedes it.

    Args:
        **options: Those of `Options`, by their names there and in `analyze_layers`.

    Raises:
        ArgumentError: As there; patterns that match nothing are seen only with the model.
        DataError: The profile cannot be read.
    """
    Options(**options)


def _require_precisions(pinned: Mapping[str, str]) -> None:
    for name, precision in pinned.items():
        if precision not in PRECISIONS:
            raise ArgumentError(f"{name} is pinned to {precision!r}.", "pin to 'int8' or 'float'.")


def _pin(
    model: nn.Module, units: list[Unit], pinned: Mapping[str, str], undo: ExitStack
) -> tuple[list[Unit], dict[str, str]]:
    """What is left to decide, and what is decided; float layers are switched off."""
    fixed = match_precisions(model, [unit.name for unit in units], pinned)
    for unit in units:
        if fixed.get(unit.name) == "float":
            disable_until_exit(unit.quantizers, undo)
    return [unit for unit in units if unit.name not in fixed], fixed


def _estimate(
    model: nn.Module, costs: dict[str, LayerCost], options: Options, units: list[Unit]
) -> dict[str, SwitchCost]:
    """Time of every layer in both types, if they are asked for."""
    if options.profile is not None:
        names = [name for unit in units for name in unit.layers]
        return load_times(Path(options.profile), names, dict(model.named_modules()))
    return estimate_times(costs, options.gpu) if options.gpu else {}
