"""What a recipe refuses before it runs the model: options that the pipeline would refuse minutes later."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qdq.errors import ArgumentError, DependencyError

_EXAMPLES = 2  # images

if TYPE_CHECKING:
    from torch import nn

    from qdq.plan import Plan
    from qdq.schedule import Schedule
    from qdq.workloads.classification.models import LoadedModel


def check_layers(
    net: LoadedModel,
    *,
    exclude: Sequence[str] = (),
    plan: Plan | None = None,
    groups: str | Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    profile: Path | None = None,
) -> None:
    """Refuse patterns that cannot be compiled, and names of layers that the quantized model will not have.

    Nothing is calibrated for that: a copy of the model is swapped and rewired, on two images of noise, where its
    modules alone do not say whether a name is there.

    Args:
        net: The model; stays as it is.
        exclude: As for `swap_modules`; each pattern must match a module or a call.
        plan: As `pinned` of `analyze_layers`.
        groups: As for `analyze_layers`.
        layers: As for `finetune`.
        profile: As for `analyze_layers`.

    Raises:
        ArgumentError: A regular expression that is none; a name that matches nothing; layers of which none is left to
            train.
        DataError: The profile is of another model.
    """
    import torch

    from qdq.analyze.cost import load_times
    from qdq.fold import fold_batchnorm
    from qdq.patterns import Patterns
    from qdq.rewire import rewire_operations
    from qdq.seeds import seeded_rng
    from qdq.swap import swap_modules
    from qdq.units import Unit, find_all_quantizers, group_units, match_precisions

    patterns = [] if groups is None or isinstance(groups, str) else list(groups)
    precisions = {} if plan is None else plan.precisions
    options = {
        "exclude": exclude,
        "plan": list(precisions),
        "groups": patterns,
        "layers": layers or (),
    }
    for option, names in options.items():
        Patterns(names, option)
    if layers is not None:
        _require_parameters(net, layers, exclude)
    unknown = _list_unmatched(exclude, dict(net.module.named_modules()))
    if not precisions and not patterns and not unknown and profile is None:
        return
    model = copy.deepcopy(net.module)
    with _silent(), seeded_rng(0):
        example = torch.randn(_EXAMPLES, 3, net.preprocess.crop_size, net.preprocess.crop_size)
        fold_batchnorm(model, example)
        swap_modules(model, example, exclude=exclude)
        rewired = rewire_operations(model, example, exclude=exclude)
        names = list(find_all_quantizers(model, example))
    modules = dict(model.named_modules())
    calls = {operation.name: model for operation in rewired.operations}
    if unknown := _list_unmatched(unknown, modules | calls):
        raise ArgumentError(
            f"the pattern {unknown[0]!r} in exclude matches no module and no call of {net.name}.",
            "correct it.",
        )
    pinned = match_precisions(model, names, precisions)
    free = [name for name in names if name not in pinned]
    group_units(model, [Unit(name, (name,), (), ()) for name in free], patterns or None)
    if profile is not None:
        load_times(profile, free, modules)


def _list_unmatched(patterns: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The patterns that match nothing among dotted names."""
    from qdq.patterns import Patterns

    tests = {pattern: Patterns([pattern], "exclude") for pattern in patterns}
    return [
        pattern
        for pattern, test in tests.items()
        if not any(test.match([name], modules[name]) for name in modules)
    ]


def _require_parameters(net: LoadedModel, layers: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse a pattern whose modules have nothing that could be trained, or are all left in float."""
    from qdq.patterns import Patterns

    excluded = Patterns(exclude, "exclude")
    for pattern in layers:
        test = Patterns([pattern], "layers")
        modules = {
            name: module
            for name, module in net.module.named_modules()
            if test.match([name], module)
        }
        trained = {name: module for name, module in modules.items() if _has_trainable(module)}
        if not trained:
            raise ArgumentError(
                f"the pattern {pattern!r} in layers matches no module of {net.name} with parameters.",
                "correct it.",
            )
        if all(excluded.match([name], module) for name, module in trained.items()):
            raise ArgumentError(
                f"what the pattern {pattern!r} in layers matches is excluded, and stays in float.",
                "leave it out of one of --layers and --exclude.",
            )


def _has_trainable(module: nn.Module) -> bool:
    """Whether a module has a parameter of its own that can be trained."""
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def check_tuning(
    loss: str, labels: Sequence[int] | None, schedule: Schedule, *, tensorboard: bool
) -> None:
    """Refuse options of fine-tuning that contradict each other or the data.

    Args:
        loss: "distill", "labels" or "both".
        labels: Of the images to train on.
        schedule: As for `finetune`.
        tensorboard: Likewise.

    Raises:
        ArgumentError: Labels that are not there, or patience where nothing is measured.
        DependencyError: tensorboard is not installed.
    """
    if loss != "distill" and labels is None:
        raise ArgumentError(
            f"--loss {loss} needs images with labels, and these have none.",
            "give --data-dir with a folder for each class, or use --loss distill, which needs none.",
        )
    if loss != "distill" and schedule.patience is not None:
        raise ArgumentError(
            f"--patience waits for a better metric, and with --loss {loss} none is measured.",
            "leave it out, or use --loss distill.",
        )
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise DependencyError("tensorboard is not installed.", "pip install 'qdq[tensorboard]'")


@contextmanager
def _silent() -> Iterator[None]:
    """Without a log: what is said of the copy will be said of the model."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
