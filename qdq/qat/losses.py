"""The loss of fine-tuning: the distance to the float model (distillation), the loss of the task, or both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from qdq.batch import Labelled, find_labels, floats_of, split_inputs
from qdq.device import move_batch
from qdq.errors import ArgumentError, ArgumentTypeError, DataError, StateError
from qdq.forward import call_model, evaluating, explaining_devices
from qdq.nn import QuantMixin
from qdq.outputs import Mask, OutputView, Selection, clear_padding, require_fitting, require_weights
from qdq.patterns import Pattern, Patterns
from qdq.swap import quantized_layers
from qdq.text import list_names
from qdq.units import name_block

Loss = Callable[[Any, Any], torch.Tensor] | Literal["own"]
"""`(outputs of the model, batch) -> scalar`, the mean over the samples of the batch; "own": see `run_with_loss`."""

# The energy of a sample counts as at least this fraction of the mean of its batch.
_MIN_ENERGY = 1e-3
# The error of an output before training counts as at least this fraction of the largest one.
_MIN_START_ERROR = 1e-3
_START_ERRORS = "start_errors"
_TINY = 1e-30  # an energy that counts as 0, far enough above the smallest float32 to divide by


@dataclass(frozen=True)
class Distillation:
    """The distance between the quantized and the float model; it needs no labels (Hinton et al., arXiv 1503.02531).

    The fields are the weights of its parts. Each part is averaged over the samples.

    Args:
        mse: Squared error of the outputs over the squares of the float ones; 0.01 is an SQNR of 20 dB.
        kl: Kullback-Leibler divergence of the classes, for a single output `[N, classes]`. Of several outputs none has
            it by itself, because boxes `[N, 4]` are no classes: give name -> weight of those that are.
        features: Squared error of the outputs of `layers` over the squares of the float ones, averaged over the layers.
            It ties the inner layers to those of the float model, so that the model does not memorize a few images.
        layers: Patterns (see `qdq.patterns`) of the modules that `features` compares; of nested modules, the outermost.
            Empty: the blocks with layers with a quantized weight, for example `layer1.0` (see `units.name_block`).
        temperature: T by which `kl` divides the logits of both models; it is multiplied by T^2, as its gradient falls
            with 1 / T^2.
        outputs: Parts of the outputs to compare, as for `predictor.predict`; None for all. Each has its own error, so
            outputs of other scales count the same.
        mask: What leaves padding out of the outputs, as for `predictor.predict`.
        weights: Name -> weight of the relative error of each output that counts. None: each is divided by what it was
            before training, and multiplied by their mean. Otherwise the gradient of an output with a small error would
            be lost beside the others, and that output would become worse.

    Raises:
        ArgumentError: A weight below 0, no weight above 0, layers without features, a temperature that is not above
            0, or invalid outputs or weights.
        ArgumentTypeError: A weight that is not a number, or outputs or a mask of another kind.
    """

    mse: float = 1.0
    kl: float | Mapping[str, float] = 1.0
    features: float = 1.0
    layers: Sequence[Pattern] = ()
    temperature: float = 1.0
    outputs: Selection | None = None
    mask: Mask | None = None
    weights: Mapping[str, float] | None = None

    @property
    def view(self) -> OutputView:
        """The outputs that count, and where."""
        return OutputView(self.outputs, self.mask, self.weights)

    def __post_init__(self) -> None:
        weights: dict[str, float] = {"mse": self.mse, "features": self.features}
        if isinstance(self.kl, Mapping):
            require_weights(self.kl)
        else:
            weights["kl"] = self.kl
        for name, number in {**weights, "temperature": self.temperature}.items():
            if isinstance(number, bool) or not isinstance(number, Real):
                raise ArgumentTypeError(
                    f"{name} is {number!r}, a {type(number).__name__}.", f"give {name} as a number."
                )
            if not 0 <= number < float("inf"):
                raise ArgumentError(
                    f"{name} is {number}; it must be 0 or more, and finite.",
                    f"pass another {name}.",
                )
        if not any(weights.values()) and not isinstance(self.kl, Mapping):
            raise ArgumentError(
                "all weights of the distillation are 0.", "pass distillation=None to leave it out."
            )
        if self.temperature == 0:
            raise ArgumentError("temperature is 0; logits are divided by it.", "leave it out.")
        if self.layers and not self.features:
            raise ArgumentError(
                "features is 0, so layers have no effect.",
                "give features a weight, or leave layers out.",
            )
        _ = self.view  # refuses invalid outputs


def cross_entropy(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """The loss of a classifier: logits `[N, classes]` against the labels of `(images, labels)`.

    Raises:
        DataError: The batch has no labels.
    """
    labels = find_labels(batch)
    if not isinstance(labels, torch.Tensor):
        raise DataError(
            "a batch has no labels.",
            "give batches (images, labels) or qdq.Labelled, or use distillation alone: loss=None.",
        )
    return F.cross_entropy(outputs.float(), labels)


class Objective:
    """The whole loss of a batch.

    Args:
        model: The quantized model.
        teacher: The float model; None without distillation.
        loss: The loss of the task.
        distillation: The distance to the teacher.

    Raises:
        ArgumentError: Neither loss nor distillation, options that contradict each other, or layers that the models do
            not have.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        loss: Loss | None,
        distillation: Distillation | None,
    ) -> None:
        _require_loss(loss, distillation)
        self._model = model
        self._teacher = teacher
        self._loss = loss
        self._distillation = distillation
        self._start_errors: torch.Tensor | None = None
        self._layers: list[str] = []
        if distillation is not None and distillation.features:
            self._layers = _find_layers(model, distillation.layers)
        if teacher is not None and self._layers:
            _require_layers(teacher, self._layers)

    def __call__(self, batch: Any) -> torch.Tensor:
        """The loss, a float32 scalar with a gradient.

        Raises:
            ArgumentError: A loss that is not a scalar, or outputs without a floating-point tensor.
            StateError: A layer to compare did not run.
        """
        with _recording(self._model, self._layers) as features:
            outputs, total = run_with_loss(self._model, self._loss, batch)
        if self._distillation is None or self._teacher is None:
            return total
        with _recording(self._teacher, self._layers) as expected_features:
            targets = _ask(self._teacher, batch)
        if self._loss != "own":
            pairs = _pair_outputs(self._distillation.view, outputs, targets, batch)
            total = total + _measure_distance(self._distillation, pairs, self._start_errors)
        if self._layers:
            distance = _compare_features(features, expected_features)
            total = total + self._distillation.features * distance
        return total

    def balance(self, batch: Any) -> None:
        """Measure the relative error of each output, by which the loss divides it from now on; once, before training.

        Args:
            batch: As for `finetune`; the same one in every process.
        """
        distillation, teacher = self._distillation, self._teacher
        if self._start_errors is not None or distillation is None or teacher is None:
            return
        if not distillation.mse or distillation.weights is not None:
            return
        with evaluating(self._model):
            outputs = call_model(self._model, batch)
        pairs = _pair_outputs(distillation.view, outputs, _ask(teacher, batch), batch)
        errors = [relative_error(*pair) for pair in pairs.values()]
        self._start_errors = torch.stack([error.detach() for error in errors])

    def pack(self) -> dict[str, torch.Tensor]:
        """What `balance` has measured, from which `unpack` continues."""
        return {} if self._start_errors is None else {_START_ERRORS: self._start_errors}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue with what another objective has measured."""
        errors = tensors.get(_START_ERRORS)
        if errors is not None:
            errors = errors.to(next(self._model.parameters()).device)
        self._start_errors = errors


def _ask(teacher: nn.Module, batch: Any) -> Any:
    """The outputs of the teacher."""
    with _plain_attention(), evaluating(teacher):
        return call_model(teacher, batch)


def _require_loss(loss: Loss | None, distillation: Distillation | None) -> None:
    """Refuse an objective without a loss, or with parts that contradict each other.

    Raises:
        ArgumentError: It is such an objective.
    """
    if loss is None and distillation is None:
        raise ArgumentError(
            "there is no loss: no loss function and no distillation.", "give one of them."
        )
    if loss is not None and loss != "own" and not callable(loss):
        raise ArgumentError(
            f"loss is {loss!r}.", "give a function (outputs, batch) -> scalar, or 'own'."
        )
    compares_outputs = distillation is not None and (distillation.mse or distillation.kl)
    if loss == "own" and compares_outputs:
        raise ArgumentError(
            "a model that returns its own loss returns no outputs to compare with the teacher's.",
            "pass distillation=None, or Distillation(mse=0, kl=0) to compare the features.",
        )


def _pair_outputs(
    view: OutputView, outputs: Any, targets: Any, batch: Any
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The outputs of two models side by side, by name, without padding."""
    actual = _require_floats(view.select(outputs))
    names = list(view.select_floats(outputs))
    # A teacher may be elsewhere, and return the same outputs in another order or under other names.
    expected = view.select_floats(move_batch(targets, actual[0].device))
    if set(expected) == set(names):
        expected = {name: expected[name] for name in names}
    pairs = _pair(actual, list(expected.values()), "the model")
    mask = view.find_mask(batch)
    if mask is not None:
        require_fitting(mask, dict(zip(names, actual, strict=True)))
        pairs = [(clear_padding(one, mask), clear_padding(other, mask)) for one, other in pairs]
    return dict(zip(names, pairs, strict=True))


