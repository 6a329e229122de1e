"""Forwards in many quantizer states, each computing only what its state changes; bit-identical to full forwards.

The first forward of a batch is recorded: every torch function and every quantizer, with the numbers of its input and
output tensors. In a later forward the code of the model runs again, but a call whose input tensors are all those of the
recording is not computed: its recorded result is returned. So branches, shared modules and calls with several inputs
need no special case, and only the calls that depend on the switched quantizers are computed.

The model gets stand-ins: tensors with the shape, type and device of the value and almost no memory. In-place functions
work on a copy, and their stand-in is renumbered. A value is stored only if a later forward reads it, and only until the
last such forward; values beyond `cache_bytes` are in memory-mapped temporary files. On a GPU, `cache_bytes` limits the
values in its memory and then, once more, those in the memory of the host, and each memory is filled up to half of what
is free in it. Values that depend on parameters alone are the same for every batch: fake-quantized weights are stored
once, up to half of `cache_bytes`, and the others are computed again wherever they are read.

Small models spend more time on this bookkeeping than on arithmetic. So recordings are timed against plain forwards, and
full forwards run instead if they are faster.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from qdq.batch import tensors_of
from qdq.device import find_device, move_batch
from qdq.errors import is_out_of_memory
from qdq.forward import call_model, evaluating, is_in_place
from qdq.quantizer import TensorQuantizer, named_quantizers, toggling

CACHE_BYTES = 2 * 2**30
_FIRST_REPLAYED = 2**40  # replays number their tensors from here: above those of any recording
_SLOT = "_qdq_slot"
_METADATA = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "is_mps",
        "is_xpu",
        "is_leaf",
        "itemsize",
        "nbytes",
        "names",
        "grad_fn",
    ]
)
# These names begin with "i" and are not in place.
_NOT_IN_PLACE = frozenset(["__index__", "__int__", "__invert__"])
_SCALARS = (
    bool,
    int,
    float,
    complex,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
)

_Variants = Mapping[str, Sequence[TensorQuantizer]]
_FlatResult = tuple[list[Any], TreeSpec]
_Compute = Callable[[list[torch.Tensor]], _FlatResult]
_InPlace = Literal["", "copy", "result"]
"""How a call changes its first tensor.

