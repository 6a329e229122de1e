"""What fine-tuning lowers: the distance to the float model (distillation), the loss of the task, or both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from qdq.errors import ArgumentError, ArgumentTypeError, DataError, StateError
from qdq.forward import call_model, evaluating, floats_of
from qdq.nn import QuantMixin
from qdq.patterns import Pattern, Patterns
from qdq.swap import quantized_layers
from qdq.text import list_names
from qdq.units import name_block

Loss = Callable[[Any, Any], torch.Tensor] | Literal["own"]
"""`(outputs of the model, batch) -> scalar`, the mean over the samples of the batch; "own": see `run_with_loss`."""

_QUIET = (
    1e-3  # of the mean energy of a batch; the error of a sample with less is measured against this
)
_TINY = 1e-30  # an energy that stands for 0, far enough from the smallest float32 to divide by


@dataclass(frozen=True)
class Distillation:
    """How far the quantized model may be from the float one; no labels are needed (Hinton et al., arXiv 1503.02531).

    Each part is weighted and averaged over the samples.

    Args:
        mse: Squared error of the outputs over the squares of the float ones; 0.01 is an SQNR of 20 dB.
        kl: Kullback-Leibler divergence of the classes, for outputs `[N, classes]`; others have none.
        features: Squared error of the outputs of `layers` over the squares of the float ones, averaged over the layers.
            It holds the model to what the float one does inside, which keeps it from learning few images by heart.
        layers: Patterns (see `qdq.patterns`) of the modules that `features` compares; of nested ones the outermost.
            Empty: the blocks that hold layers with a quantized weight, `layer1.0` say (see `units.name_block`).

    Raises:
        ArgumentError: A weight below 0, no weight above 0, or layers without features.
        ArgumentTypeError: A weight that is no number.
    """

    mse: float = 1.0
    kl: float = 1.0
    features: float = 1.0
    layers: Sequence[Pattern] = ()

    def __post_init__(self) -> None:
        weights = {"mse": self.mse, "kl": self.kl, "features": self.features}
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, Real):
                raise ArgumentTypeError(
                    f"{name} is {weight!r}, a {type(weight).__name__}.", f"give {name} as a number."
                )
            if not 0 <= weight < float("inf"):
                raise ArgumentError(
                    f"{name} is {weight}; a weight of a loss is 0 or more.", f"pass another {name}."
                )
        if not any(weights.values()):
            raise ArgumentError(
                "all weights of the distillation are 0.", "pass distillation=None to leave it out."
            )
        if self.layers and not self.features:
            raise ArgumentError(
                "features is 0, so layers say nothing.", "give features a weight, or no layers."
            )


def cross_entropy(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """The task's loss of a classifier: logits `[N, classes]` against the labels of `(images, labels)`.

    Raises:
        DataError: The batch has no labels.
    """
    if not (
        isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], torch.Tensor)
    ):
        raise DataError(
            "a batch has no labels.", "give batches (images, labels), or distil: loss=None."
        )
    return F.cross_entropy(outputs.float(), batch[1])


class Objective:
    """The whole loss of a batch.

    Args:
        model: The quantized model.
        teacher: The float model; None without distillation.
        loss: The task's.
        distillation: The distance to the teacher.

    Raises:
        ArgumentError: Neither of the two, what does not go together, or layers that the models do not have.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        loss: Loss | None,
        distillation: Distillation | None,
    ) -> None:
        if loss is None and distillation is None:
            raise ArgumentError(
                "there is no loss: no loss function and no distillation.", "give one of them."
            )
        if not (loss is None or loss == "own" or callable(loss)):
            raise ArgumentError(
                f"loss is {loss!r}.", "give a function (outputs, batch) -> scalar, or 'own'."
            )
        if loss == "own" and distillation is not None and (distillation.mse or distillation.kl):
            found = (
                "a model that gives its own loss gives no outputs to compare with the teacher's."
            )
            raise ArgumentError(
                found,
                "pass distillation=None, or Distillation(mse=0, kl=0) to compare the features.",
            )
        self._model, self._teacher, self._loss, self._distillation = (
            model,
            teacher,
            loss,
            distillation,
        )
        self._layers = (
            _find_layers(model, distillation.layers)
            if distillation and distillation.features
            else []
        )
        if teacher is not None and self._layers:
            _require_layers(teacher, self._layers)

    def __call__(self, batch: Any) -> torch.Tensor:
        """The loss, a float32 scalar with its gradient.

        Raises:
            ArgumentError: A loss that is no scalar, or outputs without a floating-point tensor.
            StateError: A layer whose outputs are to be compared did not run.
        """
        with _recording(self._model, self._layers) as found:
            outputs, total = run_with_loss(self._model, self._loss, batch)
        if self._distillation is not None and self._teacher is not None:
            with (
                _plain_attention(),
                evaluating(self._teacher),
                _recording(self._teacher, self._layers) as expected,
            ):
                targets = call_model(self._teacher, batch)
            if self._loss != "own":
                total = total + _distance(self._distillation, outputs, targets)
            if self._layers:
                total = total + self._distillation.features * _compare_features(found, expected)
        return total


