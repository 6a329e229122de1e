"""What a recipe refuses before it runs the model: options that the pipeline would refuse minutes later."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qdq.errors import ArgumentError, DependencyError

_EXAMPLES = 2  # images

if TYPE_CHECKING:
    from qdq.models import LoadedModel
    from qdq.plan import Plan
    from qdq.schedule import Schedule


def check_layers(
    net: LoadedModel,
    *,
    exclude: Sequence[str] = (),
    plan: Plan | None = None,
    groups: str | Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
) -> None:
    """Refuse patterns that cannot be compiled, and names of layers that the quantized model will not have.

    Nothing is calibrated for that: a copy of the model is swapped and rewired, on two images of noise, where a plan or
    groups name layers.

    Args:
        net: The model; stays as it is.
        exclude: As for `swap_modules`.
        plan: As `pinned` of `analyze_layers`.
        groups: As for `analyze_layers`.
        layers: As for `finetune`.

    Raises:
        ArgumentError: A regular expression that is none; a name that matches nothing.
    """
    import torch

    from qdq.fold import fold_batchnorm
    from qdq.models import seeded_rng
    from qdq.patterns import Patterns
    from qdq.rewire import rewire_operations
    from qdq.swap import swap_modules
    from qdq.units import Unit, find_all_quantizers, group_units, match_precisions

    patterns = [] if groups is None or isinstance(groups, str) else list(groups)
    precisions = {} if plan is None else plan.precisions
    options = {"exclude": exclude, "plan": list(precisions), "groups": patterns, "layers": layers or ()}
    for option, names in options.items():
        Patterns(names, option)
    if layers is not None:
        _require_parameters(net, layers)
    if not precisions and not patterns:
        return
    model = copy.deepcopy(net.module)
    with _silent(), seeded_rng(0):
        example = torch.randn(_EXAMPLES, 3, net.preprocess.crop_size, net.preprocess.crop_size)
        fold_batchnorm(model, example)
        swap_modules(model, example, exclude=exclude)
        rewire_operations(model, example, exclude=exclude)
        names = list(find_all_quantizers(model, example))
    pinned = match_precisions(model, names, precisions)
    group_units(model, [Unit(name, (name,), (), ()) for name in names if name not in pinned], patterns or None)


def _require_parameters(net: LoadedModel, layers: Sequence[str]) -> None:
    """Refuse a pattern whose modules have nothing that could be trained."""
    from qdq.patterns import Patterns

    for pattern in layers:
        test = Patterns([pattern], "layers")
        modules = [module for name, module in net.module.named_modules() if test.match([name], module)]
        if not any(parameter.requires_grad for module in modules for parameter in module.parameters()):
            raise ArgumentError(
                f"the pattern {pattern!r} in layers matches no module of {net.name} with parameters.", "correct it."
            )


def check_tuning(loss: str, labels: Sequence[int] | None, schedule: Schedule, *, tensorboard: bool) -> None:
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