def _measure_distance(
    distillation: Distillation,
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    start_errors: torch.Tensor | None,
) -> torch.Tensor:
    """The weighted distance of the outputs of two models on a batch."""
    errors = [relative_error(output, target) for output, target in pairs.values()]
    weights = distillation.view.weigh(list(pairs))
    total = distillation.mse * _combine(errors, weights, start_errors)
    divergences = _measure_divergences(distillation, pairs)
    if not (distillation.mse or distillation.features or divergences):
        raise ArgumentError(
            "the distillation is 0: kl needs one output [N, classes], or the names of those that are.",
            "give mse or features a weight, or kl={NAME: 1.0}.",
        )
    return total + sum(divergences)


def _measure_divergences(
    distillation: Distillation, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """The weighted divergence of each output that has classes.

    Raises:
        ArgumentError: `kl` names an output that does not exist or is not `[N, classes]`.
    """
    kl, temperature = distillation.kl, distillation.temperature
    if not isinstance(kl, Mapping):
        (first, *others) = pairs.values()
        is_classes = not others and first[0].dim() == 2
        return [kl * _soften(temperature, *first)] if kl and is_classes else []
    divergences = []
    for name, weight in kl.items():
        if name not in pairs or pairs[name][0].dim() != 2:
            shapes = {known: list(pair[0].shape) for known, pair in pairs.items()}
            raise ArgumentError(
                f"kl names {name}; the outputs are {shapes}.", "name those that are [N, classes]."
            )
        divergences.append(weight * _soften(temperature, *pairs[name]))
    return divergences


def _soften(temperature: float, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The divergence of logits at a temperature, times its square."""
    return divergence(output / temperature, target / temperature) * temperature**2


def _combine(
    errors: list[torch.Tensor], weights: list[float] | None, start_errors: torch.Tensor | None
) -> torch.Tensor:
    """The error of all outputs from that of each.

    Args:
        errors: Relative error of each output.
        weights: Weight of each. None: their errors before training decide.
        start_errors: These, `[outputs]`; None if they are not known.
    """
    stacked = torch.stack(errors)
    if weights is not None:
        factors = torch.tensor(weights, device=stacked.device)
        return (factors * stacked).sum() / factors.sum()
    if start_errors is None:
        return stacked.mean()
    # On a GPU, a condition on these values would wait for it in every step.
    shares = torch.maximum(start_errors, _MIN_START_ERROR * start_errors.max())
    factors = torch.where(shares > 0, start_errors.mean() / shares, 1.0)
    return (stacked * factors.to(stacked.device)).mean()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mean over the samples of noise over signal, 10^(-SQNR / 10); it is finite if the inputs are.

    The error relative to a sample that is nearly 0, for example after a ReLU, would be infinite. So the signal counts
    as at least a thousandth of its mean over the batch, and as 1 if the whole batch is 0.

    Args:
        actual: `[N, ...]`.
        expected: `[N, ...]`.
    """
    actual = actual.float()
    expected = expected.float()
    noise = _energy(actual - expected)
    signal = _energy(expected)
    signal = torch.maximum(signal, _MIN_ENERGY * signal.mean())
    return (noise / torch.where(signal > _TINY, signal, 1.0)).mean()


def _energy(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each sample, in one pass in memory order."""
    if values.dim() < 2:
        return values.square()
    norm: torch.Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())))
    return norm.square()


def divergence(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL divergence of the classes of two logits `[N, classes]`, in nats, mean over the samples."""
    log_actual = actual.float().log_softmax(1)
    log_expected = expected.float().log_softmax(1)
    return F.kl_div(log_actual, log_expected, reduction="batchmean", log_target=True)


def _compare_features(
    features: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]
) -> torch.Tensor:
    """Mean relative error of the outputs of layers."""
    errors: list[torch.Tensor] = []
    for name, targets in expected.items():
        for output, target in _pair(features[name], targets, name):
            error = relative_error(output, target.to(output.device))
            errors.append(error.to(errors[0].device) if errors else error)
    if not errors:
        raise StateError(
            "none of the layers of the distillation ran.", "choose layers that the batches reach."
        )
    return torch.stack(errors).mean()


def _pair(
    outputs: list[torch.Tensor], targets: list[torch.Tensor], name: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of the two models side by side.

    Raises:
        ArgumentError: They differ in number or shape.
    """
    output_shapes = [list(tensor.shape) for tensor in outputs]
    target_shapes = [list(tensor.shape) for tensor in targets]
    if output_shapes != target_shapes:
        raise ArgumentError(
            f"{name} gives {output_shapes}, but {target_shapes} in the teacher.",
            "give a teacher of the same outputs and layers; Distillation(features=0) compares outputs only.",
        )
    return list(zip(outputs, targets, strict=True))


def _require_layers(teacher: nn.Module, layers: Sequence[str]) -> None:
    names = dict(teacher.named_modules())
    missing = [name for name in layers if name not in names]
    if missing:
        raise ArgumentError(
            f"the teacher has no {list_names(missing, 3)}, whose outputs should be compared.",
            "give a teacher with the same modules, or Distillation(features=0).",
        )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch off the fused kernel of transformer layers, which returns nested tensors if there is padding."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@contextmanager
def _recording(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The outputs of some modules during the block."""
    outputs: dict[str, list[torch.Tensor]] = defaultdict(list)

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] += _require_floats(output)

    with ExitStack() as hooks:
        for name in layers:
            handle = model.get_submodule(name).register_forward_hook(partial(record, name))
            hooks.callback(handle.remove)
        yield outputs


def _find_layers(model: nn.Module, patterns: Sequence[Pattern]) -> list[str]:
    """The modules to compare: those that match or, without a pattern, the blocks of the quantized layers."""
    if not patterns:
        return _find_blocks(model)
    wanted = Patterns(patterns, "layers")
    matches = [name for name, module in model.named_modules() if wanted.match([name], module)]
    # A match includes everything below it.
    outermost = [name for name in matches if name.rpartition(".")[0] not in matches]
    if not outermost:
        raise ArgumentError(
            "no module matches the layers of the distillation.",
            "see named_modules() for the names.",
        )
    wanted.warn_unused("module")
    return outermost


def _find_blocks(model: nn.Module) -> list[str]:
    """The block of each layer with a quantized weight; the layer itself if the block is a list, which has no output."""
    blocks: dict[str, None] = {}
    for name, layer in quantized_layers(model).items():
        if not isinstance(layer, QuantMixin):
            continue
        block = name_block(name)
        if isinstance(model.get_submodule(block), nn.ModuleList | nn.ModuleDict):
            block = name
        blocks[block] = None
    return list(blocks)


def _require_floats(tree: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output.

    Raises:
        ArgumentError: It has none.
    """
    tensors = floats_of(tree)
    if not tensors:
        raise ArgumentError(
            "the model, or a layer to compare, gives no floating-point tensor.", "use another loss."
        )
    return tensors


def run_with_loss(model: nn.Module, loss: Loss | None, batch: Any) -> tuple[Any, torch.Tensor]:
    """The outputs of a model for a batch, and its loss as a float32 scalar; 0 without a loss.

    With "own" the model is called on the whole batch, `model(images, targets)` or, if its inputs are a mapping,
    `model(**inputs, labels=labels)`, in training mode: the detectors of torchvision and the models of transformers
    then return their losses. BatchNorm and Dropout stay in their current mode. The loss is the sum of the
    losses that the model returns.

    Raises:
        ArgumentError: A loss that is not a scalar, or outputs without a floating-point tensor.
        DataError: The loss gets tensors of several devices.
    """
    if loss == "own":
        with _training(model):
            outputs = call_model(model, _with_labels(batch))
        losses = [_require_scalar(part) for part in _require_floats(outputs)]
        return outputs, torch.stack(losses).sum()
    outputs = call_model(model, batch)
    if loss is None:
        return outputs, torch.zeros((), device=_require_floats(outputs)[0].device)
    fix = "make constants of the loss on the device of the outputs: torch.tensor(..., device=outputs.device)."
    with explaining_devices("the loss function", fix):
        value = loss(outputs, batch)
    return outputs, _require_scalar(value)


def _with_labels(batch: Any) -> Any:
    """A batch whose labels are among its inputs: the last positional one, or the keyword `labels`."""
    if isinstance(batch, tuple | list):
        return Labelled(tuple(batch))
    labels = find_labels(batch)
    if labels is None:
        return batch
    args, kwargs = split_inputs(batch)
    return Labelled({**kwargs, "labels": labels} if kwargs else (*args, labels))


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode for all modules except BatchNorm and Dropout."""
    modes = {}
    for module in model.modules():
        if not isinstance(module, _NormBase | _DropoutNd):
            modes[module] = module.training
    try:
        for module in modes:
            module.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _require_scalar(loss: Any) -> torch.Tensor:
    """The result of a loss function as float32 without dimensions.

    Raises:
        ArgumentError: It is not a scalar tensor.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss.float().reshape(())
    kind = type(loss).__name__
    if isinstance(loss, torch.Tensor):
        kind = f"shape {tuple(loss.shape)}"
    raise ArgumentError(
        f"the loss function returned {kind}; expected a scalar tensor.", "return its mean."
    )
