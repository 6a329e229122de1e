"""Block reconstruction: learns rounding, biases and activation ranges of a residual block for the output of the block.

Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu: BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction, ICLR 2021 (arXiv 2102.05426): the layers of a block are learned together, because their errors meet in
its output. Wei, Gong, Li, Liu, Yu: QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
Quantization, ICLR 2022 (arXiv 2203.05740): in training, elements of the activations and of the input of the block stay
unquantized at random, so that what is learned also holds for other data.

Blocks are learned in the order in which they run. The target is the output of the float block, the input comes from the
blocks before, which are learned already. Weights are rounded as in AdaRound (`accuracy.adaround`), ranges have the
gradient of LSQ. A quarter of the samples is held out: a block that is not better on them stays as it was.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from qdq.accuracy.adaround import leave_out_fp8
from qdq.accuracy.code_choice import SoftCodes
from qdq.accuracy.layerwise import (
    HELD_OUT,
    FlatArrays,
    LayerPlan,
    explaining_joined,
    flatten_outputs,
    format_change,
    measure_change,
    plan_layers,
    require_counts,
    require_modules,
    run_flat,
    take_pair,
    weigh_passing,
)
from qdq.batch import (
    count_samples,
    floats_of,
    is_by_sample,
    join_batches,
    list_leaves,
    map_leaves,
    map_tensors,
    tensors_of,
)
from qdq.corrections import AccuracyPass, keep_ranges, record_pass, redo_passes, undoing_passes
from qdq.device import read_numbers, without_tf32
from qdq.errors import ArgumentError, DataError, StateError
from qdq.forward import call_model, evaluating, require_model
from qdq.nn import QuantMixin
from qdq.nn.scaling import is_shifted, shift_of_mean
from qdq.outputs import Mask, OutputView, Selection
from qdq.quantize import own_tensor
from qdq.quantizer import TensorQuantizer, disable_quantization, named_quantizers
from qdq.run import require_seed
from qdq.units import name_block

logger = logging.getLogger(__name__)

_ROUNDING_RATE = 2e-2  # learning rate of the sigmoids
_BIAS_RATE = 1e-3  # relative to the deviation of the output of the layer
_RANGE_RATE = 5e-3  # of log2 of the range
_EVERYTHING = (-math.inf, math.inf)  # interval of an output that no clamp follows


@dataclass(frozen=True)
class ReconstructedBlock:
    """Result for one block.

    Args:
        block: Dotted name of the block, or of a layer that is learned by itself.
        layers: The layers in it.
        before: Squared error of its output on the held-out samples, relative to the variance of the float output; of
            several tensors, the mean. NaN if it was skipped.
        after: The same in the end; as before if it stays as it was.
        reason: Why it was skipped, why it stays as it was, or why a layer is learned by itself; empty otherwise.
    """

    block: str
    layers: tuple[str, ...]
    before: float
    after: float
    reason: str = ""


@dataclass(frozen=True)
class Reconstruction:
    """Result of `reconstruct_blocks`.

    Args:
        blocks: The blocks in the order in which they run; then the skipped layers.
        before_db: SQNR of the outputs against the float model on the same batches, before the reconstruction, in dB;
            of several outputs, that of the worst.
        after_db: The same after the reconstruction.
        outputs: Name -> SQNR before and after, if there are several outputs.
    """

    blocks: tuple[ReconstructedBlock, ...]
    before_db: float
    after_db: float
    outputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def format_table(self) -> str:
        """SQNR before and after, the error of each block, and the skipped layers with the reasons."""
        better = [block for block in self.blocks if block.after < block.before]
        lines = [
            f"{len(better)} blocks reconstructed: "
            f"SQNR {self.before_db:.2f} to {self.after_db:.2f} dB"
        ]
        lines += format_change(self.outputs)
        for block in self.blocks:
            parts = []
            if block.after < block.before:
                parts.append(f"error {block.before:.3%} to {block.after:.3%}")
            if block.reason:
                parts.append(block.reason)
            lines.append(f"  {block.block}: {'; '.join(parts)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Options:
    """The options of the search, see `reconstruct_blocks`."""

    steps: int
    batch_size: int
    drop: float
    seed: int

    def __post_init__(self) -> None:
        require_counts(steps=self.steps, batch_size=self.batch_size)
        if not 0 <= self.drop <= 1:
            raise ArgumentError(
                f"drop is {self.drop!r}; expected a probability, 0 to 1.", "use 0.5."
            )


@without_tf32()
def reconstruct_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 100,
    batch_size: int = 16,
    drop: float = 0.5,
    seed: int = 0,
    reference: nn.Module | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> Reconstruction:
    """Learn the codes of the weights, the biases and the input ranges of each block for its output; in place.

    A block is the module that the name of a layer gives up to its first number (`units.name_block`), for instance
    `layer1.0` of a ResNet. A layer that has no such block, or whose block does not run once on tensors with the samples
    first, is learned by itself. The last quarter of the samples is held out of training. A block whose error on it does
    not fall stays as it was.

    Afterwards weights are the values of their learned codes, and ranges are plain buffers: nearest rounding of the
    weights gives these codes, so saving and exporting work as before. A layer without a bias gets one, which a swapped
    model accepts in a state dict and a float model does not. On a GPU, everything runs without TF32.

    The layers keep their float weights and biases, and use them while they are not quantized. If ranges or the choice
    of float layers change later, the ranges of the calibration come back and the reconstruction is done again
    (`qdq.corrections`). If weights were rounded before, it starts from their codes; if biases were corrected before,
    they are corrected again at the end. After Ctrl-C, the blocks that are done stay reconstructed.

    Args:
        model: A calibrated model.
        batches: As for `calibrate_model`; they must fit in memory together, with the inputs and outputs of all blocks.
        steps: Steps of the search in each block.
        batch_size: Samples in a step.
        drop: Probability with which an element of an activation or of the input of a block is not quantized in a step.
        seed: Seed of all random choices.
        reference: The float model. None: the model itself with its quantizers off and its float weights.
        outputs: Parts of the outputs to report, as for `predictor.predict`; None for all.
        mask: What leaves padding out of these figures, as for `predictor.predict`.

    Returns:
        The blocks and the skipped layers, with the SQNR before and after.

    Raises:
        ArgumentError: A reference with other layers, an unknown output, or an option out of range.
        ArgumentTypeError: One tensor or dictionary instead of batches, or a seed that is no integer.
        DataError: Fewer than four samples, or batches that differ in shape.
        StateError: No layer is quantized, one has no range, or the outputs hold NaN or Inf; in `torch.inference_mode`.
    """
    require_model(model)
    require_seed(seed)
    options = _Options(steps, batch_size, drop, seed)
    if torch.is_inference_mode_enabled():
        raise StateError(
            "in torch.inference_mode there are no gradients.",
            "reconstruct the blocks outside of it.",
        )
    inputs = join_batches(batches)
    _require_samples(inputs)
    view = OutputView(outputs, mask)
    again = partial(
        reconstruct_blocks,
        batches=[inputs],
        steps=steps,
        batch_size=batch_size,
        drop=drop,
        seed=seed,
        reference=reference,
        outputs=outputs,
        mask=mask,
    )
    with undoing_passes(model, "reconstruct_blocks") as later:
        plan = leave_out_fp8(plan_layers(model, inputs))
        blocks = _plan_blocks(model, plan, inputs)
        outputs_before = run_flat(model, inputs, view)
        records, expected = _record(reference or model, blocks, inputs, view)
        for layer in plan.layers.values():
            layer.keep_float()
        keep_ranges(model, [leader for block in blocks for leader in block.ranges])
        record_pass(model, AccuracyPass("reconstruct_blocks", again))
        rows, reconstructed_outputs = _reconstruct_in_order(model, blocks, records, inputs, options)
        redo_passes(model, later)
    for name, reason in plan.skipped.items():
        rows.append(ReconstructedBlock(name, (name,), math.nan, math.nan, reason))
    outputs_after = flatten_outputs(reconstructed_outputs, inputs, view)
    change = measure_change(expected, outputs_before, outputs_after)
    return Reconstruction(blocks=tuple(rows), **vars(change))


def _require_samples(inputs: Any) -> None:
    num_samples = count_samples(inputs)
    if num_samples < HELD_OUT:
        raise DataError(
            f"the batches hold {num_samples} samples; expected {HELD_OUT} or more, of which a quarter is held out.",
            "give more samples; 64 images are a good number.",
        )


@dataclass(frozen=True)
class _Block:
    """Layers that are learned together.

    Args:
        name: Dotted name.
        module: The module; a layer if it is learned by itself.
        layers: The layers by dotted name.
        interval: The values of the output that the function after it passes on.
        activations: The quantizers of activations in it.
        ranges: Those that hold a range which is learned.
        note: Why a layer is learned by itself; empty otherwise.
    """

    name: str
    module: nn.Module
    layers: dict[str, QuantMixin]
    interval: tuple[float, float]
    activations: list[TensorQuantizer]
    ranges: list[TensorQuantizer]
    note: str


def _plan_blocks(model: nn.Module, plan: LayerPlan, inputs: Any) -> list[_Block]:
    """The blocks of a model, in the order in which they run."""
    modules = dict(model.named_modules())
    names = {name_block(name) for name in plan.layers}
    candidates = {name: modules[name] for name in names - set(plan.layers) if name in modules}
    runs = _observe_runs(model, plan, candidates, inputs)
    members: dict[str, list[str]] = defaultdict(list)
    notes: dict[str, str] = {}
    for name in plan.layers:
        # The outermost block that runs this layer, so that no block runs inside another one.
        usable = [block for block in runs.blocks_of[name] if not runs.reason_against(block)]
        if usable:
            members[usable[0]].append(name)
        else:
            members[name].append(name)
            notes[name] = _explain_single(name, runs)
    blocks = []
    users = _list_users(model)
    for name, layers in members.items():
        module = modules[name]
        block_layers = {layer: plan.layers[layer] for layer in layers}
        activations = _list_activations([module, *block_layers.values()])
        blocks.append(
            _Block(
                name,
                module,
                block_layers,
                plan.intervals.get(name, _EVERYTHING),
                activations,
                _list_learned_ranges(activations, users),
                notes.get(name, ""),
            )
        )
    return blocks


@dataclass(frozen=True)
class _Runs:
    """What a forward on two samples shows of the modules that may be blocks.

    Args:
        counts: Number of runs of each.
        without_samples: Those whose inputs or outputs do not have the samples first.
        blocks_of: Layer -> those that run while it runs, the outermost first.
    """

    counts: Counter[str]
    without_samples: set[str]
    blocks_of: dict[str, tuple[str, ...]]

    def reason_against(self, block: str) -> str:
        """Why a module is no block; empty if it is one."""
        if self.counts[block] != 1:
            return f"{block} runs {self.counts[block]} times in one forward"
        if block in self.without_samples:
            return f"the inputs or outputs of {block} do not have the samples first"
        return ""


def _observe_runs(
    model: nn.Module, plan: LayerPlan, candidates: Mapping[str, nn.Module], inputs: Any
) -> _Runs:
    pair = take_pair(inputs)
    size = count_samples(pair)
    runs = _Runs(Counter(), set(), {})
    running: list[str] = []

    def enter(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(name)
        runs.counts[name] += 1
        if not _list_rows((args, kwargs), size):
            runs.without_samples.add(name)

    def leave(name: str, _: nn.Module, __: Any, outputs: Any) -> None:
        running.pop()
        if not _list_rows(outputs, size):
            runs.without_samples.add(name)

    def note(name: str, _: nn.Module, __: Any) -> None:
        runs.blocks_of[name] = tuple(running)

    with ExitStack() as hooks:
        for name, module in candidates.items():
            handle = module.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(module.register_forward_hook(partial(leave, name)).remove)
        for name, layer in plan.layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(note, name)).remove)
        with disable_quantization(model), evaluating(model):
            call_model(model, pair)
    return runs


def _list_rows(tree: Any, size: int) -> list[torch.Tensor]:
    """The floating-point tensors of a tree with one row for each sample."""
    return [tensor for tensor in floats_of(tree) if is_by_sample(tensor, size)]


def _explain_single(layer: str, runs: _Runs) -> str:
    """Why a layer is learned by itself; empty if its name has no block."""
    block = name_block(layer)
    if block == layer:
        return ""
    reason = runs.reason_against(block) or f"it runs outside of {block}"
    return f"learned by itself: {reason}"


def _list_users(model: nn.Module) -> dict[TensorQuantizer, list[TensorQuantizer]]:
    """The quantizers that use each range."""
    users: dict[TensorQuantizer, list[TensorQuantizer]] = defaultdict(list)
    for _, quantizer in named_quantizers(model):
        users[quantizer.leader].append(quantizer)
    return users


def _list_activations(modules: Iterable[nn.Module]) -> list[TensorQuantizer]:
    """The quantizers of activations in some modules that are on; they have one range for a whole tensor."""
    activations: dict[TensorQuantizer, None] = {}
    of_weights = set()
    for module in modules:
        for child in module.modules():
            if isinstance(child, QuantMixin):
                of_weights |= {getattr(child, name) for name in child.weights_of(child)}
            if isinstance(child, TensorQuantizer) and child.is_enabled and child.is_quantizing:
                amax = child.amax
                if amax is not None and amax.numel() == 1:
                    activations[child] = None
    return [quantizer for quantizer in activations if quantizer not in of_weights]


def _list_learned_ranges(
    activations: list[TensorQuantizer], users: Mapping[TensorQuantizer, list[TensorQuantizer]]
) -> list[TensorQuantizer]:
    """The quantizers that hold a range which nothing outside of their block uses."""
    inside = set(activations)
    leaders = [quantizer for quantizer in activations if quantizer.leader is quantizer]
    return [leader for leader in leaders if inside.issuperset(users[leader])]


@dataclass(frozen=True)
class _Call:
    """The float call of a block.

    Args:
        inputs: Positional and keyword arguments.
        outputs: What it returned.
    """

    inputs: tuple[Any, Any]
    outputs: Any


def _record(
    model: nn.Module, blocks: list[_Block], inputs: Any, view: OutputView
) -> tuple[dict[str, _Call], FlatArrays]:
    """Run the float model and store the inputs and outputs of its blocks.

    Args:
        model: The quantized model, which runs with its quantizers off, or a float model with the same names.
        blocks: The blocks.
        inputs: As for `forward.call_model`.
        view: Which outputs count, and where.

    Raises:
        ArgumentError: The model lacks one of the blocks.
    """
    require_modules(model, [block.name for block in blocks])
    modules = dict(model.named_modules())
    arguments: dict[str, tuple[Any, Any]] = {}
    calls: dict[str, _Call] = {}

    # Clones: a function in place may change the tensors later. The hooks come first, because a block is called with
    # these arguments again, and other hooks, such as that of `smooth_inputs`, change them then.
    def enter(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        arguments[name] = map_tensors(torch.clone, (args, kwargs))

    def leave(name: str, _: nn.Module, __: Any, outputs: Any) -> None:
        calls[name] = _Call(arguments.pop(name), map_tensors(torch.clone, outputs))

    with ExitStack() as hooks, disable_quantization(model), explaining_joined():
        for block in blocks:
            module = modules[block.name]
            handle = module.register_forward_pre_hook(
                partial(enter, block.name), prepend=True, with_kwargs=True
            )
            hooks.callback(handle.remove)
            hooks.callback(module.register_forward_hook(partial(leave, block.name)).remove)
        with evaluating(model):
            outputs = call_model(model, inputs)
    return calls, flatten_outputs(outputs, inputs, view)


def _reconstruct_in_order(
    model: nn.Module,
    blocks: list[_Block],
    calls: dict[str, _Call],
    inputs: Any,
    options: _Options,
) -> tuple[list[ReconstructedBlock], Any]:
    """Reconstruct each block when it is called, in one quantized forward.

    Returns:
        The blocks, and the outputs of the model.
    """
    rows: list[ReconstructedBlock] = []
    hooks: dict[str, RemovableHandle] = {}
    num_samples = count_samples(inputs)
    with tqdm(total=len(blocks), desc="reconstruct", unit="block", disable=None) as progress:

        def learn(block: _Block, module: nn.Module, args: Any, kwargs: Any) -> None:
            hooks.pop(block.name).remove()  # the search calls the block, too
            is_layer = block.name in block.layers
            arguments = (args, kwargs)
            size = len(tensors_of(arguments)[0]) if is_layer else num_samples
            samples = _Samples(calls.pop(block.name), arguments, size)
            batch_size = max(1, round(options.batch_size * size / num_samples))
            rows.append(_reconstruct(block, samples, batch_size, options))
            progress.update()

        try:
            for block in blocks:
                hook = partial(learn, block)
                handle = block.module.register_forward_pre_hook(
                    hook, prepend=True, with_kwargs=True
                )
                hooks[block.name] = handle
            with evaluating(model):
                outputs = call_model(model, inputs)
        except KeyboardInterrupt:
            logger.warning(
                "stopped: %d of %d blocks are reconstructed and stay so", len(rows), len(blocks)
            )
            raise
        finally:
            for handle in hooks.values():
                handle.remove()
    return rows, outputs


class _Samples:
    """The inputs of a block and the outputs of its float block, of which mini-batches are taken.

    Args:
        call: The float call.
        inputs: Positional and keyword arguments in the quantized model.
        size: Number of samples.
    """

    def __init__(self, call: _Call, inputs: tuple[Any, Any], size: int) -> None:
        self._inputs = inputs
        self._size = size
        self._float_inputs = list_leaves(call.inputs)
        leaves = list_leaves(call.outputs)
        self._positions = [
            position
            for position, leaf in enumerate(leaves)
            if is_by_sample(leaf, size) and leaf.is_floating_point()
        ]
        self._targets = [leaves[position].float() for position in self._positions]
        variances = [target.var(correction=0) for target in self._targets]
        self._variances = [torch.where(value > 0, value, 1.0) for value in variances]
        self.num_learned = size - size // HELD_OUT

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return tensors_of(self._inputs)[0].device

    def reason_against(self) -> str:
        """Why no mini-batches can be taken; empty if they can."""
        if self._size < HELD_OUT:
            return f"its input has {self._size} rows, too few to hold some out"
        if not self._targets or not _list_rows(self._inputs, self._size):
            return "its inputs or outputs do not have the samples first"
        shapes = [getattr(leaf, "shape", None) for leaf in list_leaves(self._inputs)]
        if shapes != [getattr(leaf, "shape", None) for leaf in self._float_inputs]:
            return "its inputs have other shapes in float"
        return ""

    def list_held_out(self) -> torch.Tensor:
        """The samples that are held out."""
        return torch.arange(self.num_learned, self._size, device=self.device)

    def take(self, index: torch.Tensor) -> Any:
        """The inputs of some samples."""
        return map_leaves(partial(self._take_rows, index), self._inputs)

    def mix(self, index: torch.Tensor, drop: float, generator: torch.Generator) -> Any:
        """The inputs of some samples, with elements of the float model in random places."""
        float_leaves = iter(self._float_inputs)

        def mix_leaf(leaf: Any) -> Any:
            float_leaf = next(float_leaves)
            rows = self._take_rows(index, leaf)
            if not is_by_sample(leaf, self._size) or not leaf.is_floating_point():
                return rows
            return _drop_quantization(rows, float_leaf[index], drop, generator)

        return map_leaves(mix_leaf, self._inputs)

    def measure_error(
        self, outputs: Any, index: torch.Tensor, interval: tuple[float, float]
    ) -> torch.Tensor:
        """Squared error of the outputs of some samples, relative to the variance of the float output."""
        leaves = list_leaves(outputs)
        errors = []
        for position, target, variance in zip(
            self._positions, self._targets, self._variances, strict=True
        ):
            actual = leaves[position].float()
            expected = target[index]
            squares = (actual - expected).square()
            if interval == _EVERYTHING:
                errors.append(squares.mean() / variance)
            else:
                weight = weigh_passing(expected, actual.detach(), interval)
                errors.append((weight * squares).sum() / weight.sum() / variance)
        return torch.stack(errors).mean()

    def _take_rows(self, index: torch.Tensor, leaf: Any) -> Any:
        """A copy of some rows, which a function in place may change."""
        return leaf[index] if is_by_sample(leaf, self._size) else leaf


def _drop_quantization(
    quantized: torch.Tensor, unquantized: torch.Tensor, drop: float, generator: torch.Generator
) -> torch.Tensor:
    """Replace random elements of a quantized tensor by the unquantized ones."""
    mask = torch.empty(quantized.shape, dtype=torch.bool, device=quantized.device)
    return torch.where(mask.bernoulli_(drop, generator=generator), unquantized, quantized)


def _reconstruct(
    block: _Block, samples: _Samples, batch_size: int, options: _Options
) -> ReconstructedBlock:
    """Learn one block; put it back if the search fails or its error on the held-out samples does not fall."""
    layers = tuple(block.layers)
    reason = samples.reason_against()
    if reason:
        return ReconstructedBlock(block.name, layers, math.nan, math.nan, reason)
    former = _State(block)
    with _measuring_deviations(block) as deviations:
        error = _measure_held_out(block, samples)
    before, *numbers = read_numbers([error, *deviations.values()])
    try:
        search = _Search(block, dict(zip(deviations, numbers, strict=True)))
        search.run(samples, before, batch_size, options)
        search.store()
        after = float(_measure_held_out(block, samples))
    except BaseException:
        former.restore()
        raise
    if after < before:
        return ReconstructedBlock(block.name, layers, before, after, block.note)
    former.restore()
    reason = f"stays as it was: its held-out error would be {after:.3%} instead of {before:.3%}"
    if block.note:
        reason = f"{block.note}; {reason}"
    return ReconstructedBlock(block.name, layers, before, before, reason)


def _measure_held_out(block: _Block, samples: _Samples) -> torch.Tensor:
    held_out = samples.list_held_out()
    args, kwargs = samples.take(held_out)
    return samples.measure_error(block.module(*args, **kwargs), held_out, block.interval)


class _State:
    """Weights, biases and ranges of a block.

    Args:
        block: The block.
    """

    def __init__(self, block: _Block) -> None:
        self._parameters: list[tuple[QuantMixin, str, torch.Tensor | None]] = []
        for layer in block.layers.values():
            for name in ("weight", "bias"):
                parameter = layer._parameters[name]
                values = None if parameter is None else own_tensor(parameter)
                self._parameters.append((layer, name, values))
        self._ranges: list[tuple[TensorQuantizer, torch.Tensor]] = []
        for quantizer in block.ranges:
            assert quantizer.amax is not None  # noqa: S101  # `_list_activations` has checked
            self._ranges.append((quantizer, own_tensor(quantizer.amax)))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the block these values again."""
        for layer, name, values in self._parameters:
            if values is None:
                layer._parameters[name] = None
            else:
                layer.get_parameter(name).copy_(values)
        for quantizer, amax in self._ranges:
            quantizer.amax = amax


