"""The steps of fine-tuning: which modules are live, gradient, update."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qdq.batch import map_tensors
from qdq.calibrate.collect import bytes_of, fingerprint_model
from qdq.device import find_device, move_batch
from qdq.distributed import (
    connected,
    find_rank,
    free_memory,
    raise_together,
    shard_samples,
    sum_over_ranks,
)
from qdq.errors import ArgumentError, DataError, StateError
from qdq.patterns import Pattern, Patterns
from qdq.qat.checkpoint import select_prefix
from qdq.qat.losses import Objective
from qdq.qat.ranges import RangeTuning, require_range_method
from qdq.qat.watch import OscillationWatch, find_nonfinite, order_modules
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.schedule import Schedule
from qdq.swap import restore_modules

MakeOptimizer: TypeAlias = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer of groups of parameters, which have their learning rates."""

TRAINED = ("all", "ranges", "batchnorm")
_RANGE_EPS = 1e-12  # epsilon of Adam: gradients of ranges are about 1e-9, and the default 1e-8 would nearly stop them
_WATCHED = 0.25  # fraction of the steps, at the end, in which weights are watched for oscillation
_MODEL_PREFIX = "model//"
_WATCH_PREFIX = "watch//"
_OPTIMIZER_PREFIX = "optimizer//"
_OBJECTIVE_PREFIX = "objective//"
_FIXES = {
    "all": "check the patterns in layers; parameters with requires_grad=False are not trained.",
    "ranges": "learn ranges with ranges='lsq' or 'pact', and check the patterns in layers.",
    "batchnorm": "the model has no BatchNorm, or it is folded: tune it before fold_batchnorm.",
}


@dataclass(frozen=True)
class _Figures:
    """What the host must know of a step; it is read from a GPU all at once.

    Args:
        loss: The loss.
        norm_value: The norm of the gradient.
        largest: As from `RangeTuning.find_largest`.
        norm: The norm of the gradient, where the gradient is.
    """

    loss: float
    norm_value: float
    largest: float
    norm: torch.Tensor