"copy": the function changes it, so it gets a copy. "result": the result is its new value. "": it does not change it.
"""


class _NotReplayableError(Exception):
    """The model does something that cannot be recorded, so it is evaluated in full; caught in this module."""


class Replay:
    """Evaluates a model on batches, each in several states of its quantizers.

    A model with TorchScript modules, with random numbers, or with views that it changes in place is evaluated in full,
    and `reason` says why. A model is also evaluated in full if that is faster. The results are the same in any case.

    Args:
        model: Any module.
        cache_bytes: Limit on values and weights in memory; see the module for a GPU. Values beyond it are in temporary
            files.
        always: Whether to replay even if full forwards are faster.
    """

    def __init__(
        self, model: nn.Module, *, cache_bytes: int = CACHE_BYTES, always: bool = False
    ) -> None:
        self._model = model
        self._always = always
        self._bookkeeping = 0.0  # of a recording or a replay, in plain forwards
        device = find_device(model)
        self._memory = _Memory(_limit_memory(device, cache_bytes), _limit_host(device, cache_bytes))
        self._weights = _Weights(self._memory, model)
        self.reason = ""
        """Why forwards are computed in full, "" if they are replayed."""
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            self.reason = "a part of the model is TorchScript"
        self._planned: _PlannedVariants | None = None

    def evaluate(
        self, batch: Any, variants: _Variants, measure: Callable[[str | None, Any], None]
    ) -> None:
        """Measure the outputs on a batch, with the quantizers as they are and with some of them switched.

        Args:
            batch: As for `forward.call_model`.
            variants: Name -> the quantizers that are switched, from on to off and from off to on.
            measure: Called with None and the outputs of the model as it is, then with the name of each variant and its
                outputs, in the order in which the forward reaches their quantizers.
        """
        # Every forward must get the same tensors, because the recording knows them by their identity.
        batch = move_batch(batch, find_device(self._model))
        with evaluating(self._model):
            outputs, seconds = _time_outputs(functools.partial(call_model, self._model, batch))
            measure(None, outputs)
            recording = None
            if self._pays(variants):
                recording = self._record(batch, outputs, seconds, variants)
            if recording is None:
                self._evaluate_in_full(batch, variants, measure)
                return
            try:
                self._evaluate_from(recording, batch, variants, measure)
            finally:
                recording.close()

    def _evaluate_in_full(
        self, batch: Any, variants: _Variants, measure: Callable[[str | None, Any], None]
    ) -> None:
        """Measure each variant by a full forward; arguments as for `evaluate`."""
        for name, quantizers in variants.items():
            with toggling(quantizers):
                outputs = call_model(self._model, batch)
            measure(name, outputs)

    def _evaluate_from(
        self,
        recording: _Recording,
        batch: Any,
        variants: _Variants,
        measure: Callable[[str | None, Any], None],
    ) -> None:
        """Measure each variant from a recording; further arguments as for `evaluate`."""
        for name in recording.order:
            with toggling(variants[name]):
                outputs = self._replay(recording, batch)
            measure(name, outputs)
            recording.free_after(name)

    def _replay(self, recording: _Recording, batch: Any) -> Any:
        try:
            return recording.replay(batch)
        except Exception as error:
            # The forward may take another path than the recorded one. An error of the model itself is raised again.
            needs_memory = is_out_of_memory(error)
        if needs_memory:
            self._memory.limit = 0
            recording.spill()
        return call_model(self._model, batch)

    def _pays(self, variants: _Variants) -> bool:
        """Whether replays, including the recordings still to be made, are faster than the same number of full forwards.

        A recording is a forward with bookkeeping. A replay has the bookkeeping and on average half of the arithmetic.
        """
        if self.reason:
            return False
        if self._always:
            return len(variants) > 1
        recordings = 1 if self._is_planned(variants) else 2
        return self._cost(len(variants), recordings) < len(variants)

    def _cost(self, replays: int, recordings: int) -> float:
        """Time in units of a plain forward."""
        return recordings * (1 + self._bookkeeping) + replays * (0.5 + self._bookkeeping)

    def _record(
        self, batch: Any, expected: Any, seconds: float, variants: _Variants
    ) -> _Recording | None:
        """The recording of a batch with all values that the variants read.

        Args:
            batch: The batch.
            expected: Outputs of a plain forward.
            seconds: Time of the plain forward.
            variants: As for `evaluate`.

        Returns:
            None if the model cannot be recorded, with the reason in `reason`, or if the recording does not pay.
        """
        limit = self._memory.limit
        recording = self._try_to_record(batch, expected, seconds, variants)
        if recording is None and self._memory.limit < limit:  # there was not enough memory
            return self._try_to_record(batch, expected, seconds, variants)
        return recording

    def _try_to_record(
        self, batch: Any, expected: Any, seconds: float, variants: _Variants
    ) -> _Recording | None:
        """As `_record`. If there is not enough memory for it, nothing more is stored there, and there is no reason."""
        with ExitStack() as undo:
            try:
                plan = self._plan(batch, variants)
                recording = _Recording(self._model, self._memory, self._weights, plan)
                undo.callback(recording.close)
                outputs, recorded_seconds = _time_outputs(
                    functools.partial(recording.record, batch)
                )
            except _NotReplayableError as error:
                self.reason = str(error)
                return None
            except Exception as error:  # not an error of the model: its plain forward succeeded
                if is_out_of_memory(error) and self._memory.limit:
                    self._memory.limit = 0
                    return None
                self.reason = f"recording fails: {error!r}"
                return None
            if not _are_equal(expected, outputs):
                self.reason = "a recorded forward differs from a plain one: random numbers, or views changed in place"
                return None
            self._bookkeeping = max(recorded_seconds / max(seconds, 1e-9) - 1, 0.0)
            if not self._always and self._cost(len(variants), recordings=0) >= len(variants):
                return None
            undo.pop_all()
            return recording

    def _plan(self, batch: Any, variants: _Variants) -> _Plan:
        """The values to store; for the first batch with these variants, a recording without values finds them.

        Args:
            batch: The batch.
            variants: As for `evaluate`.
        """
        if self._planned is None or not self._is_planned(variants):
            structure = _Recording(self._model, self._memory, self._weights)
            # Not timed: it would include the work that torch and Python do only once.
            structure.record(batch)
            self._planned = _PlannedVariants(_identify(variants), structure.plan(variants))
        return self._planned.plan

    def _is_planned(self, variants: _Variants) -> bool:
        return self._planned is not None and self._planned.identity == _identify(variants)


def _identify(variants: _Variants) -> dict[str, tuple[int, ...]]:
    return {name: tuple(map(id, quantizers)) for name, quantizers in variants.items()}


def _time_outputs(run: Callable[[], Any]) -> tuple[Any, float]:
    """Run a forward and time it.

    Args:
        run: The forward.

    Returns:
        The outputs, and the seconds that they took; on the CPU the CPU time of this thread.
    """
    start, start_of_work = time.perf_counter(), time.thread_time()
    outputs = run()
    first = next(iter(tensors_of(outputs)), None)
    if first is None or first.device.type == "cpu":
        return outputs, time.thread_time() - start_of_work  # without the time of other processes
    first.flatten()[:1].cpu()  # waits for the device
    return outputs, time.perf_counter() - start


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two results contain the same tensors, to the last bit."""
    for leaf, twin in zip(tree_leaves(first), tree_leaves(second), strict=False):
        if not isinstance(leaf, torch.Tensor):
            continue
        if not isinstance(twin, torch.Tensor) or not torch.equal(leaf, twin):
            return False
    return True


