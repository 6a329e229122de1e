"""One step of fine-tuning after the other: which modules are live, gradient, update."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from qdq.calibrate.collect import bytes_of, fingerprint_model
from qdq.distributed import find_rank, raise_together, shard_samples, sum_over_ranks
from qdq.errors import ArgumentError, DataError, StateError
from qdq.forward import find_device
from qdq.patterns import Pattern, Patterns
from qdq.qat.losses import Objective
from qdq.qat.ranges import RangeTuning, require_range_method
from qdq.qat.watch import OscillationWatch, find_nonfinite, order_modules
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.schedule import Schedule
from qdq.swap import restore_modules

TRAINED = ("all", "ranges", "batchnorm")
_RANGE_EPS = 1e-12  # of Adam: gradients of ranges are about 1e-9, and with its 1e-8 they would hardly be learned
_WATCHED = 0.25  # last share of the steps in which oscillating weights are looked for


class Trainer:
    """What changes the model.

    Between two steps the model is in evaluation mode with all its quantizers on, and may be measured or saved.

    Args:
        model: A calibrated model, on its device.
        objective: Its loss.
        schedule: Length and learning rates.
        total: Number of steps.
        ranges: As for `finetune`.
        train: As for `finetune`.
        layers: As for `finetune`.
        amp: As for `finetune`.

    Attributes:
        step: How many steps are done.
        intact: Whether the model is that of `step`; False within an update.

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
    ) -> None:
        if train not in TRAINED:
            raise ArgumentError(
                f"train is {train!r}; known are {', '.join(TRAINED)}.", "use 'all'."
            )
        if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
            raise StateError(
                "in torch.inference_mode there are no gradients.", "make and tune it outside."
            )
        chosen = _choose_modules(model, layers)
        self._chosen = [name for name, module in model.named_modules() if module in chosen]
        self.model, self.total, self.step, self.intact = model, total, 0, True
        self._objective, self._schedule, self._amp = objective, schedule, amp
        self._device = find_device(model)
        self._exits = ExitStack()
        require_range_method(ranges)
        self._ranges = RangeTuning(model, "frozen" if train == "batchnorm" else ranges, chosen)
        self._exits.callback(self._ranges.stop)
        live = chosen if train != "ranges" else set()
        self._batchnorms = [m for m in model.modules() if m in live and isinstance(m, _BatchNorm)]
        self._parameters = self._choose_parameters(chosen, train)
        self._freeze_mode()
        if not self._parameters and not (train == "batchnorm" and self._batchnorms):
            self.finish()
            raise ArgumentError("there is nothing to train.", _FIXES[train])
        if any(p.dtype == torch.float16 for p in self._parameters.values()):
            self.finish()
            found = "the weights to train are float16, in which Adam divides by 0."
            raise ArgumentError(
                found, "train the model in float32 (model.float()), with amp=True if you like."
            )
        # what is all that is trained is trained to the end
        self._live_batchnorm = 1.0 if train == "batchnorm" else schedule.tune_batchnorm
        self._tune_ranges = 1.0 if train == "ranges" else schedule.tune_ranges
        self._optimizer = self._make_optimizer()
        if self._optimizer:
            self._exits.callback(self._optimizer.zero_grad)  # frees the gradients
        self._growing: list[list[TensorQuantizer]] = []  # see `_find_waiting`
        self._watch: OscillationWatch | None = None

    def _freeze_mode(self) -> None:
        """Evaluation mode, and gradients only of what is trained, until `finish` puts back what was."""
        trained = set(self._parameters.values())
        for module in self.model.modules():
            self._exits.callback(setattr, module, "training", module.training)
        for parameter in self.model.parameters():
            self._exits.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter in trained)
        self.model.eval()

    def _choose_parameters(self, modules: set[nn.Module], train: str) -> dict[str, nn.Parameter]:
        learned = set(self._ranges.parameters.values())
        owners = {
            p: module for module in modules for p in module._parameters.values() if p is not None
        }
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter in owners
            and parameter.requires_grad
            and (train == "all" or (train == "ranges" and parameter in learned))
        }

    def _make_optimizer(self) -> torch.optim.Optimizer | None:
        if not self._parameters:
            return None
        learned = set(self._ranges.parameters.values())
        weights = [p for p in self._parameters.values() if p not in learned and p.dim() > 1]
        biases = [p for p in self._parameters.values() if p not in learned and p.dim() <= 1]
        scales = [p for p in self._parameters.values() if p in learned]
        rates = (
            (weights, self._schedule.lr),
            (biases, self._schedule.bias_lr),
            (scales, self._schedule.range_lr),
        )
        groups = [{"params": params, "lr": lr, "largest_lr": lr} for params, lr in rates if params]
        if scales:
            groups[-1]["eps"] = _RANGE_EPS
        return torch.optim.Adam(groups)

    @property
    def lr(self) -> float:
        """Learning rate of weights in the last step, 0 before the first."""
        return (
            self._schedule.lr * self._schedule.rate_at(self.step - 1, self.total)
            if self.step
            else 0.0
        )

    def digest_trained(self) -> str:
        """What tells one choice of modules and parameters from another."""
        return hashlib.sha256(
            "\n".join([*self._chosen, "", *self._parameters]).encode()
        ).hexdigest()[:16]

    def place(self, batch: Any) -> Any:
        """A batch on the device of the model; what inference mode made is copied, for it knows no gradient."""
        return tree_map_only(
            torch.Tensor,
            lambda tensor: (
                tensor.to(self._device)
                if not tensor.is_inference()
                else tensor.to(self._device, copy=True)
            ),
            batch,
        )

    def run_step(self, batch: Any) -> float:
        """Train on one batch; gives the loss before the update, the mean over the samples of all processes.

        Raises:
            StateError: The loss or a gradient is NaN or Inf, or another process failed; the model is as it was before.
            DataError: A batch that cannot be shared among processes, or of one sample with live BatchNorm.
        """
        with self.failing_together():
            self._stop_ranges_when_due()
            batch = self.place(batch)
            own, samples = shard_samples(batch)
            if (
                self._watch is None
                and self.step >= (1 - _WATCHED) * self.total
                and self._parameters
            ):
                self._watch = OscillationWatch(self.model)
            if self._schedule.grow and not self._growing:
                self._growing = _group_by_owner(self.model, order_modules(self.model, batch))
        with self._live_modules(), torch.set_grad_enabled(self._optimizer is not None):
            with self.failing_together():
                loss = self._forward_backward(own, samples)
            if find_rank()[1] > 1:
                loss = self._average(loss, samples)
            self._require_finite(float(loss), own)
        self.intact = False
        if self._optimizer is not None:
            self._update(self._optimizer)
        self._ranges.after_step()
        if self._watch:
            self._watch.after_step()
        self.step += 1
        self.intact = True
        return float(loss)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A part of a step before its processes meet: an error in it ends the step in all of them, not in this alone.

        Raises:
            StateError: In the other processes, where they meet.
        """
        try:
            yield
        except Exception as error:
            if find_rank()[1] > 1:
                self._stop_ranges_when_due()  # those of the others are
                with suppress(StateError):
                    self._average(torch.zeros((), device=self._device), 0, error)
            raise

    @contextmanager
    def _live_modules(self) -> Iterator[None]:
        """BatchNorm in training mode while it is live; the quantizers whose turn has not come are off."""
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
                for buffer, before in statistics:  # the forward has changed them
                    buffer.copy_(before)
                if live and "more than 1 value per channel" in str(error):
                    found, fix = (
                        "live BatchNorm needs more than one sample.",
                        "drop the last batch, or fold BatchNorm.",
                    )
                    raise DataError(f"step {self.step + 1}: {found}", fix) from error
                raise

    def _find_live(self) -> list[_BatchNorm]:
        return self._batchnorms if self.step < self._live_batchnorm * self.total else []

    def _find_waiting(self) -> list[TensorQuantizer]:
        """The quantizers that are not yet on while the quantized share grows."""
        if not self._growing:
            return []
        share = (self.step + 1) / (self._schedule.grow * self.total)
        return [
            quantizer
            for group in self._growing[math.ceil(share * len(self._growing)) :]
            for quantizer in group
        ]

    def _forward_backward(self, batch: Any, samples: int) -> torch.Tensor:
        """Gradients of the mean loss over the samples of this process; gives that loss.

        Raises:
            ArgumentError: The loss has no gradient.
            StateError: The loss, or what a range follows, is NaN or Inf.
        """
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        if not samples:
            return torch.zeros((), device=self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp):
            loss = self._objective(batch)
        if self._optimizer is not None:
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            elif not self._find_waiting():  # while quantization grows, ranges may be out of reach
                found = "the loss depends on nothing that is trained."
                raise ArgumentError(found, "check the loss, and the patterns in layers.")
        loss = loss.detach()
        if not bool(torch.isfinite(loss)):
            raise self._explain_nonfinite(float(loss), batch)
        self._ranges.require_finite()
        return loss

    def _average(
        self, loss: torch.Tensor, samples: int, failure: Exception | None = None
    ) -> torch.Tensor:
        """Replace gradients, and statistics of live BatchNorm, by their mean over the samples of all processes.

        One collective carries all, and whether a process has failed: the number of its samples is NaN then.

        Returns:
            The mean of the loss.

        Raises:
            Exception: `failure`.
            StateError: Another process has failed.
        """
        parameters = list(self._parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if (
                parameter in self._ranges.of_inputs
            ):  # it is divided by the root of the number of values of this share
                gradient.mul_(math.sqrt(samples))
        statistics = [
            b for module in self._find_live() for b in module.buffers() if b.is_floating_point()
        ]
        reached = torch.tensor([p.grad is not None for p in parameters], device=loss.device)
        own = [*gradients, *statistics, reached, loss, torch.ones_like(loss)]
        share = torch.cat([tensor.flatten() for tensor in own]) * (
            samples if failure is None else math.nan
        )
        share = sum_over_ranks(share)
        if share[-1].isnan():
            raise_together(failure, StateError)
        means = torch.split(share / share[-1], [tensor.numel() for tensor in own])
        for parameter, mean, is_reached in zip(parameters, means, means[-3].tolist(), strict=False):
            whole = mean / share[-1].sqrt() if parameter in self._ranges.of_inputs else mean
            # None, not 0: Adam goes on moving what has no gradient in a step
            parameter.grad = (
                whole.reshape(parameter.shape).to(parameter.dtype, copy=True)
                if is_reached
                else None
            )
        for buffer, mean in zip(statistics, means[len(parameters) :], strict=False):
            buffer.copy_(mean.reshape(buffer.shape))
        return means[-2]

    def _require_finite(self, loss: float, batch: Any) -> None:
        """Refuse NaN and Inf, and clip the gradient.

        Raises:
            StateError: With the layer or the parameter.
        """
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            raise self._explain_nonfinite(loss, batch)
        nn.utils.clip_grads_with_norm_(self._parameters.values(), self._schedule.max_norm, norm)

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        rate = self._schedule.rate_at(self.step, self.total)
        for group in optimizer.param_groups:
            group["lr"] = group["largest_lr"] * rate
        optimizer.step()

    def _explain_nonfinite(self, loss: float, batch: Any) -> StateError:
        return StateError(
            self._find_nonfinite(loss, batch),
            "lower the learning rate (lr), or look at what is named.",
        )

    def _find_nonfinite(self, loss: float, batch: Any) -> str:
        if math.isfinite(loss):
            bad = [
                n
                for n, p in self._parameters.items()
                if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            if not bad:
                return f"the norm of the gradient is too large for float32 in step {self.step + 1}."
            order = {name: place for place, name in enumerate(order_modules(self.model, batch))}
            first = max(
                bad, key=lambda name: order.get(name.rpartition(".")[0], -1)
            )  # that the backward reached
            return f"the gradient of {first} is NaN or Inf in step {self.step + 1}."
        layer = find_nonfinite(self.model, batch)
        where = (
            f"it begins in {layer}"
            if layer
            else "no layer makes it of finite inputs, so the batch or the loss does"
        )
        return f"the loss is {loss} in step {self.step + 1}; {where}."

    def _stop_ranges_when_due(self) -> None:
        if self.step >= self._tune_ranges * self.total:
            self._stop_ranges()

    def _stop_ranges(self) -> None:
        for name in self._ranges.parameters:
            self._parameters.pop(name, None)
        self._ranges.stop()

    def pack(self) -> dict[str, torch.Tensor]:
        """Model, optimizer and what was seen of oscillations as tensors, from which `unpack` goes on exactly."""
        model = {f"model//{name}": tensor for name, tensor in self.model.state_dict().items()}
        seen = (
            {f"watch//{name}": tensor for name, tensor in self._watch.pack().items()}
            if self._watch
            else {}
        )
        states = self._optimizer.state if self._optimizer else {}
        return (
            model
            | seen
            | {
                f"optimizer//{name}//{key}": torch.as_tensor(value)
                for name, parameter in self._parameters.items()
                for key, value in states.get(parameter, {}).items()
            }
        )

    def unpack(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Go on where another trainer of the same model and options packed itself, after so many steps."""
        if self._ranges.parameters and not any(name.endswith("._log2_amax") for name in tensors):
            self._stop_ranges()  # they were no longer learned then
        self.model.load_state_dict(
            {k.removeprefix("model//"): t for k, t in tensors.items() if k.startswith("model//")}
        )
        for name, parameter in self._parameters.items():
            prefix = f"optimizer//{name}//"
            state = {
                key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)
            }
            if self._optimizer and state:  # Adam keeps its count of steps on the CPU
                moved = {
                    key: t if key == "step" else t.to(parameter.device) for key, t in state.items()
                }
                self._optimizer.state[parameter] = moved
        if seen := {
            k.removeprefix("watch//"): t for k, t in tensors.items() if k.startswith("watch//")
        }:
            self._watch = OscillationWatch(self.model)
            self._watch.unpack(seen)
        self.step = step

    @property
    def watch(self) -> OscillationWatch | None:
        """What saw the weights of the last steps; None where too few were taken."""
        return self._watch

    def finish(self) -> None:
        """Put back modes and flags, and leave the ranges as they are; may be called again."""
        self._exits.close()