def _distance(distillation: Distillation, outputs: Any, targets: Any) -> torch.Tensor:
    pairs = _pair(_floats(outputs), _floats(targets), "the model")
    total = distillation.mse * torch.stack([relative_error(*pair) for pair in pairs]).mean()
    classes = [divergence(*pair) for pair in pairs if pair[0].dim() == 2]
    if not (distillation.mse or distillation.features or classes):
        raise ArgumentError(
            "the distillation is 0: kl needs outputs [N, classes].",
            "give mse or features a weight.",
        )
    return (
        total + distillation.kl * torch.stack(classes).mean()
        if classes and distillation.kl
        else total
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mean over the samples of noise over signal, 10^(-SQNR / 10); both `[N, ...]`; finite wherever the inputs are.

    Against a sample that is nearly or quite 0, behind a ReLU say, an error would be infinite: the signal counts as at
    least a thousandth of its mean over the batch, and as 1 where the whole batch is 0.
    """
    found, expected = found.float(), expected.float()
    noise, signal = _energy(found - expected), _energy(expected)
    signal = torch.maximum(signal, _QUIET * signal.mean())
    return (noise / torch.where(signal > _TINY, signal, 1.0)).mean()


def _energy(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each sample, in one pass over the memory as it lies."""
    if values.dim() < 2:
        return values.square()
    norm: torch.Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())))
    return norm.square()


def divergence(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL divergence of the classes of two logits `[N, classes]`, in nats, mean over the samples."""
    found, expected = found.float().log_softmax(1), expected.float().log_softmax(1)
    return F.kl_div(found, expected, reduction="batchmean", log_target=True)


def _compare_features(
    found: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]
) -> torch.Tensor:
    errors = [
        relative_error(*pair)
        for name, outputs in expected.items()
        for pair in _pair(found[name], outputs, name)
    ]
    if not errors:
        raise StateError(
            "none of the layers of the distillation ran.", "choose layers that the batches reach."
        )
    return torch.stack(errors).mean()


def _pair(
    found: list[torch.Tensor], expected: list[torch.Tensor], name: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of the two models side by side.

    Raises:
        ArgumentError: They differ in number or shape.
    """
    shapes, others = ([list(tensor.shape) for tensor in tensors] for tensors in (found, expected))
    if shapes != others:
        raise ArgumentError(
            f"{name} gives {shapes}, in the teacher {others}.",
            "give a teacher with the same outputs.",
        )
    return list(zip(found, expected, strict=True))


def _require_layers(teacher: nn.Module, layers: Sequence[str]) -> None:
    names = dict(teacher.named_modules())
    if missing := [name for name in layers if name not in names]:
        raise ArgumentError(
            f"the teacher has no {list_names(missing, 3)}, whose outputs are to be compared.",
            "give a teacher with the same modules, or Distillation(features=0).",
        )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused kernel of transformer layers, between which tensors are nested where there is padding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _recording(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The outputs of some modules during the block."""
    outputs: dict[str, list[torch.Tensor]] = defaultdict(list)
    with ExitStack() as hooks:
        for name in layers:

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                outputs[name] += _floats(output)

            hooks.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield outputs


def _find_layers(model: nn.Module, patterns: Sequence[Pattern]) -> list[str]:
    if not patterns:
        return _find_blocks(model)
    wanted = Patterns(patterns, "layers")
    matched = [name for name, module in model.named_modules() if wanted.match([name], module)]
    found = [
        name for name in matched if name.rpartition(".")[0] not in matched
    ]  # a match counts for all below it
    if not found:
        raise ArgumentError(
            "no module fits the layers of the distillation.", "see named_modules() for the names."
        )
    wanted.warn_unused("module")
    return found


def _find_blocks(model: nn.Module) -> list[str]:
    """The block of each layer with a quantized weight; the layer itself where that is a list, which has no output."""
    layers = [
        name for name, layer in quantized_layers(model).items() if isinstance(layer, QuantMixin)
    ]
    lists = (nn.ModuleList, nn.ModuleDict)
    blocks = {name: name_block(name) for name in layers}
    return list(
        dict.fromkeys(
            n if isinstance(model.get_submodule(b), lists) else b for n, b in blocks.items()
        )
    )


def _floats(tree: Any) -> list[torch.Tensor]:
    tensors = floats_of(tree)
    if not tensors:
        raise ArgumentError(
            "the model, or a layer to compare, gives no floating-point tensor.", "use another loss."
        )
    return tensors


def run_with_loss(model: nn.Module, loss: Loss | None, batch: Any) -> tuple[Any, torch.Tensor]:
    """The outputs of a model for a batch, and its loss as float32 without dimensions; 0 without one.

    With "own" the model is called on all of the batch, `model(images, targets)`, in training mode, in which
    torchvision's detectors give their losses; BatchNorm and Dropout stay in the mode that they are in. The loss is the
    sum of what the model gives.

    Raises:
        ArgumentError: A loss that is no scalar, or outputs without a floating-point tensor.
    """
    if loss == "own":
        with _training(model):
            outputs = model(*batch) if isinstance(batch, tuple | list) else call_model(model, batch)
        return outputs, torch.stack([_require_scalar(each) for each in _floats(outputs)]).sum()
    outputs = call_model(model, batch)
    if loss is None:
        return outputs, torch.zeros((), device=_floats(outputs)[0].device)
    return outputs, _require_scalar(loss(outputs, batch))


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode for all but what would learn or drop something by itself."""
    modes = {
        module: module.training
        for module in model.modules()
        if not isinstance(module, _NormBase | _DropoutNd)
    }
    try:
        for module in modes:
            module.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _require_scalar(loss: Any) -> torch.Tensor:
    """What a loss function gave, as float32 without dimensions.

    Raises:
        ArgumentError: It is no scalar tensor.
    """
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        found = (
            f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        )
        raise ArgumentError(
            f"the loss function gave {found}; expected a scalar tensor.", "return its mean."
        )
    return loss.float().reshape(())