@dataclass(frozen=True)
class _Plan:
    """The values that the variants read.

    Args:
        order: The variants, in the order in which the forward reaches their quantizers.
        stored: Numbers of the values that at least one variant reads.
        freed: Variant -> numbers of the values that no later variant reads.
    """

    order: tuple[str, ...]
    stored: frozenset[int]
    freed: Mapping[str, list[int]]


_EMPTY_PLAN = _Plan((), frozenset(), {})


class _PlannedVariants(NamedTuple):
    """A plan and the quantizers of the variants that it was made for."""

    identity: dict[str, tuple[int, ...]]
    plan: _Plan


@dataclass(slots=True)
class _Slot:
    """The value that a tensor of the model stands for.

    Args:
        number: Names the value: equal numbers are equal tensors.
        value: The tensor itself; None if it has to be looked up.
    """

    number: int
    value: torch.Tensor | None = None


class _External(NamedTuple):
    """A tensor that no recorded call made: a parameter or an input. The reference keeps its identity unique."""

    tensor: torch.Tensor
    slot: _Slot


@dataclass(slots=True)
class _Output:
    """A tensor in the result of a call.

    Args:
        number: Number of a new tensor.
        shell: A tensor with its shape, type and device.
        argument: Position of the input tensor that is returned as it is; -1 for a new tensor.
    """

    number: int
    shell: torch.Tensor
    argument: int = -1


@dataclass(slots=True)
class _Call:
    """One recorded call.

    Args:
        compute: Computes the flat result and its structure from the input tensors.
        inputs: Numbers of the input tensors.
        in_place: How it changes the first of them.
        changed: Number of the new value of the first input; -1 if it does not change.
        outputs: The flat result, with an `_Output` for each tensor.
        spec: Structure of the result.
        quantizer: The quantizer that was called, None for a torch function.
        is_pure: Whether the result may be handed out again.
    """

    compute: _Compute
    inputs: list[int]
    in_place: _InPlace
    changed: int
    outputs: list[Any]
    spec: TreeSpec
    quantizer: TensorQuantizer | None
    is_pure: bool

    @property
    def made_numbers(self) -> list[int]:
        """Numbers of the tensors that it makes."""
        numbers = []
        for output in self.outputs:
            if isinstance(output, _Output) and output.argument < 0:
                numbers.append(output.number)

        if self.changed >= 0:
            numbers.append(self.changed)
        return numbers


class _QuantizerState(NamedTuple):
    """A quantizer as a function to be called; each state counts as a different function."""

    identity: int
    is_enabled: bool
    is_quantizing: bool


class _CallKey(NamedTuple):
    """Identifies a call in a forward.

    Args:
        function: The function.
        arguments: Its arguments without tensors.
        inputs: Numbers of its input tensors.
        repetition: Its number among equal calls, from 1.
    """

    function: Hashable
    arguments: Hashable
    inputs: tuple[int, ...]
    repetition: int


