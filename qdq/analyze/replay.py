"""Forwards in many states of the quantizers, each at the cost of what its state changes; bit-identical to full ones.

The first forward of a batch is recorded: every torch function and every quantizer, with the numbers of the tensors that
went in and came out. In a later forward the model's own code runs again, but a call whose tensors are all those of the
recording is answered from it without being computed. So branches, shared modules and calls with several inputs need
no special case, and what is computed is exactly what depends on the quantizers that were switched.

The model is handed stand-ins: tensors with the shape, type and device of the value and hardly any memory. Functions in
place work on a copy, and their stand-in is renumbered. Of the values only those are kept that some later forward
reads, as long as one does; beyond `cache_bytes` they lie in mapped temporary files. What depends on parameters alone is
the same for every batch: fake-quantized weights are kept once, up to half of `cache_bytes`, and the rest is computed
again where it is read.

Small models spend more time on this bookkeeping than on arithmetic. So recordings are timed beside plain forwards, and
where full forwards are faster they are what runs.
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
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from qdq.forward import call_model, evaluating, is_in_place, tensors_of
from qdq.quantizer import TensorQuantizer, named_quantizers, toggling

CACHE_BYTES = 2 * 2**30
_FIRST_REPLAYED = 2**40  # numbers of tensors that replays compute: above those of any recording
_SLOT = "_qdq_slot"
_Variants = Mapping[str, Sequence[TensorQuantizer]]
_Compute = Callable[[list[torch.Tensor]], tuple[list[Any], TreeSpec]]
_METADATA = frozenset(
    {
        *(
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
        ),
        *(
            "is_quantized",
            "is_nested",
            "is_mps",
            "is_xpu",
            "is_leaf",
            "itemsize",
            "nbytes",
            "names",
            "grad_fn",
        ),
    }
)
_NOT_IN_PLACE = frozenset({"__index__", "__int__", "__invert__"})  # by their names they might be
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


class _NotReplayableError(Exception):
    """The model does something that cannot be recorded: it is evaluated in full. Never leaves this module."""


@dataclass(slots=True)
class _Slot:
    """What stands behind a tensor that the model holds.

    Args:
        number: Names the value: equal numbers are equal tensors.
        value: The tensor itself; None if it has to be looked up.
    """

    number: int
    value: torch.Tensor | None = None


@dataclass(slots=True)
class _Output:
    """A tensor in the result of a call.

    Args:
        number: Of a new tensor.
        shell: Has its shape, type and device.
        argument: Position among the tensors that went in of the one that is returned as it is; -1 for a new tensor.
    """

    number: int
    shell: torch.Tensor
    argument: int = -1


@dataclass(slots=True)
class _Call:
    """One recorded call.

    Args:
        compute: From the tensors that go in to the result, flat, and its structure.
        inputs: Numbers of the tensors that go in.
        in_place: Whether and how it changes the first of them, see `_Recording._answer`.
        changed: Number of what that one is then; -1 if it stays what it is.
        outputs: The result, flat: an `_Output` for each tensor.
        spec: How the result is put together.
        quantizer: The quantizer that was called, None for a torch function.
        is_pure: Whether the result may be handed out again.
    """

    compute: _Compute
    inputs: list[int]
    in_place: str
    changed: int
    outputs: list[Any]
    spec: TreeSpec
    quantizer: TensorQuantizer | None
    is_pure: bool

    @property
    def made(self) -> list[int]:
        """Numbers of the tensors that it makes."""
        new = [
            output.number
            for output in self.outputs
            if isinstance(output, _Output) and output.argument < 0
        ]
        return new if self.changed < 0 else [*new, self.changed]


class Replay:
    """Evaluates a model on batches, each in several states of its quantizers.

    A model with modules of TorchScript, one that draws random numbers or one that changes views in place is evaluated
    in full; `reason` says so then. So is one for which that is faster; the results are the same.

    Args:
        model: Any module.
        cache_bytes: Of values and weights in memory; values beyond it wait in temporary files.
        always: Replay also where full forwards are faster.
    """

    def __init__(
        self, model: nn.Module, *, cache_bytes: int = CACHE_BYTES, always: bool = False
    ) -> None:
        self._model = model
        self._always = always
        self._bookkeeping = 0.0  # of a recording or a replay, in plain forwards
        self._memory = _Memory(cache_bytes)
        self._weights = _Weights(self._memory, model)
        is_script = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
        self.reason = "a part of the model is TorchScript" if is_script else ""
        """Why forwards are computed in full, "" if they are replayed."""
        self._planned: tuple[dict[str, tuple[int, ...]], _Plan] | None = None

    def evaluate(
        self, batch: Any, variants: _Variants, measure: Callable[[str | None, Any], None]
    ) -> None:
        """Measure the outputs on a batch, with the quantizers as they are and with some of them switched.

        Args:
            batch: As for `trace.call_model`.
            variants: Name -> the quantizers that are switched, from on to off and from off to on.
            measure: Is given None and the outputs of the model as it is, then the name of each variant and its
                outputs, in the order in which the quantizers are met.
        """
        with evaluating(self._model):
            plain, seconds = _time_outputs(functools.partial(call_model, self._model, batch))
            measure(None, plain)
            recording = (
                self._record(batch, plain, seconds, variants) if self._pays(variants) else None
            )
            try:
                for name in recording.order if recording else variants:
                    with toggling(variants[name]):
                        outputs = (
                            self._replay(recording, batch)
                            if recording
                            else call_model(self._model, batch)
                        )
                    measure(name, outputs)
                    if recording:
                        recording.free_after(name)
            finally:
                if recording:
                    recording.close()

    def _pays(self, variants: _Variants) -> bool:
        """Whether replays, with the recordings still to be made, take less time than so many full forwards.

        A recording is a forward with bookkeeping; a replay has the bookkeeping, and on average half of the arithmetic.
        """
        if self.reason or self._always:
            return not self.reason and len(variants) > 1
        recordings = 1 if self._is_planned(variants) else 2
        return self._cost(len(variants), recordings) < len(variants)

    def _cost(self, replays: int, recordings: int) -> float:
        """In plain forwards."""
        return recordings * (1 + self._bookkeeping) + replays * (0.5 + self._bookkeeping)

    def _record(
        self, batch: Any, plain: Any, seconds: float, variants: _Variants
    ) -> _Recording | None:
        """The recording of a batch with all values that the variants read.

        Args:
            batch: The batch.
            plain: Outputs of a plain forward.
            seconds: How long that took.
            variants: As for `evaluate`.

        Returns:
            None if it cannot be made, which `reason` tells then, or if it does not pay.
        """
        with ExitStack() as undo:
            try:
                plan = self._plan(batch, variants)
                recording = _Recording(self._model, self._memory, self._weights, plan)
                undo.callback(recording.close)
                outputs, recorded = _time_outputs(functools.partial(recording.record, batch))
            except Exception as error:  # the plain forward went through: whatever this is, it is not the model's fault
                self.reason = (
                    str(error)
                    if isinstance(error, _NotReplayableError)
                    else f"recording fails: {error!r}"
                )
                return None
            if not _are_equal(plain, outputs):
                self.reason = "a recorded forward differs from a plain one: random numbers, or views changed in place"
                return None
            self._bookkeeping = max(recorded / max(seconds, 1e-9) - 1, 0.0)
            if not self._always and self._cost(len(variants), recordings=0) >= len(variants):
                return None
            undo.pop_all()
            return recording

    def _plan(self, batch: Any, variants: _Variants) -> _Plan:
        """What is kept; the first batch with the same variants tells it, for a recording without values."""
        if self._planned is None or not self._is_planned(variants):
            structure = _Recording(self._model, self._memory, self._weights)
            structure.record(batch)  # not timed: what torch and Python do once only would count
            self._planned = (_identify(variants), structure.plan(variants))
        return self._planned[1]

    def _is_planned(self, variants: _Variants) -> bool:
        return self._planned is not None and self._planned[0] == _identify(variants)

    def _replay(self, recording: _Recording, batch: Any) -> Any:
        try:
            return recording.replay(batch)
        except (
            Exception
        ):  # another path through the model, say; if it is the model's own, it comes again
            return call_model(self._model, batch)


def _identify(variants: _Variants) -> dict[str, tuple[int, ...]]:
    return {name: tuple(map(id, quantizers)) for name, quantizers in variants.items()}


def _time_outputs(run: Callable[[], Any]) -> tuple[Any, float]:
    """Outputs, and the seconds that this thread worked for them; of other devices, those until they were there."""
    began, began_work = time.perf_counter(), time.thread_time()
    outputs = run()
    first = next(iter(tensors_of(outputs)), None)
    if first is None or first.device.type == "cpu":
        return outputs, time.thread_time() - began_work  # other processes do not count
    first.flatten()[:1].cpu()  # waits for the device
    return outputs, time.perf_counter() - began


@dataclass(frozen=True)
class _Plan:
    """Which values the variants read.

    Args:
        order: The variants, in the order in which their quantizers are met.
        kept: Numbers of the values that some variant reads.
        freed: Variant -> numbers of the values that no later one reads.
    """

    order: tuple[str, ...] = ()
    kept: frozenset[int] = frozenset()
    freed: Mapping[str, list[int]] | None = None


class _Recording(TorchFunctionMode):
    """One recorded forward, and others that are answered from it.

    Args:
        model: The model.
        memory: What values and weights may take.
        weights: Those of all recordings.
        plan: Which values are kept.
    """

    def __init__(
        self, model: nn.Module, memory: _Memory, weights: _Weights, plan: _Plan | None = None
    ) -> None:
        super().__init__()
        self._model = model
        self._quantizers = [quantizer for _, quantizer in named_quantizers(model)]
        self._plan = plan or _Plan()
        self._values = _Values(memory)
        self._weights = weights
        self._origins: dict[
            int, Hashable
        ] = {}  # what values that depend on parameters alone were computed from
        self._sequence: list[_Call] = []
        self._calls: dict[Hashable, _Call] = {}
        self._makers: dict[int, _Call] = {}
        self._externals: dict[
            int, tuple[torch.Tensor, _Slot]
        ] = {}  # parameters and inputs, by identity
        self._external_values: dict[int, torch.Tensor] = {}
        self._outputs: list[int] = []
        self._is_recording = True
        self._numbers = itertools.count()
        self._begin()

    @property
    def order(self) -> tuple[str, ...]:
        """The variants, in the order in which their quantizers are met."""
        return self._plan.order

    def record(self, batch: Any) -> Any:
        """The outputs of the first forward."""
        outputs = self._forward(batch)
        self._outputs = [self._slot(tensor).number for tensor in tensors_of(outputs)]
        resolved = self._resolve(outputs)
        self._is_recording = False
        self._numbers = itertools.count(_FIRST_REPLAYED)
        return resolved

    def replay(self, batch: Any) -> Any:
        """The outputs of a later forward, with quantizers in another state."""
        self._begin()
        return self._resolve(self._forward(batch))

    def free_after(self, variant: str) -> None:
        """Let go of the values that only variants up to this one read."""
        for number in (self._plan.freed or {}).get(variant, ()):
            self._values.pop(number)

    def close(self) -> None:
        """Let go of all values."""
        self._values.clear()

    def plan(self, variants: _Variants) -> _Plan:
        """What the variants read, if each takes the path of the recorded forward."""
        first: dict[str, int] = {}
        last_reader: dict[int, str] = {}
        reads: dict[str, set[int]] = {}
        for name, quantizers in variants.items():
            first[name], reads[name] = self._simulate({id(quantizer) for quantizer in quantizers})
        order = tuple(sorted(variants, key=first.__getitem__))
        for name in order:
            last_reader.update(
                (number, name) for number in reads[name] if number not in self._origins
            )
        freed: dict[str, list[int]] = {}
        for number, name in last_reader.items():
            freed.setdefault(name, []).append(number)
        return _Plan(order, frozenset(last_reader), freed)

    def _simulate(self, switched: set[int]) -> tuple[int, set[int]]:
        """Position of the first call that changes with some quantizers, and the values that the changed calls read."""
        first = len(self._sequence)
        changed: set[int] = set()
        reads: set[int] = set()
        for position, call in enumerate(self._sequence):
            if (
                call.is_pure
                and id(call.quantizer) not in switched
                and changed.isdisjoint(call.inputs)
            ):
                continue
            if call.is_pure:
                first = min(first, position)
            reads.update(number for number in call.inputs if number not in changed)
            changed.update(call.made)
        reads.update(number for number in self._outputs if number not in changed)
        return first, reads

    def _begin(self) -> None:
        self._seen: Counter[Hashable] = Counter()
        self._guests: dict[
            int, tuple[torch.Tensor, _Slot]
        ] = {}  # what only this forward brings along
        self._rebound: dict[int, _Slot] = {}  # externals that this forward has changed in place

    def _forward(self, batch: Any) -> Any:
        with self._watching(), self:
            return call_model(self._model, batch)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Have the quantizers of the model ask here: each is one call, whatever it computes."""
        try:
            for quantizer in self._quantizers:
                vars(quantizer)["forward"] = functools.partial(self._quantize, quantizer)
            yield
        finally:
            for quantizer in self._quantizers:
                vars(quantizer).pop("forward", None)

    def _quantize(self, quantizer: TensorQuantizer, inputs: torch.Tensor) -> Any:
        def compute(tensors: list[torch.Tensor]) -> tuple[list[Any], TreeSpec]:
            result = type(quantizer).forward(quantizer, tensors[0])
            # While it is off its result has a number of its own, too.
            return tree_flatten(result.view_as(result) if result is tensors[0] else result)

        state = (quantizer.is_enabled, quantizer.is_quantizing)
        key = ("quantizer", id(quantizer), *state)
        with torch._C.DisableTorchFunction():
            return self._answer(key, (inputs,), compute, quantizer=quantizer)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        if (
            name == "__get__"
            and getattr(getattr(func, "__self__", None), "__name__", "") in _METADATA
        ):
            return func(*args, **kwargs)
        if func is torch.Tensor.__iter__:
            return iter(self.__torch_function__(torch.Tensor.unbind, types, args))
        if name == "__set__" or kwargs.get("out") is not None:
            raise _NotReplayableError(
                "the model has a function write into a tensor that it gives it"
            )
        place = _inplace_position(func)
        if kwargs.get("inplace") or (len(args) > place >= 0 and args[place]):
            args = tuple(False if position == place else each for position, each in enumerate(args))
            kwargs = {key: False if key == "inplace" else each for key, each in kwargs.items()}
            compute = functools.partial(_call_function, func, args, kwargs)
            return self._answer((func, "in place"), (args, kwargs), compute, in_place="result")
        compute = functools.partial(_call_function, func, args, kwargs)
        return self._answer(
            func, (args, kwargs), compute, in_place="copy" if _changes_argument(func, name) else ""
        )

    def _answer(
        self,
        function: Hashable,
        given: tuple[Any, ...],
        compute: _Compute,
        *,
        in_place: str = "",
        quantizer: TensorQuantizer | None = None,
    ) -> Any:
        """The result of a call: the recorded one, if all that goes in is what went in then.

        Args:
            function: What tells it from other functions.
            given: Its arguments.
            compute: Computes it.
            in_place: "copy" if it changes its first tensor, of which it gets a copy then; "result" if its result is
                what its first tensor is afterwards; "" if it changes nothing.
            quantizer: The quantizer that it is.
        """
        tensors: list[torch.Tensor] = []
        shape = _comparable(given, tensors)
        slots = [self._slot(tensor) for tensor in tensors]
        key = self._key(function, shape, slots)
        call = None if key is None or self._is_recording else self._calls.get(key)
        if call is not None:
            if call.changed >= 0:
                self._rebind(tensors[0], _Slot(call.changed))
            return _put_together([_hand_out(output, tensors) for output in call.outputs], call.spec)
        origin = None if in_place or key is None else self._origin(function, shape, slots)
        if origin is not None and quantizer is not None and quantizer.is_enabled:
            compute = functools.partial(self._weights.compute, origin, compute)
        call, results = self._compute(
            compute, slots, in_place if slots else "", quantizer, key is not None
        )
        if origin is not None:
            self._origins.update(
                (number, (origin, place)) for place, number in enumerate(call.made)
            )
        if call.changed >= 0:
            self._rebind(tensors[0], _Slot(call.changed, results.pop()))
        if self._is_recording:
            self._remember(key, call)
        handed = [
            _hand_out(output, tensors, result)
            for output, result in zip(call.outputs, results, strict=True)
        ]
        return _put_together(handed, call.spec)

    def _key(self, function: Hashable, shape: Hashable, slots: list[_Slot]) -> Hashable | None:
        """What tells a call from others: function, arguments, and how many equal ones came before."""
        key = (function, shape, *[slot.number for slot in slots])
        try:
            self._seen[key] += 1
        except TypeError:  # an argument that cannot be hashed
            return None
        return (key, self._seen[key])

    def _origin(self, function: Hashable, shape: Hashable, slots: list[_Slot]) -> Hashable | None:
        """What a call computes if all that goes in depends on parameters alone; the same in every recording."""
        origins = [self._origins.get(slot.number) for slot in slots]
        return (function, shape, *origins) if origins and None not in origins else None

    def _compute(
        self,
        compute: _Compute,
        slots: list[_Slot],
        in_place: str,
        quantizer: TensorQuantizer | None,
        has_key: bool,
    ) -> tuple[_Call, list[Any]]:
        """A call that is not in the recording, and its results; the last one is what it changed in place."""
        before = [self._value(slot) for slot in slots]
        results, spec, after = _run(compute, before, in_place)
        outputs = [self._describe(result, after) for result in results]
        changed = -1
        if in_place:
            if after[0].shape != before[0].shape:
                raise _NotReplayableError("the model changes the shape of a tensor in place")
            results.append(after[0])
            changed = self._number(after[0])
        is_pure = has_key and all(isinstance(output, (_Output, *_SCALARS)) for output in outputs)
        inputs = [slot.number for slot in slots]
        return _Call(compute, inputs, in_place, changed, outputs, spec, quantizer, is_pure), results

    def _describe(self, result: Any, tensors: list[torch.Tensor]) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        place = next((place for place, tensor in enumerate(tensors) if tensor is result), -1)
        return (
            _Output(-1, _NO_SHELL, place)
            if place >= 0
            else _Output(self._number(result), _shell_of(result))
        )

    def _number(self, value: torch.Tensor) -> int:
        number = next(self._numbers)
        if self._is_recording and number in self._plan.kept:
            self._values[number] = value
        return number

    def _remember(self, key: Hashable, call: _Call) -> None:
        self._sequence.append(call)
        self._makers.update(dict.fromkeys(call.made, call))
        if call.is_pure:
            self._calls[key] = call

    def _slot(self, tensor: torch.Tensor) -> _Slot:
        """What stands behind a tensor that the model has given to a function."""
        own: _Slot | None = tensor.__dict__.get(_SLOT) or self._rebound.get(id(tensor))
        if own is not None:
            return own
        known = (
            self._externals if id(tensor) in self._externals or self._is_recording else self._guests
        )
        if id(tensor) not in known:
            slot = _Slot(next(self._numbers), tensor)
            known[id(tensor)] = (tensor, slot)
            if self._weights.is_parameter(tensor):
                self._origins[slot.number] = (id(tensor), _version(tensor))
            if self._is_recording:
                self._external_values[slot.number] = tensor
        return known[id(tensor)][1]

    def _rebind(self, tensor: torch.Tensor, slot: _Slot) -> None:
        """Have a tensor that the model holds stand for another value from now on."""
        if _SLOT in tensor.__dict__:
            tensor.__dict__[_SLOT] = slot
        else:
            self._rebound[id(tensor)] = slot

    def _value(self, slot: _Slot) -> torch.Tensor:
        """The tensor of a number: at hand, kept, or computed anew by the call that made it."""
        if slot.value is not None:
            return slot.value
        kept = self._values.get(slot.number)
        if kept is None:
            kept = self._external_values.get(slot.number)
        return self._make_again(slot.number) if kept is None else kept

    def _make_again(self, number: int) -> torch.Tensor:
        """Only where a forward takes another path than the recorded one does it read what was not kept."""
        call = self._makers[number]
        results, _, after = _run(
            call.compute, [self._value(_Slot(each)) for each in call.inputs], call.in_place
        )
        if number == call.changed:
            return after[0]
        numbers = [
            output.number if isinstance(output, _Output) else None for output in call.outputs
        ]
        result: torch.Tensor = results[numbers.index(number)]
        return result

    def _resolve(self, outputs: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: self._value(self._slot(tensor)), outputs)


