"""Checks of a recipe's options before it runs the model; the pipeline would refuse them minutes later."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qdq.errors import ArgumentError, DependencyError
from qdq.formats import FLOAT, FP8, FP8_LEAST_SM, INT8

if TYPE_CHECKING:
    from torch import nn

    from qdq.plan import Plan
    from qdq.schedule import Schedule
    from qdq.workloads.workload import Workload

_EXTRA_MACS = 0.05
_PATIENCE = 2  # of about ten measurements


def check_layers(
    workload: Workload,
    *,
    exclude: Sequence[str] = (),
    plan: Plan | None = None,
    groups: str | Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    profile: Path | None = None,
    formats: Sequence[str] = (INT8,),
    sm: int | None = None,
) -> None:
    """Refuse patterns that cannot be compiled, and names of layers that the quantized model will not have.

    This needs no calibration. If the modules alone do not show whether a name exists, a copy of the model is swapped
    and rewired on two samples.

    Args:
        workload: The model and its data; it does not change.
        exclude: As for `swap_modules`; each pattern must match a module or a call.
        plan: As `pinned` of `analyze_layers`.
        groups: As for `analyze_layers`.
        layers: As for `finetune`.
        profile: As for `analyze_layers`.
        formats: As for `swap_modules`.
        sm: Compute capability of the target, 89 for 8.9; only formats that are chosen need it.

    Raises:
        ArgumentError: An invalid regular expression, a name that matches nothing, no layer left to train, or a format
            in the plan that the run or the target does not have.
        DataError: The profile belongs to another model.
    """
    from qdq.patterns import Patterns

    group_patterns: list[str] = []
    if groups is not None and not isinstance(groups, str):
        group_patterns = list(groups)
    precisions = {} if plan is None else plan.precisions
    options = {
        "exclude": exclude,
        "plan": list(precisions),
        "groups": group_patterns,
        "layers": layers or (),
    }
    for option, names in options.items():
        Patterns(names, option)  # refuses an invalid regular expression
    if layers is not None:
        _require_trainable(workload, layers, exclude)

    unmatched = _list_unmatched(exclude, dict(workload.module.named_modules()))
    if precisions or group_patterns or unmatched or profile is not None:
        pinned = _check_quantized_copy(
            workload, exclude, unmatched, precisions, group_patterns, profile, formats
        )
        _require_possible(pinned, formats, sm)


def _check_quantized_copy(
    workload: Workload,
    exclude: Sequence[str],
    unmatched: Sequence[str],
    precisions: Mapping[str, str],
    group_patterns: list[str],
    profile: Path | None,
    formats: Sequence[str],
) -> dict[str, str]:
    """Refuse names that a quantized copy of the model does not have; the precisions that the plan sets."""
    from qdq.analyze.cost import load_times
    from qdq.fold import fold_batchnorm
    from qdq.rewire import rewire_operations
    from qdq.seeds import seeded_rng
    from qdq.swap import swap_modules
    from qdq.units import Unit, find_all_quantizers, group_units, match_precisions

    model = copy.deepcopy(workload.module)
    example = workload.example
    with _silent(), seeded_rng(0):
        fold_batchnorm(model, example)
        swap_modules(model, example, exclude=exclude, formats=formats)
        rewired = rewire_operations(model, example, exclude=exclude, formats=formats)
        quantizer_names = list(find_all_quantizers(model, example))
    modules = dict(model.named_modules())
    calls = {operation.name: model for operation in rewired.operations}
    unmatched = _list_unmatched(unmatched, modules | calls)
    if unmatched:
        raise ArgumentError(
            f"the pattern {unmatched[0]!r} in exclude matches no module and no call of {workload.name}.",
            "correct it.",
        )

    pinned = match_precisions(model, quantizer_names, precisions)
    free = [name for name in quantizer_names if name not in pinned]
    units = [Unit(name, (name,), (), ()) for name in free]
    group_units(model, units, group_patterns or None)  # refuses a group without layers
    if profile is not None:
        load_times(profile, free, modules)  # refuses the profile of another model
    return pinned


def _require_possible(pinned: Mapping[str, str], formats: Sequence[str], sm: int | None) -> None:
    """Refuse a format in a plan that the run or the target does not have.

    Args:
        pinned: Layer -> precision.
        formats: The formats of the run.
        sm: As for `check_layers`.

    Raises:
        ArgumentError: With the first layer.
    """
    for name, precision in pinned.items():
        if precision not in (*formats, FLOAT):
            raise ArgumentError(
                f"the plan sets {name} to {precision}, but the formats of this run are {', '.join(formats)}.",
                f"set it to {' or '.join([*formats, FLOAT])}, or run qdq ptq with --formats int8,fp8.",
            )
        if precision == FP8.name and sm is not None and sm < FP8_LEAST_SM:
            raise ArgumentError(
                f"the plan sets {name} to fp8, which SM {sm} does not have.",
                f"set layers to int8 and attention to float, or choose a target of SM {FP8_LEAST_SM} or above.",
            )


def choose_target_sm(target: str | None, sm: int | None) -> int | None:
    """The compute capability that --target and --sm name; None if there is neither.

    Args:
        target: As for `find_target_sm`.
        sm: Compute capability, 89 for 8.9.

    Raises:
        ArgumentError: An unknown target, or one of another compute capability than `sm`.
    """
    from qdq.roofline import find_target_sm

    if target is None:
        return sm
    target_sm = find_target_sm(target)
    if sm not in (None, target_sm):
        raise ArgumentError(
            f"--target {target} has SM {target_sm}, and --sm is {sm}.", "give one of the two."
        )
    return target_sm


def check_formats(formats: Sequence[str], sm: int, method: str) -> None:
    """Refuse formats that the target does not have, and a method that has no range for one of them.

    Args:
        formats: As for `swap_modules`.
        sm: Compute capability of the target.
        method: As for `calibrate_model`.

    Raises:
        ArgumentError: FP8 alone for a target without it, or a method for integers only.
    """
    if FP8.name not in formats:
        return
    if INT8 not in formats and sm < FP8_LEAST_SM:
        raise ArgumentError(
            f"--formats is fp8, and SM {sm} has no FP8: that begins with SM {FP8_LEAST_SM}.",
            "pass --formats int8, or a --target with FP8, such as l4.",
        )
    if method != "best":
        from qdq.observers.solve import require_method

        require_method(method, FP8)


def choose_centering(center: bool | None, formats: Sequence[str], accuracy: str) -> bool:
    """Whether inputs are centered: not if they become FP8, whose numbers are densest around 0.

    Args:
        center: As for --center.
        formats: As for `swap_modules`.
        accuracy: As for --accuracy; by default "fast" does not center.

    Raises:
        ArgumentError: The option and FP8 are given.
    """
    has_fp8 = FP8.name in formats
    if center is None:
        return accuracy != "fast" and not has_fp8
    if center and has_fp8:
        raise ArgumentError(
            "--center is given, and --formats has fp8: most values behind a ReLU6 are near 0, where FP8 is most exact.",
            "leave --center out, or use --formats int8.",
        )
    return center


def choose_extra_macs(
    extra_macs: float | None,
    formats: Sequence[str],
    *,
    max_float_layers: int,
    plan: Plan | None,
    accuracy: str | None = None,
) -> float | None:
    """How many MACs the model may have more for split channels; None if channels are not split.

    Args:
        extra_macs: As for --extra-macs.
        formats: As for `swap_modules`; only int8 gains by splitting.
        max_float_layers: As for --max-float-layers. By default no layer becomes wider if some may go to float: those
            that gain most would, and MACs cost most there.
        plan: As for --plan; it may set layers to float, too.
        accuracy: As for --accuracy, where "fast" does not split; None if every accuracy splits.

    Raises:
        ArgumentError: The option is given, and channels are not split; it is NaN, below 0 or above 1.
    """
    reason, fix = "", ""
    if INT8 not in formats:
        reason = f"--formats is {','.join(formats)}: only channels for int8 are split"
        fix = "leave --extra-macs out, or use --formats int8."
    elif accuracy == "fast":
        reason = "--accuracy is fast, which splits no channels"
        fix = "leave --extra-macs out, or use --accuracy balanced."
    if reason:
        if extra_macs is not None:
            raise ArgumentError(f"--extra-macs is given, and {reason}.", fix)
        return None
    if extra_macs is None:
        has_float_layers = plan is not None and FLOAT in plan.precisions.values()
        return 0.0 if max_float_layers or has_float_layers else _EXTRA_MACS
    if not 0 <= extra_macs <= 1:
        raise ArgumentError(
            f"--extra-macs is {extra_macs}; expected a share of the MACs of the model, 0 to 1.",
            f"pass {_EXTRA_MACS} for {100 * _EXTRA_MACS:.0f} %, or 0 to keep the size of every layer.",
        )
    return extra_macs


def choose_patience(schedule: Schedule, accuracy: str, *, uses_labels: bool) -> Schedule:
    """The schedule of fine-tuning, which ends early by default where it is least likely to gain.

    After AdaRound it hardly ever gains, and a run that gains is better at its first measurement as a rule. After the
    correction of biases alone, or while quantization still grows, a metric that falls at first may rise later.

    Args:
        schedule: As on the command line.
        accuracy: As for --accuracy.
        uses_labels: Whether the loss has labels, so that no metric is measured.
    """
    is_free = schedule.patience is None and not schedule.grow
    if uses_labels or accuracy == "fast" or not is_free:
        return schedule
    return replace(schedule, patience=_PATIENCE)


def _list_unmatched(patterns: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The patterns that do not match any named module."""
    from qdq.patterns import Patterns

    unmatched = []
    for pattern in patterns:
        compiled = Patterns([pattern], "exclude")
        if not any(compiled.match([name], module) for name, module in modules.items()):
            unmatched.append(pattern)
    return unmatched