class _Recording(TorchFunctionMode):
    """One recorded forward, and later forwards that are answered from it.

    Args:
        model: The model.
        memory: Limit on values and weights.
        weights: The weights of all recordings.
        plan: The values to store.
    """

    def __init__(
        self, model: nn.Module, memory: _Memory, weights: _Weights, plan: _Plan = _EMPTY_PLAN
    ) -> None:
        super().__init__()
        self._model = model
        self._quantizers = [quantizer for _, quantizer in named_quantizers(model)]
        self._plan = plan
        self._values = _Values(memory)
        self._weights = weights
        # Number -> what the value was computed from, for values that depend on parameters alone.
        self._origins: dict[int, Hashable] = {}
        self._sequence: list[_Call] = []
        self._calls: dict[_CallKey, _Call] = {}
        self._makers: dict[int, _Call] = {}
        self._externals: dict[int, _External] = {}  # by identity
        self._external_values: dict[int, torch.Tensor] = {}
        self._outputs: list[int] = []
        self._is_recording = True
        self._numbers = itertools.count()
        self._begin()

    @property
    def order(self) -> tuple[str, ...]:
        """The variants, in the order in which the forward reaches their quantizers."""
        return self._plan.order

    def record(self, batch: Any) -> Any:
        """Run the first forward and return its outputs."""
        outputs = self._forward(batch)
        self._outputs = [self._slot(tensor).number for tensor in tensors_of(outputs)]
        resolved = self._resolve(outputs)
        self._is_recording = False
        self._numbers = itertools.count(_FIRST_REPLAYED)
        return resolved

    def replay(self, batch: Any) -> Any:
        """Run a later forward, with quantizers in another state, and return its outputs."""
        self._begin()
        return self._resolve(self._forward(batch))

    def plan(self, variants: _Variants) -> _Plan:
        """The values that the variants read, if each follows the path of the recorded forward.

        Args:
            variants: As for `Replay.evaluate`.
        """
        positions: dict[str, int] = {}  # of the first call that changes
        reads: dict[str, set[int]] = {}
        for name, quantizers in variants.items():
            switched = {id(quantizer) for quantizer in quantizers}
            positions[name], reads[name] = self._simulate(switched)
        order = tuple(sorted(variants, key=positions.__getitem__))

        last_readers: dict[int, str] = {}
        for name in order:
            for number in reads[name]:
                if number not in self._origins:
                    last_readers[number] = name
        freed: dict[str, list[int]] = {}
        for number, name in last_readers.items():
            freed.setdefault(name, []).append(number)
        return _Plan(order, frozenset(last_readers), freed)

    def free_after(self, variant: str) -> None:
        """Free the values that no later variant reads."""
        for number in self._plan.freed.get(variant, ()):
            self._values.pop(number)

    def spill(self) -> None:
        """Move all values out of the memory of the device."""
        self._values.spill()

    def close(self) -> None:
        """Free all values."""
        self._values.clear()

    def _simulate(self, switched: set[int]) -> tuple[int, set[int]]:
        """The calls that change if some quantizers are switched.

        Args:
            switched: Identities of the quantizers.

        Returns:
            Position of the first of these calls, and the numbers of the recorded values that they read.
        """
        first = len(self._sequence)
        changed: set[int] = set()
        reads: set[int] = set()
        for position, call in enumerate(self._sequence):
            if call.is_pure:
                is_switched = id(call.quantizer) in switched
                if not is_switched and changed.isdisjoint(call.inputs):
                    continue
                first = min(first, position)
            reads.update(set(call.inputs) - changed)
            changed.update(call.made_numbers)

        reads.update(set(self._outputs) - changed)
        return first, reads

    # Running the model

    def _begin(self) -> None:
        """Drop the state of the previous forward."""
        self._repetitions: Counter[Hashable] = Counter()
        self._guests: dict[int, _External] = {}  # external tensors that only this forward has
        self._rebound: dict[int, _Slot] = {}  # external tensors that it has changed in place

    def _forward(self, batch: Any) -> Any:
        with self._watching(), self:
            return call_model(self._model, batch)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Route the quantizers of the model through the recording: each is one call, whatever it computes."""
        try:
            for quantizer in self._quantizers:
                vars(quantizer)["forward"] = functools.partial(self._quantize, quantizer)
            yield
        finally:
            for quantizer in self._quantizers:
                vars(quantizer).pop("forward", None)

    def _quantize(self, quantizer: TensorQuantizer, inputs: torch.Tensor) -> Any:
        """Answer the call of a quantizer."""

        def compute(tensors: list[torch.Tensor]) -> _FlatResult:
            result = type(quantizer).forward(quantizer, tensors[0])
            if result is tensors[0]:  # it is off; its result gets its own number anyway
                result = result.view_as(result)
            return tree_flatten(result)

        state = _QuantizerState(id(quantizer), quantizer.is_enabled, quantizer.is_quantizing)
        with torch._C.DisableTorchFunction():
            return self._answer(state, (inputs,), compute, quantizer=quantizer)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        if name == "__get__" and _attribute_of(func) in _METADATA:
            return func(*args, **kwargs)
        if func is torch.Tensor.__iter__:
            return iter(self.__torch_function__(torch.Tensor.unbind, types, args))
        if name == "__set__" or kwargs.get("out") is not None:
            raise _NotReplayableError("the model passes a function an output tensor to write to")

        function: Hashable = func
        in_place: _InPlace = "copy" if _changes_argument(func, name) else ""
        position = _inplace_position(func)
        if kwargs.get("inplace") or _is_set(args, position):
            args, kwargs = _without_inplace(args, kwargs, position)
            function = (func, "in place")
            in_place = "result"
        compute = functools.partial(_call_function, func, args, kwargs)
        return self._answer(function, (args, kwargs), compute, in_place=in_place)

    def _answer(
        self,
        function: Hashable,
        arguments: tuple[Any, ...],
        compute: _Compute,
        *,
        in_place: _InPlace = "",
        quantizer: TensorQuantizer | None = None,
    ) -> Any:
        """The result of a call: the recorded one, if all inputs are those of the recording.

        Args:
            function: Identifies the function.
            arguments: Its arguments.
            compute: Computes it.
            in_place: How it changes its first tensor.
            quantizer: The quantizer, if the function is one.
        """
        tensors: list[torch.Tensor] = []
        constants = _comparable(arguments, tensors)
        slots = [self._slot(tensor) for tensor in tensors]
        key = self._identify_call(function, constants, slots)
        if key is not None and not self._is_recording:
            recorded = self._calls.get(key)
            if recorded is not None:
                return self._hand_out_recorded(recorded, tensors)

        origin = None
        if key is not None and not in_place:
            origin = self._find_origin(function, constants, slots)
        if origin is not None and quantizer is not None and quantizer.is_enabled:
            compute = functools.partial(self._weights.compute, origin, compute)
        call, results = self._compute(
            compute, slots, in_place if slots else "", quantizer, key is not None
        )

        if origin is not None:
            for index, number in enumerate(call.made_numbers):
                self._origins[number] = (origin, index)
        if call.changed >= 0:
            self._rebind(tensors[0], _Slot(call.changed, results.pop()))
        if self._is_recording:
            self._remember(key, call)

        stand_ins = []
        for output, result in zip(call.outputs, results, strict=True):
            stand_ins.append(_hand_out(output, tensors, result))
        return _put_together(stand_ins, call.spec)

    def _hand_out_recorded(self, call: _Call, tensors: list[torch.Tensor]) -> Any:
        """The result of a recorded call, for the tensors of this forward."""
        if call.changed >= 0:
            self._rebind(tensors[0], _Slot(call.changed))
        stand_ins = [_hand_out(output, tensors) for output in call.outputs]
        return _put_together(stand_ins, call.spec)

    def _identify_call(
        self, function: Hashable, constants: Hashable, slots: list[_Slot]
    ) -> _CallKey | None:
        """The key of a call.

        Args:
            function: The function.
            constants: Its arguments without tensors.
            slots: Its input tensors.

        Returns:
            None if an argument cannot be hashed.
        """
        key = _CallKey(function, constants, tuple(slot.number for slot in slots), 0)
        try:
            self._repetitions[key] += 1
        except TypeError:
            return None
        return key._replace(repetition=self._repetitions[key])

    def _find_origin(
        self, function: Hashable, constants: Hashable, slots: list[_Slot]
    ) -> Hashable | None:
        """Identifies the result of a call whose inputs depend on parameters alone, in every recording.

        Args:
            function: The function.
            constants: Its arguments without tensors.
            slots: Its input tensors.

        Returns:
            None if an input depends on something else.
        """
        origins = [self._origins.get(slot.number) for slot in slots]
        if not origins or None in origins:
            return None
        return (function, constants, *origins)

    def _compute(
        self,
        compute: _Compute,
        slots: list[_Slot],
        in_place: _InPlace,
        quantizer: TensorQuantizer | None,
        has_key: bool,
    ) -> tuple[_Call, list[Any]]:
        """Compute a call that is not in the recording.

        Args:
            compute: Computes it.
            slots: The input tensors.
            in_place: How it changes the first of them.
            quantizer: The quantizer, if the function is one.
            has_key: Whether the call can be identified in another forward.

        Returns:
            The call and its results. If it changes its first input, the new value is the last result.
        """
        inputs = [self._value(slot) for slot in slots]
        run = _run(compute, inputs, in_place)
        outputs = [self._describe(result, run.inputs_after) for result in run.results]
        changed = -1
        if in_place:
            new_value = run.inputs_after[0]
            if new_value.shape != inputs[0].shape:
                raise _NotReplayableError("the model changes the shape of a tensor in place")
            run.results.append(new_value)
            changed = self._number(new_value)
        call = _Call(
            compute=compute,
            inputs=[slot.number for slot in slots],
            in_place=in_place,
            changed=changed,
            outputs=outputs,
            spec=run.spec,
            quantizer=quantizer,
            is_pure=has_key and all(isinstance(output, (_Output, *_SCALARS)) for output in outputs),
        )
        return call, run.results

    def _describe(self, result: Any, inputs: list[torch.Tensor]) -> Any:
        """A result for the recording: a number and a shell instead of each tensor.

        Args:
            result: The result.
            inputs: The input tensors; a function may return one of them.
        """
        if not isinstance(result, torch.Tensor):
            return result
        for position, tensor in enumerate(inputs):
            if tensor is result:
                return _Output(-1, _NO_SHELL, position)
        return _Output(self._number(result), _shell_of(result))

    def _number(self, value: torch.Tensor) -> int:
        """A new number for a value; the value is stored if the plan says so."""
        number = next(self._numbers)
        if self._is_recording and number in self._plan.stored:
            self._values[number] = value
        return number

    def _remember(self, key: _CallKey | None, call: _Call) -> None:
        """Add a call to the recording."""
        self._sequence.append(call)
        self._makers.update(dict.fromkeys(call.made_numbers, call))
        if key is not None and call.is_pure:
            self._calls[key] = call

    # Tensors and their values

    def _slot(self, tensor: torch.Tensor) -> _Slot:
        """The slot of a tensor that the model passes to a function."""
        slot: _Slot | None = tensor.__dict__.get(_SLOT) or self._rebound.get(id(tensor))
        if slot is not None:
            return slot

        is_external = self._is_recording or id(tensor) in self._externals
        registry = self._externals if is_external else self._guests
        if id(tensor) not in registry:
            registry[id(tensor)] = _External(tensor, self._make_slot(tensor))
        return registry[id(tensor)].slot

    def _make_slot(self, tensor: torch.Tensor) -> _Slot:
        """A slot for a tensor that no call made."""
        slot = _Slot(next(self._numbers), tensor)
        if self._weights.is_parameter(tensor):
            self._origins[slot.number] = (id(tensor), _version(tensor))
        if self._is_recording:
            self._external_values[slot.number] = tensor
        return slot

    def _rebind(self, tensor: torch.Tensor, slot: _Slot) -> None:
        """Make a tensor of the model stand for another value from now on."""
        if _SLOT in tensor.__dict__:
            tensor.__dict__[_SLOT] = slot
        else:
            self._rebound[id(tensor)] = slot

    def _value(self, slot: _Slot) -> torch.Tensor:
        """The tensor of a slot: at hand, stored, or computed again by the call that made it."""
        if slot.value is not None:
            return slot.value
        value = self._find_stored(slot.number)
        if value is None:
            value = self._make_again(slot.number)
        return value

    def _find_stored(self, number: int) -> torch.Tensor | None:
        """A value that is stored, or that no call made; None for others."""
        value = self._values.get(number)
        if value is None:
            value = self._external_values.get(number)
        return value

    def _make_again(self, number: int) -> torch.Tensor:
        """Compute a value that was not stored; only a forward that leaves the recorded path reads it.

        Each value on the way there is computed once, and dropped after its last reader.

        Args:
            number: The number of the value.
        """
        numbers = self._list_lacking(number)
        num_readers = Counter(
            source for lacking in numbers for source in self._makers[lacking].inputs
        )
        values: dict[int, torch.Tensor] = {}
        for lacking in numbers:
            call = self._makers[lacking]
            inputs = [
                values[source] if source in values else self._value(_Slot(source))
                for source in call.inputs
            ]
            values[lacking] = self._compute_again(call, lacking, inputs)
            for source in call.inputs:
                num_readers[source] -= 1
                if not num_readers[source]:
                    values.pop(source, None)
        return values[number]

    def _list_lacking(self, number: int) -> list[int]:
        """The numbers of the values that must be computed to get one, in the order of the recording."""
        lacking = set()
        open_numbers = [number]
        while open_numbers:
            candidate = open_numbers.pop()
            if candidate in lacking or self._find_stored(candidate) is not None:
                continue
            lacking.add(candidate)
            open_numbers += self._makers[candidate].inputs
        return sorted(lacking)

    def _compute_again(self, call: _Call, number: int, inputs: list[torch.Tensor]) -> torch.Tensor:
        """One of the values that a call makes.

        Args:
            call: The call.
            number: The number of the value.
            inputs: Those of the call.
        """
        run = _run(call.compute, inputs, call.in_place)
        if number == call.changed:
            return run.inputs_after[0]
        for output, result in zip(call.outputs, run.results, strict=True):
            if isinstance(output, _Output) and output.number == number:
                value: torch.Tensor = result
                return value
        raise _NotReplayableError("the model computes different results in a replay")

    def _resolve(self, outputs: Any) -> Any:
        """The outputs of the model with their values instead of stand-ins."""
        return tree_map_only(torch.Tensor, lambda tensor: self._value(self._slot(tensor)), outputs)


# Calls of functions


def _attribute_of(func: Callable[..., Any]) -> str:
    """The attribute that a getter reads."""
    return str(getattr(getattr(func, "__self__", None), "__name__", ""))


def _changes_argument(func: Callable[..., Any], name: str) -> bool:
    """Whether a function changes its first tensor: `add_`, `+=`, `x[0] = 1`."""
    return name == "__setitem__" or (is_in_place(func) and name not in _NOT_IN_PLACE)


@functools.cache
def _inplace_position(func: Callable[..., Any]) -> int:
    """Position of the argument that makes `F.relu` and others work in place; -1 if there is none."""
    try:
        return list(inspect.signature(func).parameters).index("inplace")
    except (
        TypeError,
        ValueError,
    ):
        # Native functions have no signature; they are recognized by name.
        return -1


def _is_set(args: tuple[Any, ...], position: int) -> bool:
    """Whether the argument at a position is given and true; position -1 means no argument."""
    return 0 <= position < len(args) and bool(args[position])


def _without_inplace(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the same call without its in-place argument; `position` is that of `_inplace_position`."""
    if _is_set(args, position):
        args = (*args[:position], False, *args[position + 1 :])
    if "inplace" in kwargs:
        kwargs = {**kwargs, "inplace": False}
    return args, kwargs