_FIXES = {
    "all": "check the patterns in layers; parameters with requires_grad=False stay as they are.",
    "ranges": "learn ranges with ranges='lsq' or 'pact', and check the patterns in layers.",
    "batchnorm": "the model has no BatchNorm, or it is folded: tune it before fold_batchnorm.",
}


def copy_float(model: nn.Module) -> nn.Module:
    """The float model of a quantized one, on its own."""
    teacher = copy.deepcopy(model)
    restore_modules(teacher)
    for _, quantizer in named_quantizers(teacher):  # of classes that exist only quantized
        quantizer.disable()
    return teacher.eval().requires_grad_(False)


def digest_weights(model: nn.Module) -> str:
    """What tells one calibrated model from another: names, formats, float layers, and all values of its state."""
    off = [name for name, quantizer in named_quantizers(model) if not quantizer.is_enabled]
    digest = hashlib.sha256(f"{fingerprint_model(model)} {off}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def _choose_modules(model: nn.Module, patterns: Iterable[Pattern] | None) -> set[nn.Module]:
    if patterns is None:
        return set(model.modules())
    wanted = Patterns(patterns, "layers")
    chosen = [module for name, module in model.named_modules() if wanted.match([name], module)]
    wanted.warn_unused("module")
    return {inner for module in chosen for inner in module.modules()}


def _group_by_owner(model: nn.Module, order: Sequence[str]) -> list[list[TensorQuantizer]]:
    """The quantizers that are on, those of one module together, in the order in which the modules return."""
    groups: dict[str, list[TensorQuantizer]] = {}
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled:
            groups.setdefault(name.rpartition(".")[0], []).append(quantizer)
    places = {
        name: place for place, name in reversed([*enumerate(order)])
    }  # of a module that runs again the first
    return [groups[name] for name in sorted(groups, key=lambda name: places.get(name, len(order)))]