@contextmanager
def _measuring_deviations(block: _Block) -> Iterator[dict[str, torch.Tensor]]:
    """Measure the standard deviation of the output of each layer that runs in the block, by its name.

    It is the mean over the channels: their means may lie further apart.
    """
    deviations: dict[str, torch.Tensor] = {}

    def measure(name: str, layer: nn.Module, __: Any, output: torch.Tensor) -> None:
        is_linear = layer.get_parameter("weight").dim() == 2
        rows = output.float() if is_linear else output.float().movedim(1, -1)
        deviations[name] = rows.flatten(0, -2).std(0, correction=0).mean()

    with ExitStack() as hooks:
        for name, layer in block.layers.items():
            hooks.callback(layer.register_forward_hook(partial(measure, name)).remove)
        yield deviations


class _LearnedLayer:
    """Variables in the place of the weight and the bias of a layer.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: QuantMixin) -> None:
        self._layer = layer
        weight = layer.get_parameter("weight").detach()
        self._type = weight.dtype
        quantizer = layer.weight_quantizer
        self._scale = quantizer.scale.reshape(-1, *[1] * (weight.dim() - 1))
        ideal = layer.get_buffer("_float_weight").float() / self._scale
        present = weight.float() / self._scale
        # `round_weights` moves some weights by more than a code: the search begins next to them.
        distance = present - ideal
        ideal = torch.where(distance.abs() < 1, ideal, present - distance.sign() / 2)
        # Halfway to the present weight, so that the first codes are those of `round_weights` if it ran.
        start = (ideal + present) / 2
        self.codes = SoftCodes(ideal, quantizer.format, start=start)
        bias = layer._parameters["bias"]
        first = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        self.bias = own_tensor(first).requires_grad_()

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """The layer computes with the variables in the block."""
        attributes = vars(self._layer)  # they come before parameters
        attributes["bias"] = self.bias
        hook = self._layer.weight_quantizer.register_forward_hook(self._quantize)
        try:
            yield
        finally:
            hook.remove()
            del attributes["bias"]

    def _quantize(self, *_: Any) -> torch.Tensor:
        return (self.codes.relax() * self._scale).to(self._type)

    @torch.no_grad()
    def store(self) -> None:
        """Give the layer the values of the learned codes, and the bias."""
        weight = self._layer.get_parameter("weight")
        values = (self.codes.harden() * self._scale).to(weight.dtype)
        # The bias has followed these codes; the new weight is not rounded further.
        if is_shifted(self._layer):
            self.bias.add_(shift_of_mean(self._layer, values))
        weight.copy_(values)
        bias = self._layer._parameters["bias"]
        if bias is None:
            trains = self._layer.get_parameter("weight").requires_grad
            self._layer._parameters["bias"] = nn.Parameter(own_tensor(self.bias), trains)
        else:
            bias.copy_(self.bias)


class _Search:
    """The variables of a block, and the steps that learn them.

    Args:
        block: The block.
        deviations: Standard deviation of the output of each layer.
    """

    def __init__(self, block: _Block, deviations: Mapping[str, float]) -> None:
        self._block = block
        self._layers = {name: _LearnedLayer(layer) for name, layer in block.layers.items()}
        self._deviations = deviations

    def run(
        self, samples: _Samples, first_error: float, batch_size: int, options: _Options
    ) -> None:
        """Learn with Adam. The learning rates of biases and ranges fall along half a cosine, as in BRECQ.

        Args:
            samples: Inputs and targets.
            first_error: The error of the block before, in which the loss is measured.
            batch_size: Samples in a step.
            options: The options.
        """
        generator = torch.Generator(samples.device).manual_seed(options.seed)
        unit = first_error or 1.0
        with ExitStack() as exits, torch.enable_grad():
            groups = self._enter(exits, options.drop, generator)
            logits = [layer.codes.logits for layer in self._layers.values()]
            variables = [*logits, *(variable for group in groups for variable in group["params"])]
            rounding = torch.optim.Adam(logits, _ROUNDING_RATE)
            others = torch.optim.Adam(groups)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(others, options.steps)
            for step in range(options.steps):
                order = torch.randperm(
                    samples.num_learned, generator=generator, device=samples.device
                )
                index = order[:batch_size]
                args, kwargs = samples.mix(index, options.drop, generator)
                outputs = self._block.module(*args, **kwargs)
                error = samples.measure_error(outputs, index, self._block.interval)
                loss = error / unit + self._penalize(step, options.steps)
                gradients = torch.autograd.grad(loss, variables, allow_unused=True)
                for variable, gradient in zip(variables, gradients, strict=True):
                    variable.grad = gradient
                rounding.step()
                others.step()
                schedule.step()

    def store(self) -> None:
        """Give the layers what was learned; the ranges are there already."""
        for layer in self._layers.values():
            layer.store()

    def _enter(
        self, exits: ExitStack, drop: float, generator: torch.Generator
    ) -> list[dict[str, Any]]:
        """Put the variables in place until `exits` is closed.

        Returns:
            The biases and ranges with their learning rates, for an optimizer.
        """

        def keep_some(_: nn.Module, args: Any, quantized: torch.Tensor) -> torch.Tensor:
            return _drop_quantization(quantized, args[0], drop, generator)

        groups: list[dict[str, Any]] = []
        for name, layer in self._layers.items():
            exits.enter_context(layer.replacing())
            groups.append({"params": [layer.bias], "lr": _BIAS_RATE * self._deviations[name]})
        for quantizer in self._block.ranges:
            exits.callback(quantizer.keep_range)
            groups.append({"params": [quantizer.learn_range("lsq")], "lr": _RANGE_RATE})
        for quantizer in self._block.activations:
            exits.callback(quantizer.register_forward_hook(keep_some).remove)
        return groups

    def _penalize(self, step: int, steps: int) -> torch.Tensor:
        """The regularizer of all weights, per weight."""
        penalties = []
        num_weights = 0
        for layer in self._layers.values():
            penalties.append(layer.codes.penalize(step, steps))
            num_weights += layer.codes.logits.numel()
        return torch.stack(penalties).sum() / num_weights