class _Run(NamedTuple):
    """A computed call.

    Args:
        results: The flat results.
        spec: Structure of the results.
        inputs_after: The input tensors with their values after the call.
    """

    results: list[Any]
    spec: TreeSpec
    inputs_after: list[torch.Tensor]


def _run(compute: _Compute, tensors: list[torch.Tensor], in_place: _InPlace) -> _Run:
    """Compute a call.

    Args:
        compute: Computes it.
        tensors: The input tensors.
        in_place: How it changes the first of them.

    Raises:
        _NotReplayableError: It changed a tensor that it should not change.
    """
    unchanging = tensors
    if in_place == "copy":
        tensors = [tensors[0].clone(), *tensors[1:]]
        unchanging = tensors[1:]
    versions = [_version(tensor) for tensor in unchanging]
    results, spec = compute(tensors)

    if versions != [_version(tensor) for tensor in unchanging]:
        raise _NotReplayableError(
            "a function of the model changes a tensor in place, but its name does not show it"
        )
    if in_place == "result":
        tensors = [results[0], *tensors[1:]]
    return _Run(results, spec, tensors)


def _version(tensor: torch.Tensor) -> int:
    """A number that grows when a tensor is changed in place; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def _call_function(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[torch.Tensor],
) -> _FlatResult:
    values = iter(tensors)
    return tree_flatten(func(*_substitute(args, values), **_substitute(kwargs, values)))


def _substitute(tree: Any, values: Iterator[torch.Tensor]) -> Any:
    """The same arguments with other tensors.

    Args:
        tree: The arguments.
        values: The other tensors, in the order of `_comparable`.
    """
    if isinstance(tree, torch.Tensor):
        return next(values)
    if isinstance(tree, dict):
        return {key: _substitute(item, values) for key, item in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_substitute(item, values) for item in tree)
    return tree


def _comparable(tree: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Arguments without their tensors, in a form that can be compared.

    Args:
        tree: The arguments.
        tensors: The tensors are appended to it.
    """
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return torch.Tensor
    if isinstance(tree, dict):
        return (dict, *[(key, _comparable(item, tensors)) for key, item in tree.items()])
    if type(tree) in (tuple, list):
        return (type(tree), *[_comparable(item, tensors) for item in tree])
    if isinstance(tree, slice):
        bounds = (tree.start, tree.stop, tree.step)
        if any(isinstance(bound, torch.Tensor) for bound in bounds):
            raise _NotReplayableError("the model slices by a tensor")
        return (slice, *bounds)
    if isinstance(tree, (tuple, list)) and tensors_of(tree):
        raise _NotReplayableError(f"the model passes a function tensors in a {type(tree).__name__}")
    return (type(tree), tree)