class _Memory:
    """What the values of a recording and the weights of all of them may take together.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def fits(self, size: int) -> bool:
        """Whether so many bytes more stay within the limit."""
        return self.used + size <= self.limit


class _Weights:
    """Fake-quantized weights, once for all batches; one that does not fit is computed where it is read.

    Args:
        memory: Where they have to fit; they take half of it at most.
        model: Whose parameters and buffers they come from.
    """

    def __init__(self, memory: _Memory, model: nn.Module) -> None:
        self._memory = memory
        self._parameters = {
            id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())
        }
        self._results: dict[Hashable, tuple[list[Any], TreeSpec]] = {}
        self._bytes = 0

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter or buffer; all are held here, so that no other has the identity."""
        return self._parameters.get(id(tensor)) is tensor

    def compute(
        self, origin: Hashable, compute: _Compute, tensors: list[torch.Tensor]
    ) -> tuple[list[Any], TreeSpec]:
        """The result of a quantizer, from its parameters or from here."""
        if origin in self._results:
            return self._results[origin]
        results, spec = compute(tensors)
        size = sum(_storage_of(tensor)[0] for tensor in results)
        if self._bytes + size <= self._memory.limit // 2 and self._memory.fits(size):
            self._results[origin] = (results, spec)
            self._bytes += size
            self._memory.used += size
        return results, spec


