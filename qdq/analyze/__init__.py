"""Sensitivity of every layer, and which layers to leave in float.

A unit is a layer or a group of layers. Every unit is measured in one of two modes. Then units go to float until a
target is met.

- "one-at-a-time": only this unit is in int8, everything else is in float. The SQNR measures the error of this unit.
  Errors of different layers add up, so the ranking holds for sets of layers too.
- "leave-one-out": only this unit is in float, everything else is in int8. The SQNR shows what one more float layer
  would gain in the current state. After every step the remaining units are measured again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qdq.accuracy.bias import expecting_correction
from qdq.analyze.cost import LayerCost, SwitchCost, estimate_times, load_times, trace_costs
from qdq.analyze.fingerprint import fingerprint_analysis
from qdq.analyze.gradients import require_gradients
from qdq.analyze.journal import Journal
from qdq.analyze.options import MODES, Metric, Options
from qdq.analyze.probe import Probe
from qdq.analyze.ranks import Ranks
from qdq.analyze.replay import CACHE_BYTES, Replay
from qdq.analyze.result import Analysis, LayerSensitivity, MixedPoint, Step
from qdq.analyze.search import Search
from qdq.analyze.sensitivity import require_labels
from qdq.batch import list_filled_batches
from qdq.corrections import redoing_passes
from qdq.device import without_tf32
from qdq.formats import require_precisions
from qdq.forward import require_model
from qdq.outputs import Mask, OutputView, Selection
from qdq.patterns import Pattern
from qdq.plan import Plan
from qdq.quantizer import disable_until_exit
from qdq.units import (
    Unit,
    disable_idle,
    find_units,
    group_units,
    match_precisions,
    require_formats_of,
)
from qdq.work import list_unknown_work

__all__ = [
    "MODES",
    "Analysis",
    "LayerSensitivity",
    "MixedPoint",
    "Step",
    "analyze_layers",
    "check_options",
]


@without_tf32()
def analyze_layers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "one-at-a-time",
    metric: str | Metric | None = None,
    higher_is_better: bool | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
    weights: Mapping[str, float] | None = None,
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
    corrects_bias: bool = False,
    path: Path | str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Analysis:
    """Rank the layers by their sensitivity, and leave the worst in float until a target or a limit is reached.

    The chosen layers are disabled in the model, together with the quantizers that exist only for them. If biases were
    corrected or weights rounded before, the search runs without that, and both are done again for its choice; nothing
    else in the model changes. Under torchrun the processes divide the work, and all return the same result. On a GPU,
    the model runs without TF32, whose error is as large as one of int8.

    Args:
        model: A calibrated model. Layers that are disabled already stay disabled and are not ranked.
        batches: Iterated once and kept in memory; see `forward.call_model`. "top1" needs `(images, labels)`.
        mode: "one-at-a-time" or "leave-one-out", see the module.
        metric: The metric that ranks: "sqnr" (the default), "cosine", "kl" (of the softmax, in nats) or "top1" of the
            outputs, or a function `model -> float`, which is called once for each state.
        higher_is_better: Direction of a function; True by default. The other metrics have a fixed direction.
        outputs: Parts of the outputs to measure, as for `predictor.predict`; None for all. "kl" and "top1" take the
            first.
        mask: What leaves padding out, as for `predictor.predict`.
        weights: Name -> weight of each output that counts, for the mean of their noise relative to their signal. None:
            the worst output counts. Outputs of other scales are never added up.
        groups: Layers that are left in float together: None (each layer by itself), "block", "shared" (layers whose
            inputs have one range) or patterns, each of which makes a group.
        pinned: Layer, or pattern of layers -> "float", or the format that it has, "int8" or "fp8": already decided, so
            neither ranked nor changed. Or the plan of an earlier analysis. An exact name takes precedence over
            patterns.
        confirm: Rank by an estimate, which costs one to two evaluations, and measure only this many units exactly.
            None measures all of fewer than 200 units; from 200 units on it measures 32, or twice `max_float_layers`
            if that is more, as the time of the exact analysis grows with their square.
        target_sqnr: Stop when the SQNR reaches this many dB.
        target_metric: Stop when the metric reaches this value.
        target_drop: Stop when the metric is at most this much worse than that of the float model.
        max_float_layers: Upper limit on the layers left in float, not counting pinned and already-float layers;
            0 only ranks.
        max_float_share: Upper limit on the fraction of MACs left in float (0 to 1), counting pinned and already-float
            layers. None: the search may move at most 10 % of the int8 MACs to float, whatever is in float already;
            1 lifts that. The result says if the limit kept a layer in int8.
        budget: Seconds. Only the first evaluation may begin after that. Units that are not measured by then have no
            gain and are listed in `unmeasured`; a step that is not finished by then is not taken. The ranking gets 3/4
            of the budget if layers may be left in float.
        gpu: Weigh the gain against the time of a layer on this GPU ("a100", "orin" ...; `qdq.roofline.GPUS`).
        profile: Like `gpu`, with times measured in an engine: JSON of trtexec `--exportProfile`.
        corrects_bias: Measure with analytically corrected biases, because `correct_bias` will follow: a shift of the
            mean that it takes back is no reason to leave a layer in float. The model gets its biases back; the targets
            are for the model with corrected ones.
        path: File to which every measurement is appended; an interrupted analysis continues from it.
        cache_bytes: Limit on activations and quantized weights in memory; activations beyond it go to temporary files.
            For a model on a GPU, it is the limit in the memory of the GPU; as much again may go to that of the host
            before files are written, and each is filled up to half of what is free.

    Returns:
        The ranking, the steps taken and the reason why the search ended.

    Raises:
        ArgumentError: An unknown name, a target for a metric that is not given, a number out of range, options that
            contradict each other, a pattern that matches nothing, a layer pinned to another format than it has, outputs
            that do not exist, or a file that cannot be written.
        DataError: No batch, "top1" without labels, or a file that is not a profile.
        StateError: No layer is quantized, a layer has no amax, the outputs contain NaN, or a metric function does not
            return a number; `confirm` is used in `torch.inference_mode` or with a model that was created there.
    """
    require_model(model)
    if confirm is not None:
        require_gradients(model)
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
        view=OutputView(outputs, mask, weights),
    )
    earlier_plan = None
    precisions: Mapping[str, str] = {}
    if isinstance(pinned, Plan):
        earlier_plan = pinned
        precisions = pinned.precisions
    elif pinned is not None:
        precisions = pinned
    require_precisions(precisions)
    samples = list_filled_batches(batches)
    metric_used = options.chosen_metric
    require_labels(metric_used.outputs, samples[0])
    start = time.monotonic()

    with (
        redoing_passes(model),
        ExitStack() as fitting,
        ExitStack() as undo,
    ):  # an interrupted search leaves the model as it was
        trace, costs = trace_costs(model, samples[0])
        all_units = find_units(model, samples[0], trace)
        free_units, decided = _pin(model, all_units, precisions, undo)
        units = group_units(model, free_units, groups)
        times = _find_times(model, costs, options, units)
        with Ranks() as ranks:
            fingerprint = ""
            if path is not None:  # it reads all weights and data, which only a file needs
                measured = metric_used.name + metric_used.view.describe()
                if corrects_bias:
                    measured += ", biases corrected"
                fingerprint = fingerprint_analysis(model, trace, samples, measured, units)
            biases = ""
            if (
                corrects_bias
            ):  # another machine rounds them differently, so the fingerprint is that of before
                biases = fitting.enter_context(expecting_correction(model, samples, options.view))
            journal = Journal(None if path is None else Path(path), fingerprint, ranks)
            replay = Replay(model, cache_bytes=cache_bytes)
            probe = Probe(model, samples, metric_used, journal, ranks, replay)
            search = Search(model, probe, units, options, costs, times, decided, start)
            analysis = search.run(undo, earlier_plan)
            idle = tuple(disable_idle(model, trace, undo)) if analysis.float_layers else ()
            analysis = replace(
                analysis,
                unknown_work=list_unknown_work(trace),
                idle=idle,
                fp8=_list_fp8_layers(all_units),
                biases=biases,
            )
            journal.close()
        undo.pop_all()
    return analysis


def check_options(**options: Any) -> None:
    """Refuse invalid arguments of `analyze_layers` before the work that precedes it.

    Args:
        **options: The fields of `Options`, which have the same names in `analyze_layers`.

    Raises:
        ArgumentError: As for `analyze_layers`; patterns that match nothing are found only with the model.
        DataError: The profile cannot be read.
    """
    Options(**options)


def _list_fp8_layers(units: list[Unit]) -> frozenset[str]:
    """The layers and calls whose quantizers are FP8."""
    names: set[str] = set()
    for unit in units:
        if unit.quantizers[0].format.is_float:
            names.update(unit.layers)
    return frozenset(names)


def _pin(
    model: nn.Module, units: list[Unit], pinned: Mapping[str, str], undo: ExitStack
) -> tuple[list[Unit], dict[str, str]]:
    """Switch off the layers that are pinned to float.

    Args:
        model: The model.
        units: All units, each a single layer or call.
        pinned: Layer, or pattern of layers -> "int8", "fp8" or "float".
        undo: Switches the layers on again when it is closed.

    Returns:
        The units that are not pinned, and the precision of each layer that is.

    Raises:
        ArgumentError: A layer is pinned to another format than it has.
    """
    decided = match_precisions(model, [unit.name for unit in units], pinned)
    require_formats_of(decided, {unit.name: unit.quantizers for unit in units})
    for unit in units:
        if decided.get(unit.name) == "float":
            disable_until_exit(unit.quantizers, undo)
    free_units = [unit for unit in units if unit.name not in decided]
    return free_units, decided


def _find_times(
    model: nn.Module, costs: dict[str, LayerCost], options: Options, units: list[Unit]
) -> dict[str, SwitchCost]:
    """Times of the layers, measured or estimated.

    Args:
        model: The model.
        costs: Costs of the layers, for an estimate.
        options: The GPU or the profile.
        units: The units to rank.

    Returns:
        Dotted name -> time in int8 and in fp16; empty if neither `gpu` nor `profile` is given.
    """
    if options.profile is not None:
        names = [name for unit in units for name in unit.layers]
        return load_times(Path(options.profile), names, dict(model.named_modules()))
    if options.gpu is not None:
        return estimate_times(costs, options.gpu)
    return {}