def _hand_out(output: Any, tensors: list[torch.Tensor], value: Any = None) -> Any:
    """The result that the model gets: a stand-in, or the input tensor that is returned.

    Args:
        output: A recorded result.
        tensors: The input tensors.
        value: The tensor that a stand-in stands for, if it is at hand.
    """
    if not isinstance(output, _Output):
        return output
    if output.argument >= 0:
        return tensors[output.argument]
    stand_in = output.shell.detach()
    stand_in.__dict__[_SLOT] = _Slot(output.number, value)
    return stand_in


def _put_together(results: list[Any], spec: TreeSpec) -> Any:
    """A flat result in its structure."""
    if spec.is_leaf():
        return results[0]
    return tree_unflatten(results, spec)


_NO_SHELL = torch.empty(0)


def _shell_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the shape, type and device of another, and the memory of one element."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter)
    if not is_plain or tensor.layout is not torch.strided or tensor.is_nested:
        raise _NotReplayableError(
            f"the model computes with tensors of the type {type(tensor).__name__}"
        )
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


# Memory


class _Memory:
    """Limit on the values of a recording and the weights of all recordings together.

    Args:
        limit: Bytes in the memory of the model's device.
        host_limit: Bytes in that of the host, for values that do not fit there; 0 if the model is on the CPU.
    """

    def __init__(self, limit: int, host_limit: int = 0) -> None:
        self.limit = limit
        self.used = 0
        self._host_limit = host_limit
        self.used_on_host = 0

    def fits(self, size: int) -> bool:
        """Whether this many more bytes stay within the limit."""
        return self.used + size <= self.limit

    def fits_on_host(self, size: int) -> bool:
        """Whether this many more bytes stay within the limit of the host."""
        return self.used_on_host + size <= self._host_limit