class _Values:
    """Tensors by number; those beyond a limit lie in files that are mapped into memory, and nowhere by name.

    Args:
        memory: Where they have to fit.
    """

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self._tensors: dict[int, torch.Tensor] = {}
        self._devices: dict[int, torch.device] = {}
        self._users: Counter[int] = Counter()  # of each storage: views share one

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        size, storage = _storage_of(tensor)
        if not self._users[storage] and size and not self._memory.fits(size):
            self._devices[number] = tensor.device
            self._tensors[number] = _map_to_file(tensor)
            return
        self._memory.used += 0 if self._users[storage] else size
        self._users[storage] += 1
        self._tensors[number] = tensor

    def get(self, number: int) -> torch.Tensor | None:
        """The tensor, None if it is not here."""
        tensor = self._tensors.get(number)
        return (
            tensor
            if tensor is None or number not in self._devices
            else tensor.to(self._devices[number])
        )

    def pop(self, number: int) -> None:
        """Let go of a tensor, if it is here."""
        tensor = self._tensors.pop(number, None)
        if tensor is None or self._devices.pop(number, None) is not None:
            return
        size, storage = _storage_of(tensor)
        self._users[storage] -= 1
        self._memory.used -= 0 if self._users[storage] else size

    def clear(self) -> None:
        """Let go of all of them."""
        for number in list(self._tensors):
            self.pop(number)