class Trainer:
    """Trains a model step by step.

    Between two steps the model is in evaluation mode with all its quantizers enabled, and may be measured or saved.

    Args:
        model: A calibrated model, on its device.
        objective: Its loss.
        schedule: Length and learning rates.
        total: Number of steps.
        ranges: As for `finetune`.
        train: As for `finetune`.
        layers: As for `finetune`.
        amp: As for `finetune`.
        optimizer: As for `finetune`.

    Attributes:
        device: The device of the model.
        step: Number of finished steps.
        intact: Whether the model is that after `step` steps; False during an update.

    Raises:
        ArgumentError: Unknown options, nothing to train, or weights in float16.
        StateError: A quantizer has no range.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        schedule: Schedule,
        total: int,
        *,
        ranges: str = "frozen",
        train: str = "all",
        layers: Iterable[Pattern] | None = None,
        amp: bool = False,
        optimizer: MakeOptimizer | None = None,
    ) -> None:
        if train not in TRAINED:
            raise ArgumentError(
                f"train is {train!r}; known are {', '.join(TRAINED)}.", "use 'all'."
            )
        require_range_method(ranges)
        require_no_inference(model)
        modules = _choose_modules(model, layers)
        self.model = model
        self.total = total
        self.step = 0
        self.intact = True
        self._objective = objective
        self._schedule = schedule
        self._amp = amp
        self.device = find_device(model)
        self._chosen = [name for name, module in model.named_modules() if module in modules]
        self._exits = ExitStack()
        self._ranges = RangeTuning(model, "frozen" if train == "batchnorm" else ranges, modules)
        self._exits.callback(self._ranges.stop)
        self._batchnorms = [] if train == "ranges" else _list_batchnorms(model, modules)
        self._parameters = self._choose_parameters(modules, train)
        self._freeze_mode()
        self._require_trainable(train)
        # If only BatchNorm or only ranges are trained, they are trained to the end.
        self._live_batchnorm = 1.0 if train == "batchnorm" else schedule.tune_batchnorm
        self._tune_ranges = 1.0 if train == "ranges" else schedule.tune_ranges
        self._optimizer = self._make_optimizer(optimizer or torch.optim.Adam)
        if self._optimizer:
            self._exits.callback(self._optimizer.zero_grad)  # frees the gradients
        self._growing: list[list[TensorQuantizer]] = []  # see `_find_waiting`
        self._watch: OscillationWatch | None = None
        self._sums = self._allocate_sums()

    def _freeze_mode(self) -> None:
        """Use evaluation mode, and gradients only for the trained parameters, until `finish`."""
        trained = set(self._parameters.values())
        for module in self.model.modules():
            self._exits.callback(setattr, module, "training", module.training)
        for parameter in self.model.parameters():
            self._exits.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter in trained)
        self.model.eval()

    def _choose_parameters(self, modules: set[nn.Module], train: str) -> dict[str, nn.Parameter]:
        learned = set(self._ranges.parameters.values())
        in_modules: set[nn.Parameter] = set()
        for module in modules:
            in_modules.update(module.parameters(recurse=False))
        chosen = {}
        for name, parameter in self.model.named_parameters():
            if parameter not in in_modules or not parameter.requires_grad:
                continue
            if train == "all" or (train == "ranges" and parameter in learned):
                chosen[name] = parameter
        return chosen

    def _require_trainable(self, train: str) -> None:
        """Refuse a model with nothing to train, or with weights that Adam cannot train.

        Raises:
            ArgumentError: It is such a model; it does not change.
        """
        trains_statistics = train == "batchnorm" and self._batchnorms
        if not self._parameters and not trains_statistics:
            self.finish()
            raise ArgumentError("there is nothing to train.", _FIXES[train])
        dtypes = {parameter.dtype for parameter in self._parameters.values()}
        if torch.float16 in dtypes:
            self.finish()
            raise ArgumentError(
                "the weights to train are float16, and Adam would divide by 0.",
                "train the model in float32 (model.float()), if you like with amp=True.",
            )

    def _make_optimizer(self, make: MakeOptimizer) -> torch.optim.Optimizer | None:
        if not self._parameters:
            return None
        learned = set(self._ranges.parameters.values())
        weights = []
        biases = []
        scales = []
        for parameter in self._parameters.values():
            if parameter in learned:
                scales.append(parameter)
            elif parameter.dim() > 1:
                weights.append(parameter)
            else:
                biases.append(parameter)
        schedule = self._schedule
        groups = [
            {"params": weights, "lr": schedule.lr, "largest_lr": schedule.lr},
            {"params": biases, "lr": schedule.bias_lr, "largest_lr": schedule.bias_lr},
            {
                "params": scales,
                "lr": schedule.range_lr,
                "largest_lr": schedule.range_lr,
                "eps": _RANGE_EPS,
            },
        ]
        return make([group for group in groups if group["params"]])

    @property
    def lr(self) -> float:
        """Learning rate of weights in the last step, 0 before the first."""
        if self.step == 0:
            return 0.0
        return self._schedule.lr * self._schedule.rate_at(self.step - 1, self.total)

    @property
    def watch(self) -> OscillationWatch | None:
        """The watch of the weights in the last steps; None if too few steps were taken."""
        return self._watch

    def digest_trained(self) -> str:
        """A digest of the chosen modules and parameters."""
        text = "\n".join([*self._chosen, "", *self._parameters])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe_optimizer(self) -> dict[str, Any]:
        """The class of the optimizer, and the settings of each group of parameters."""
        if self._optimizer is None:
            return {}
        groups = []
        for group in self._optimizer.param_groups:
            groups.append({name: value for name, value in group.items() if name != "params"})
        return {"class": type(self._optimizer).__qualname__, "groups": groups}

    def place(self, batch: Any) -> Any:
        """A batch on the device of the model; inference tensors are copied, because they have no gradient."""

        def make_trainable(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if tensor.is_inference() else tensor

        return map_tensors(make_trainable, move_batch(batch, self.device))

    def run_step(self, batch: Any) -> float:
        """Train on one batch.

        Returns:
            The loss before the update, the mean over the samples of all processes.

        Raises:
            StateError: The loss or a gradient is NaN or Inf, or another process failed; the model does not change.
            DataError: A batch that cannot be split among the processes, or of one sample with live BatchNorm.
        """
        with self.failing_together():
            self._stop_ranges_when_due()
            batch = self.place(batch)
            with self._autocast():
                self._objective.balance(batch)
            samples, num_samples = shard_samples(batch)
            self._start_watch_when_due()
            if self._schedule.grow and not self._growing:
                self._growing = _group_by_owner(self.model, order_modules(self.model, batch))
        with self._live_modules(), torch.set_grad_enabled(self._optimizer is not None):
            with self.failing_together():
                loss = self._forward_backward(samples, num_samples)
            is_alone = find_rank()[1] == 1
            figures = self._measure(loss) if is_alone else self._average(loss, samples, num_samples)
            self._require_finite(figures, samples)
        self.intact = False
        if self._optimizer is not None:
            self._update(self._optimizer, figures.norm)
        self._ranges.after_step()
        if self._watch:
            self._watch.after_step()
        self.step += 1
        self.intact = True
        return figures.loss

    def _start_watch_when_due(self) -> None:
        is_due = self.step >= (1 - _WATCHED) * self.total
        if is_due and self._watch is None and self._parameters:
            self._watch = OscillationWatch(self.model)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Run a part of a step before the collective of the processes; an error in it ends the step in all of them.

        Raises:
            StateError: In the other processes, at the collective.
        """
        try:
            yield
        except Exception as error:
            if find_rank()[1] > 1:
                self._stop_ranges_when_due()  # the other processes do so as well
                self._share_failure(error)
            raise

    @contextmanager
    def _live_modules(self) -> Iterator[None]:
        """Set live BatchNorm to training mode, and disable the quantizers that are not yet on, in the block."""
        live = self._find_live()
        statistics = [(buffer, buffer.clone()) for module in live for buffer in module.buffers()]
        with ExitStack() as exits:
            for module in live:
                exits.callback(module.eval)
                module.train()
            for quantizer in self._find_waiting():
                exits.callback(quantizer.enable)
                quantizer.disable()
            try:
                yield
            except BaseException as error:
                for buffer, former in statistics:  # the forward pass has changed them
                    buffer.copy_(former)
                if live and "more than 1 value per channel" in str(error):
                    raise DataError(
                        f"step {self.step + 1}: live BatchNorm needs more than one sample.",
                        "drop the last batch, or fold BatchNorm.",
                    ) from error
                raise

    def _find_live(self) -> list[_BatchNorm]:
        if self.step < self._live_batchnorm * self.total:
            return self._batchnorms
        return []

    def _find_waiting(self) -> list[TensorQuantizer]:
        """The quantizers that are not yet enabled while the quantized part of the model grows."""
        if not self._growing:
            return []
        fraction = (self.step + 1) / (self._schedule.grow * self.total)
        num_enabled = math.ceil(fraction * len(self._growing))
        waiting = []
        for group in self._growing[num_enabled:]:
            waiting += group
        return waiting

    def _forward_backward(self, batch: Any, num_samples: int) -> torch.Tensor:
        """Compute the gradients of the mean loss over the samples of this process.

        Returns:
            That loss.

        Raises:
            ArgumentError: The loss has no gradient.
        """
        self._ranges.begin_step()
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        if num_samples == 0:
            return torch.zeros((), device=self.device)
        with self._autocast():
            loss = self._objective(batch)
        if self._optimizer is not None:
            self._backward(loss)
        return loss.detach().to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._amp)

    def _backward(self, loss: torch.Tensor) -> None:
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        elif not self._find_waiting():  # while quantization grows, ranges may be out of reach
            raise ArgumentError(
                "the loss depends on nothing that is trained.",
                "check the loss, and the patterns in layers.",
            )

    def _measure(self, loss: torch.Tensor) -> _Figures:
        """The figures of a step in one process."""
        gradients = [
            parameter.grad for parameter in self._parameters.values() if parameter.grad is not None
        ]
        norm = _measure_norm(gradients, loss)
        largest = self._ranges.find_largest(self.device)
        values = torch.stack([loss, norm.float(), largest])
        loss_value, norm_value, largest_value = values.tolist()
        return _Figures(loss_value, norm_value, largest_value, norm)

    def _average(self, loss: torch.Tensor, batch: Any, num_samples: int) -> _Figures:
        """Replace gradients, and statistics of live BatchNorm, by their means over the samples of all processes.

        One collective carries all of them, and whether a process has failed: then its number of samples is NaN.

        Returns:
            The figures of all processes together.

        Raises:
            StateError: A process has failed.
        """
        parameters = list(self._parameters.values())
        statistics = self._list_statistics()
        gradients = self._scale_gradients(num_samples)
        has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters])
        is_reached = has_gradient.to(loss.device, non_blocking=True)
        largest = self._ranges.find_largest(self.device)
        is_finite = torch.isfinite(loss) & torch.isfinite(largest)
        weight = torch.where(is_finite, float(num_samples), math.nan)

        parts = [*gradients, *statistics, is_reached, loss, torch.ones_like(loss)]
        sums = self._sums[: self._count_sums()]
        torch.cat([part.flatten() for part in parts], out=sums)
        sum_over_ranks(sums.mul_(weight))
        total_samples = sums[-1].clone()
        means = iter(torch.split(sums.div_(total_samples), [part.numel() for part in parts]))

        mean_gradients = []
        for parameter in parameters:
            mean = next(means)
            if parameter in self._ranges.of_inputs:
                mean = mean / total_samples.sqrt()
            mean_gradients.append(mean.reshape(parameter.shape))
        for buffer in statistics:
            buffer.copy_(next(means).reshape(buffer.shape))
        reached_means = next(means)
        mean_loss = next(means)[0]
        norm = _measure_norm(mean_gradients, loss)
        scalars = torch.stack(
            [mean_loss.float(), norm.float(), total_samples.float(), loss, largest]
        )
        with connected():
            values = torch.cat([scalars, reached_means.float()]).tolist()
        loss_value, norm_value, num_total, local_loss, local_largest, *reached = values
        if math.isnan(num_total):
            local_figures = _Figures(local_loss, 0.0, local_largest, norm)
            raise_together(self._explain_failure(local_figures, batch), StateError)

        for parameter, mean, fraction in zip(parameters, mean_gradients, reached, strict=True):
            # None, not 0: Adam keeps moving a parameter with gradient 0.
            parameter.grad = None
            if fraction:
                parameter.grad = mean.to(parameter.dtype, copy=True)
        return _Figures(loss_value, norm_value, local_largest, norm)

    def _share_failure(self, failure: Exception) -> None:
        """End the step in the other processes, which wait at the collective of `_average`.

        There may be no memory left. So this frees what the step holds, and sends what was allocated before it.

        Raises:
            Exception: `failure`, or what `raise_together` makes of it.
        """
        free_memory(failure)
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        with suppress(StateError):
            sum_over_ranks(self._sums[: self._count_sums()].fill_(math.nan))
        raise_together(failure, StateError)

    def _list_statistics(self) -> list[torch.Tensor]:
        """The statistics of live BatchNorm."""
        statistics = []
        for module in self._find_live():
            statistics += [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        return statistics

    def _count_sums(self) -> int:
        """Number of values that the processes add up: gradients, whether there is one, statistics, loss, samples."""
        parameters = self._parameters.values()
        num_values = sum(tensor.numel() for tensor in [*parameters, *self._list_statistics()])
        return num_values + len(parameters) + 2

    def _allocate_sums(self) -> torch.Tensor:
        """Memory for what the processes add up in a step; none if there is one process."""
        if find_rank()[1] == 1:
            return torch.empty(0)
        dtype = torch.float32
        for parameter in self._parameters.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return torch.empty(self._count_sums(), dtype=dtype, device=self.device)

    def _scale_gradients(self, num_samples: int) -> list[torch.Tensor]:
        """The gradients of this process; 0 for parameters without one.

        LSQ divides the gradient of an input's range by the root of the number of values, of which this process saw
        only its part. The factor sqrt(samples) undoes that, so that the gradients can be added.
        """
        gradients = []
        for parameter in self._parameters.values():
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            if parameter in self._ranges.of_inputs:
                gradient.mul_(math.sqrt(num_samples))
            gradients.append(gradient)
        return gradients

    def _require_finite(self, figures: _Figures, batch: Any) -> None:
        """Refuse NaN and Inf.

        Raises:
            StateError: The message names the layer, the quantizer or the parameter.
        """
        failure = self._explain_failure(figures, batch)
        if failure is not None:
            raise failure

    def _update(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
        """Clip the gradient, which has this norm, and take a step."""
        nn.utils.clip_grads_with_norm_(self._parameters.values(), self._schedule.max_norm, norm)
        rate = self._schedule.rate_at(self.step, self.total)
        for group in optimizer.param_groups:
            group["lr"] = group["largest_lr"] * rate
        optimizer.step()

    def _explain_failure(self, figures: _Figures, batch: Any) -> StateError | None:
        """The error of a step whose figures are NaN or Inf; None if they are finite."""
        step = self.step + 1
        if not math.isfinite(figures.loss):
            layer = find_nonfinite(self.model, batch)
            origin = "no layer returns it for finite inputs, so it comes from the batch or the loss"
            if layer:
                origin = f"it begins in {layer}"
            reason = f"the loss is {figures.loss} in step {step}; {origin}."
        elif not math.isfinite(figures.largest):
            return self._ranges.explain_nonfinite()
        elif not math.isfinite(figures.norm_value):
            reason = self._explain_gradient(batch)
        else:
            return None
        return StateError(reason, "lower the learning rate (lr), or check the part that is named.")

    def _explain_gradient(self, batch: Any) -> str:
        """The origin of a gradient with NaN or Inf."""
        nonfinite = []
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                nonfinite.append(name)
        if not nonfinite:
            return f"the norm of the gradient is too large for float32 in step {self.step + 1}."
        places = {name: place for place, name in enumerate(order_modules(self.model, batch))}

        def place_of(parameter: str) -> int:
            return places.get(parameter.rpartition(".")[0], -1)

        # The backward pass goes from the last module to the first.
        first = max(nonfinite, key=place_of)
        return f"the gradient of {first} is NaN or Inf in step {self.step + 1}."

    def _stop_ranges_when_due(self) -> None:
        if self.step >= self._tune_ranges * self.total:
            self._stop_ranges()

    def _stop_ranges(self) -> None:
        for name in self._ranges.parameters:
            self._parameters.pop(name, None)
        self._ranges.stop()

    def pack(self) -> dict[str, torch.Tensor]:
        """Model, objective, optimizer and counts of oscillations as tensors, from which `unpack` continues exactly."""
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            tensors[f"{_MODEL_PREFIX}{name}"] = tensor
        for name, tensor in self._objective.pack().items():
            tensors[f"{_OBJECTIVE_PREFIX}{name}"] = tensor
        if self._watch:
            for name, tensor in self._watch.pack().items():
                tensors[f"{_WATCH_PREFIX}{name}"] = tensor
        if self._optimizer:
            for name, parameter in self._parameters.items():
                state = self._optimizer.state.get(parameter, {})
                for key, value in state.items():
                    tensors[f"{_OPTIMIZER_PREFIX}{name}//{key}"] = torch.as_tensor(value)
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Continue from the state that another trainer of the same model and options packed after `step` steps."""
        is_learned = any(name.endswith("._log2_amax") for name in tensors)
        if self._ranges.parameters and not is_learned:
            self._stop_ranges()  # they were no longer learned then
        self.model.load_state_dict(select_prefix(tensors, _MODEL_PREFIX))
        self._objective.unpack(select_prefix(tensors, _OBJECTIVE_PREFIX))
        if self._optimizer:
            self._unpack_optimizer(self._optimizer, tensors)
        counts = select_prefix(tensors, _WATCH_PREFIX)
        if counts:
            self._watch = OscillationWatch(self.model)
            self._watch.unpack(counts)
        self.step = step

    def _unpack_optimizer(
        self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        for name, parameter in self._parameters.items():
            state = select_prefix(tensors, f"{_OPTIMIZER_PREFIX}{name}//")
            for key, tensor in state.items():
                if key != "step":  # Adam keeps its count of steps on the CPU
                    state[key] = tensor.to(parameter.device)
            if state:
                optimizer.state[parameter] = state

    def finish(self) -> None:
        """Restore modes and flags, and keep the ranges; may be called more than once."""
        self._exits.close()


def _measure_norm(gradients: list[torch.Tensor], loss: torch.Tensor) -> torch.Tensor:
    """The norm of all gradients together, 0 without a gradient; on the device of the loss."""
    if not gradients:
        return torch.zeros_like(loss)
    return nn.utils.get_total_norm(gradients).to(loss.device, non_blocking=True)


def require_no_inference(model: nn.Module) -> None:
    """Refuse training in inference mode, and parameters that were made in it.

    Args:
        model: The model.

    Raises:
        StateError: Either of the two.
    """
    is_made_there = any(parameter.is_inference() for parameter in model.parameters())
    if torch.is_inference_mode_enabled() or is_made_there:
        raise StateError(
            "in torch.inference_mode there are no gradients.",
            "create and tune the model outside of it.",
        )


def _list_batchnorms(model: nn.Module, modules: set[nn.Module]) -> list[_BatchNorm]:
    """The BatchNorm layers among some modules, in the order of the model."""
    batchnorms = []
    for module in model.modules():
        if module in modules and isinstance(module, _BatchNorm):
            batchnorms.append(module)
    return batchnorms


def copy_float(model: nn.Module) -> nn.Module:
    """A float copy of a quantized model."""
    teacher = copy.deepcopy(model)
    restore_modules(teacher)
    for _, quantizer in named_quantizers(teacher):  # of classes that exist only quantized
        quantizer.disable()
    return teacher.eval().requires_grad_(False)


def digest_weights(model: nn.Module) -> str:
    """A digest of a calibrated model: names, formats, float layers, and all values of its state."""
    disabled = [name for name, quantizer in named_quantizers(model) if not quantizer.is_enabled]
    digest = hashlib.sha256(f"{fingerprint_model(model)} {disabled}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def _choose_modules(model: nn.Module, patterns: Iterable[Pattern] | None) -> set[nn.Module]:
    """The modules that match, and all modules in them; all modules without patterns."""
    if patterns is None:
        return set(model.modules())
    wanted = Patterns(patterns, "layers")
    modules: set[nn.Module] = set()
    for name, module in model.named_modules():
        if wanted.match([name], module):
            modules.update(module.modules())
    wanted.warn_unused("module")
    return modules


def _group_by_owner(model: nn.Module, order: Sequence[str]) -> list[list[TensorQuantizer]]:
    """The enabled quantizers, grouped by module, in the order in which the modules first return."""
    groups: dict[str, list[TensorQuantizer]] = {}
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled:
            owner = name.rpartition(".")[0]
            groups.setdefault(owner, []).append(quantizer)
    places: dict[str, int] = {}
    for place, name in enumerate(order):
        places.setdefault(name, place)

    def place_of(owner: str) -> int:
        return places.get(owner, len(order))

    return [groups[owner] for owner in sorted(groups, key=place_of)]