def _limit_memory(device: torch.device, cache_bytes: int) -> int:
    """How much memory of a device may be used: on a GPU at most half of what is free."""
    if device.type != "cuda":
        return cache_bytes
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(cache_bytes, free // 2)


def _limit_host(device: torch.device, cache_bytes: int) -> int:
    """How much memory of the host may be used for values of another device: at most half of what is free."""
    if device.type == "cpu":
        return 0
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return cache_bytes
    return min(cache_bytes, free // 2)


class _Weights:
    """Fake-quantized weights, stored once for all batches; a weight that does not fit is computed where it is read.

    Args:
        memory: Limit on all values; weights take half of it at most.
        model: The model whose parameters and buffers they come from.
    """

    def __init__(self, memory: _Memory, model: nn.Module) -> None:
        self._memory = memory
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._parameters = {id(tensor): tensor for tensor in tensors}
        self._results: dict[Hashable, _FlatResult] = {}
        self._bytes = 0

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter or buffer; references to them here keep their identities unique."""
        return self._parameters.get(id(tensor)) is tensor

    def compute(
        self, origin: Hashable, compute: _Compute, tensors: list[torch.Tensor]
    ) -> _FlatResult:
        """The stored result of a quantizer, or a new one that is stored if it fits.

        Args:
            origin: Identifies the result.
            compute: Computes it.
            tensors: The input tensors.
        """
        if origin in self._results:
            return self._results[origin]
        results, spec = compute(tensors)
        size = sum(_storage_of(tensor).size for tensor in results)
        if self._bytes + size <= self._memory.limit // 2 and self._memory.fits(size):
            self._results[origin] = (results, spec)
            self._bytes += size
            self._memory.used += size
        return results, spec


class _Values:
    """Tensors by number; those beyond a limit are in the memory of the host or in unnamed files.

    Args:
        memory: The limit.
    """

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self._tensors: dict[int, torch.Tensor] = {}
        self._devices: dict[int, torch.device] = {}  # of the tensors that are elsewhere
        self._bytes_on_host: dict[int, int] = {}
        self._users: Counter[int] = Counter()  # of each storage: views share one

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        storage = _storage_of(tensor)
        is_new = not self._users[storage.address]
        if is_new and storage.size and not self._memory.fits(storage.size):
            self._move_out(number, tensor)
            return
        if is_new:
            self._memory.used += storage.size
        self._users[storage.address] += 1
        self._tensors[number] = tensor

    def _move_out(self, number: int, tensor: torch.Tensor) -> None:
        """Store a tensor outside of the memory of its device."""
        size = tensor.nbytes if _is_dense(tensor) else _storage_of(tensor).size
        self._devices[number] = tensor.device
        if self._memory.fits_on_host(size):
            self._tensors[number] = _copy_to_host(tensor)
            self._bytes_on_host[number] = size
            self._memory.used_on_host += size
        else:
            self._tensors[number] = _map_to_file(tensor)

    def get(self, number: int) -> torch.Tensor | None:
        """The tensor, None if it is not stored."""
        tensor = self._tensors.get(number)
        if tensor is not None and number in self._devices:
            return _copy_back(tensor, self._devices[number])
        return tensor

    def pop(self, number: int) -> None:
        """Free a tensor, if it is stored."""
        tensor = self._tensors.pop(number, None)
        device = self._devices.pop(number, None)
        self._memory.used_on_host -= self._bytes_on_host.pop(number, 0)
        if tensor is None or device is not None:
            return
        storage = _storage_of(tensor)
        self._users[storage.address] -= 1
        if not self._users[storage.address]:
            self._memory.used -= storage.size

    def spill(self) -> None:
        """Move all tensors out of the memory of their device."""
        for number, tensor in list(self._tensors.items()):
            if number not in self._devices:
                self.pop(number)
                self._move_out(number, tensor)

    def clear(self) -> None:
        """Free all tensors."""
        for number in list(self._tensors):
            self.pop(number)


class _Storage(NamedTuple):
    """The memory of a tensor, in bytes, and its address."""

    size: int
    address: int


def _storage_of(tensor: torch.Tensor) -> _Storage:
    storage = tensor.untyped_storage()
    return _Storage(storage.nbytes(), storage.data_ptr())


def _map_to_file(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in a temporary file that is deleted with it, see `_copy_into`."""
    return _copy_into(_make_file, tensor)


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the memory of the host, see `_copy_into`."""
    return _copy_into(_make_vector, tensor)


def _copy_into(
    make_vector: Callable[[int, torch.dtype], torch.Tensor], tensor: torch.Tensor
) -> torch.Tensor:
    """A copy in new memory; its strides are the same, so the same kernels read it.

    If the tensor is a view of a larger storage, the whole storage is copied.

    Args:
        make_vector: Makes the memory, for a number of elements of a type.
        tensor: The tensor.
    """
    if not _is_dense(tensor):
        copy = _copy_into(make_vector, _view_storage(tensor))
        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    flat = make_vector(tensor.numel(), tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _make_vector(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype)


def _make_file(size: int, dtype: torch.dtype) -> torch.Tensor:
    descriptor, name = tempfile.mkstemp(prefix="qdq-replay-")
    os.close(descriptor)
    try:
        return torch.from_file(name, shared=True, size=size, dtype=dtype)
    finally:
        Path(name).unlink()


def _copy_back(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of `_copy_into` on its device, with the same strides; the copy itself for the CPU."""
    if device.type == "cpu":
        return tensor
    moved = _view_storage(tensor).to(device, non_blocking=True)
    return moved.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _view_storage(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of the memory that a tensor is a view of."""
    memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return memory.set_(tensor.untyped_storage())


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements of a tensor fill its memory without gaps."""
    if not tensor.numel():
        return False
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()