def _storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.nbytes(), storage.data_ptr()


def _is_dense(tensor: torch.Tensor) -> bool:
    return (
        tensor.numel() > 0 and torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    )


def _map_to_file(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in a file that vanishes with it, with the same strides, so that the same kernels read it.

    Where a tensor is a part of its memory, all of that is copied.
    """
    if not _is_dense(tensor):
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            tensor.untyped_storage()
        )
        return _map_to_file(whole).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
    descriptor, name = tempfile.mkstemp(prefix="qdq-replay-")
    os.close(descriptor)
    try:
        flat = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        Path(name).unlink()
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _run(
    compute: _Compute, tensors: list[torch.Tensor], in_place: str
) -> tuple[list[Any], TreeSpec, list[torch.Tensor]]:
    """The results of a call, flat, their structure, and what the tensors are that went in afterwards.

    Raises:
        _NotReplayableError: It changed another one than it should.
    """
    if in_place == "copy":
        tensors = [tensors[0].clone(), *tensors[1:]]
    kept = tensors[in_place == "copy" :]
    versions = list(map(_version, kept))
    results, spec = compute(tensors)
    if versions != list(map(_version, kept)):
        raise _NotReplayableError(
            "the model has a function change a tensor in place, and its name does not say so"
        )
    return results, spec, [results[0], *tensors[1:]] if in_place == "result" else tensors


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _call_function(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[torch.Tensor],
) -> tuple[list[Any], TreeSpec]:
    values = iter(tensors)
    return tree_flatten(func(*_substitute(args, values), **_substitute(kwargs, values)))


def _substitute(tree: Any, values: Iterator[torch.Tensor]) -> Any:
    """The same arguments with other tensors, in the order of `_comparable`."""
    if isinstance(tree, torch.Tensor):
        return next(values)
    if isinstance(tree, dict):
        return {key: _substitute(each, values) for key, each in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_substitute(each, values) for each in tree)
    return tree


def _comparable(tree: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Arguments without their tensors, which are collected, as something to compare."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return torch.Tensor
    if isinstance(tree, dict):
        return (dict, *[(key, _comparable(each, tensors)) for key, each in tree.items()])
    if type(tree) in (tuple, list):
        return (type(tree), *[_comparable(each, tensors) for each in tree])
    if isinstance(tree, slice):
        bounds = (tree.start, tree.stop, tree.step)
        if any(isinstance(bound, torch.Tensor) for bound in bounds):
            raise _NotReplayableError("the model slices by a tensor")
        return (slice, *bounds)
    if isinstance(tree, (tuple, list)) and tensors_of(tree):
        raise _NotReplayableError(f"the model gives a function tensors in a {type(tree).__name__}")
    return (type(tree), tree)


def _hand_out(output: Any, tensors: list[torch.Tensor], value: Any = None) -> Any:
    """What the model gets as a result: a stand-in, or the argument that comes back."""
    if not isinstance(output, _Output):
        return output
    if output.argument >= 0:
        return tensors[output.argument]
    stand_in = output.shell.detach()
    stand_in.__dict__[_SLOT] = _Slot(output.number, value)
    return stand_in


def _put_together(results: list[Any], spec: TreeSpec) -> Any:
    return results[0] if spec.is_leaf() else tree_unflatten(results, spec)


def _shell_of(tensor: torch.Tensor) -> torch.Tensor:
    if (
        type(tensor) not in (torch.Tensor, nn.Parameter)
        or tensor.layout is not torch.strided
        or tensor.is_nested
    ):
        raise _NotReplayableError(
            f"the model computes with tensors of the kind {type(tensor).__name__}"
        )
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


_NO_SHELL = torch.empty(0)


def _changes_argument(func: Callable[..., Any], name: str) -> bool:
    """Whether a function changes its first tensor: `add_`, `+=`, `x[0] = 1`."""
    return name == "__setitem__" or (is_in_place(func) and name not in _NOT_IN_PLACE)


@functools.cache
def _inplace_position(func: Callable[..., Any]) -> int:
    """Position of the argument that has `F.relu` and others work in place; -1 if there is none."""
    try:
        return list(inspect.signature(func).parameters).index("inplace")
    except (TypeError, ValueError):  # native functions tell nothing; theirs have names of their own
        return -1


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two results hold the same tensors, to the last bit."""
    pairs = list(zip(tree_leaves(first), tree_leaves(second), strict=False))
    tensors = [(one, other) for one, other in pairs if isinstance(one, torch.Tensor)]
    return all(
        isinstance(other, torch.Tensor) and torch.equal(one, other) for one, other in tensors
    )