def _require_trainable(workload: Workload, layers: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse a pattern whose modules have no parameter to train, or are all left in float."""
    from qdq.patterns import Patterns

    excluded = Patterns(exclude, "exclude")
    for pattern in layers:
        compiled = Patterns([pattern], "layers")
        trainable = {}
        for name, module in workload.module.named_modules():
            if compiled.match([name], module) and _has_trainable_parameter(module):
                trainable[name] = module
        if not trainable:
            raise ArgumentError(
                f"the pattern {pattern!r} in layers matches no module of {workload.name} with parameters.",
                "correct it.",
            )
        if all(excluded.match([name], module) for name, module in trainable.items()):
            raise ArgumentError(
                f"all modules that the pattern {pattern!r} in layers matches are excluded, and stay in float.",
                "leave it out of one of --layers and --exclude.",
            )


def _has_trainable_parameter(module: nn.Module) -> bool:
    """Whether a module itself, without its children, has a parameter that can be trained."""
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


@contextmanager
def _silent() -> Iterator[None]:
    """Switch off the log, because the same messages will come again for the model itself."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


def check_tuning(
    loss: str, labels: Sequence[int] | None, schedule: Schedule, *, tensorboard: bool
) -> None:
    """Refuse options of fine-tuning that contradict each other or the data.

    Args:
        loss: "distill", "labels" or "both".
        labels: Labels of the images to train on, or None.
        schedule: As for `finetune`.
        tensorboard: As for `finetune`.

    Raises:
        ArgumentError: The loss needs labels and there are none, or patience is set but no metric is measured.
        DependencyError: tensorboard is not installed.
    """
    if loss != "distill" and labels is None:
        raise ArgumentError(
            f"--loss {loss} needs images with labels, and these have none.",
            "pass --data with a folder for each class, or use --loss distill, which needs none.",
        )
    if loss != "distill" and schedule.patience is not None:
        raise ArgumentError(
            f"--patience waits for a better metric, and with --loss {loss} none is measured.",
            "leave it out, or use --loss distill.",
        )
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise DependencyError("tensorboard is not installed.", "pip install 'qdq[tensorboard]'")
