"""Replaces float layers by their quantized counterparts, in place, and restores them.

A module keeps its identity: only its class changes, and quantizers are attached. So parameters, hooks, flags, the
device, references from anywhere and modules that are used twice need no special handling.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from qdq.corrections import undo_passes
from qdq.dataflow import Dataflow
from qdq.device import find_device
from qdq.errors import ArgumentTypeError
from qdq.float_rules import ModuleRules, reason_against_fp8, reason_against_type
from qdq.formats import FP8, FP8_BITS, INT8, require_formats
from qdq.forward import Contraction, ForwardTrace, join_name, require_model
from qdq.functions import MATRIX_PRODUCTS, WEIGHTED
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.nn.functions import QuantFunctionsMixin, remove_function_quantizers
from qdq.nn.registry import _DEFAULT_QUANT_MAP, _quant_entry, find_counterpart
from qdq.patterns import Pattern, Patterns
from qdq.quantizer import QuantDescriptor, disable_quantization
from qdq.text import list_names
from qdq.work import list_unknown_work, trace_work

logger = logging.getLogger(__name__)


class _FastPath(NamedTuple):
    """An attribute that decides whether a transformer module uses its fused kernel.

    Args:
        type: The class of the module.
        attribute: Name of the attribute.
        off: The value that switches the fused kernel off.
    """

    type: type[nn.Module]
    attribute: str
    off: Any


_FAST_PATHS = (
    _FastPath(nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    _FastPath(nn.TransformerEncoder, "use_nested_tensor", False),
)


@dataclass(frozen=True)
class PlannedModule:
    """The action for one module, and the reason.

    Args:
        name: Dotted name.
        type: Class of the float module.
        action: "quantize"; "float" (left so on purpose); "missed" (multiplies matrices, and qdq cannot reach it).
        reason: One sentence.
        weights: Number of elements of its own parameters with two or more dimensions.
        mapped: Whether its class, or a base of it, is in `_DEFAULT_QUANT_MAP`.
        macs: MACs of its own forward, without those of the modules in it; None if the model has not run.
    """

    name: str
    type: str
    action: str
    reason: str
    weights: int
    mapped: bool
    macs: int | None = None


@dataclass(frozen=True)
class SwapPlan:
    """Every module with weights or of a mapped type, and every other one whose forward multiplies.

    Args:
        modules: In the order of `named_modules`.
        unknown_work: Calls of operators whose MACs are not known, by dotted name; they are in no share.
    """

    modules: tuple[PlannedModule, ...]
    unknown_work: tuple[str, ...] = ()

    def of(self, action: str) -> list[PlannedModule]:
        """The modules with one action.

        Args:
            action: "quantize", "float" or "missed".
        """
        return [module for module in self.modules if module.action == action]

    def share_of(self, modules: Iterable[PlannedModule]) -> float:
        """The fraction of all known MACs that some of the modules have, 0 to 1; 0 if the model has not run."""
        total = sum(module.macs or 0 for module in self.modules)
        return sum(module.macs or 0 for module in modules) / max(total, 1)

    @property
    def weighted(self) -> list[PlannedModule]:
        """The modules with weights that are quantized."""
        return [module for module in self.of("quantize") if module.weights]

    def format_table(self) -> str:
        """The counts, then the modules that are not quantized, with the reasons; similar modules are on one line."""
        lines = [self._format_counts(), *self.list_reasons("missed"), *self.list_reasons("float")]
        if self.unknown_work:
            names = list_names(self.unknown_work, 3)
            lines.append(f"  the MACs of {len(self.unknown_work)} calls are unknown: {names}")
        return "\n".join(lines)

    def list_reasons(self, action: str) -> list[str]:
        """One line for all modules with the same action, class and reason, with their share of the MACs.

        Args:
            action: As for `of`.
        """
        groups: dict[tuple[str, str], list[PlannedModule]] = {}
        for module in self.of(action):
            groups.setdefault((module.type, module.reason), []).append(module)
        lines = []
        for (type_name, reason), modules in groups.items():
            shown = list_names([module.name or "the model" for module in modules], 2)
            line = f"  {action:6}  {len(modules)} {type_name} ({shown}): {reason}"
            if any(module.macs for module in modules):
                line += f"; {self.share_of(modules):.1%} of all MACs"
            lines.append(line)
        return lines

    def _format_counts(self) -> str:
        counts = Counter(module.action for module in self.modules)
        num_weighted = len(self.weighted)
        num_without_weights = counts["quantize"] - num_weighted
        quantized = f"{num_weighted} layers with weights quantized"
        if num_without_weights:
            quantized += f" and {num_without_weights} without"
        text = f"{quantized}; left in float: {counts['float']}, missed: {counts['missed']}"
        if any(module.macs for module in self.modules):
            text += f"; {self.share_of(self.of('quantize')):.1%} of all MACs in quantized layers"
        return text


def plan_swap(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
    formats: Sequence[str] = (INT8,),
) -> SwapPlan:
    """The dry run of `swap_modules`: which modules would be quantized, which would not, and why.

    See `qdq.patterns` for the pattern syntax. A name that matches includes everything below it.

    Args:
        model: A float model, or one that is partly swapped.
        example_inputs: One batch (see `forward.call_model`). With it the model runs once. This also finds plain calls
            like `F.conv2d`, and modules whose weights are used without calling the module.
        include: Only these; they are quantized even against a default rule. None: whatever the rules allow.
        exclude: These stay in float, even if `include` names them.
        formats: Formats of the layers, of `formats.FORMAT_NAMES`. For FP8 alone, layers without weights stay in float:
            TensorRT computes products in FP8, and nothing else.

    Returns:
        The plan. A pattern that matches nothing is logged as a warning.

    Raises:
        ArgumentTypeError: A pattern of another kind.
        ArgumentError: A regular expression that cannot be compiled.
    """
    require_model(model)
    require_formats(formats)
    trace = None if example_inputs is None else trace_work(model, example_inputs)[0]
    included = Patterns(include or (), "include")
    excluded = Patterns(exclude, "exclude")
    planner = _Planner(
        model, trace, included, excluded, formats=formats, includes_all=include is None
    )
    plan = planner.plan()
    included.warn_unused("module")
    excluded.warn_unused("module")
    return plan


def swap_modules(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
    formats: Sequence[str] = (INT8,),
    input_desc: QuantDescriptor | None = None,
    weight_desc: QuantDescriptor | None = None,
) -> SwapPlan:
    """Give every module of a mapped type, or of a subclass of one, its quantizers, in place.

    Args:
        model: A float model or any part of one (`model.layer1`).
        example_inputs: As for `plan_swap`.
        include: As for `plan_swap`.
        exclude: As for `plan_swap`.
        formats: As for `plan_swap`. Layers begin in the first one.
        input_desc: How inputs are quantized; if None, in the first format, per tensor.
        weight_desc: How weights are quantized; if None, in the first format: int8 with a range for each output channel,
            FP8 per tensor.

    Returns:
        The plan that was carried out; `missed` modules are logged as a warning.

    Raises:
        ArgumentTypeError: As for `plan_swap`.
        ArgumentError: As for `plan_swap`.
    """
    for desc in (input_desc, weight_desc):
        if not isinstance(desc, QuantDescriptor | None):
            raise ArgumentTypeError(
                f"a descriptor is of type {type(desc).__name__}.", "pass a QuantDescriptor."
            )
    plan = plan_swap(model, example_inputs, include=include, exclude=exclude, formats=formats)
    if formats[0] == FP8.name:
        input_desc = input_desc or QuantDescriptor(num_bits=FP8_BITS)
        weight_desc = weight_desc or QuantDescriptor(num_bits=FP8_BITS)
    modules = dict(model.named_modules())
    model_device = find_device(model)
    for planned in plan.of("quantize"):
        module = modules[planned.name]
        if not isinstance(module, QuantInputMixin):
            _swap_one(planned.name, module, input_desc, weight_desc, model_device)
    switch_fast_paths(model)
    missed = plan.list_reasons("missed")
    if missed:
        logger.warning("some modules multiply matrices in float:\n%s", "\n".join(missed))
    return plan


def restore_modules(model: nn.Module) -> int:
    """Restore the float model: the original classes, weights and biases, and no quantizers.

    Weights and biases that an accuracy pass changed (`qdq.corrections`) are those of before; training is not undone.

    A module whose class was written as a quantized one (`class MyConv(QuantConv2d)`) has no float class of its own:
    its quantizers are disabled, and a warning names it.

    Returns:
        The number of restored layers.
    """
    require_model(model)
    undo_passes(model)
    for module in list(model.modules()):
        if isinstance(module, QuantFunctionsMixin):
            remove_function_quantizers(module)
    num_restored = 0
    only_quantized: list[str] = []
    for name, layer in quantized_layers(model).items():
        if "float_class" in vars(type(layer)):
            _restore_one(layer)
            num_restored += 1
        else:
            disable_quantization(layer)
            only_quantized.append(f"{name} ({type(layer).__name__})")
    if only_quantized:
        logger.warning(
            "%d modules are of classes that only exist quantized; their quantizers are disabled instead: %s",
            len(only_quantized),
            ", ".join(only_quantized),
        )
    switch_fast_paths(model)
    return num_restored


def quantized_layers(model: nn.Module) -> dict[str, QuantInputMixin]:
    """The swapped modules by dotted name; a module used twice is listed once.

    Args:
        model: Any model or a part of one.
    """
    layers: dict[str, QuantInputMixin] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantInputMixin):
            layers[name] = module
    return layers


class _Decision(NamedTuple):
    """Action and reason, as in `PlannedModule`."""

    action: str
    reason: str


_SCRIPTED = _Decision("missed", "scripted: cannot be quantized; use the Python module")


class _Planner:
    """Decides for each module of a model whether it is quantized.

    Args:
        model: The model.
        trace: One forward of it, if it has run.
        included: Patterns of modules that are quantized against a default rule.
        excluded: Patterns of modules that stay in float.
        formats: As for `plan_swap`.
        includes_all: Whether modules that no pattern includes may be quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: ForwardTrace | None,
        included: Patterns,
        excluded: Patterns,
        *,
        formats: Sequence[str],
        includes_all: bool,
    ) -> None:
        self._names_of: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names_of.setdefault(module, []).append(name)
        self._modules = {names[0]: module for module, names in self._names_of.items()}
        self._trace = trace
        self._usage = None if trace is None else _Usage(trace)
        self._rules = ModuleRules(self._modules, None if trace is None else Dataflow(trace))
        self._included = included
        self._excluded = excluded
        self._has_int8 = INT8 in formats
        self._includes_all = includes_all
        self._called_when_swapped: set[str] = set()

    def plan(self) -> SwapPlan:
        """The plan for all modules, a module before those inside it."""
        planned = []
        for module, names in self._names_of.items():
            if _is_candidate(module):
                planned.append(self._plan_module(names, module))
        planned += self._plan_calls({module.name for module in planned})
        unknown_work = () if self._trace is None else list_unknown_work(self._trace)
        return SwapPlan(tuple(planned), unknown_work)

    def _plan_module(self, names: list[str], module: nn.Module) -> PlannedModule:
        """The plan for one module.

        Args:
            names: All dotted names of the module; the plan has the first.
            module: A candidate.
        """
        name = names[0]
        float_type = _float_type(module)
        counterpart = find_counterpart(float_type)
        exclusion = self._excluded.match(names, module)
        inclusion = self._included.match(names, module)
        if isinstance(module, QuantInputMixin):
            decision = _Decision("quantize", "already swapped")
        elif counterpart is None:
            decision = self._decide_unmapped(name, module)
        elif exclusion:
            decision = _Decision("float", f"excluded by {exclusion}")
        elif not self._includes_all and not inclusion:
            decision = _Decision("float", "not included")
        elif not self._has_int8 and not inclusion and (reason := reason_against_fp8(module)):
            decision = _Decision("float", reason)
        else:
            decision = self._decide_mapped(name, module, counterpart, follows_rules=not inclusion)
        if decision.action == "quantize" and counterpart is not None:
            for child in counterpart.called_children:
                self._called_when_swapped.add(join_name(name, child))
        return PlannedModule(
            name,
            float_type.__name__,
            decision.action,
            decision.reason,
            _count_weights(module),
            mapped=counterpart is not None,
            macs=None if self._usage is None else self._usage.macs[name],
        )

    def _decide_mapped(
        self,
        name: str,
        module: nn.Module,
        counterpart: type[QuantInputMixin],
        *,
        follows_rules: bool,
    ) -> _Decision:
        """The decision for a module that has a quantized counterpart and that no pattern excludes.

        Args:
            name: Dotted name.
            module: The module.
            counterpart: Its quantized class.
            follows_rules: Whether the default rules apply; an inclusion overrides them.
        """
        obstacle = _find_obstacle(module, counterpart)
        if not obstacle and self._usage is not None:
            readers = self._usage.readers_of(_list_memory(module, counterpart))
            never_runs = self._usage.num_runs[name] == 0 and name not in self._called_when_swapped
            if never_runs and not readers:
                return _Decision("float", "it does not run on the example inputs")
            obstacle = _describe_other_use(name, readers, self._usage, never_runs=never_runs)
        if obstacle:
            return _Decision("missed", obstacle)
        rule = self._rules.reason_against(name, module) if follows_rules else ""
        if rule:
            return _Decision("float", rule)
        mapped_name = _find_entry(counterpart).mod_name
        if mapped_name == type(module).__name__:
            return _Decision("quantize", f"{mapped_name} is in the map")
        return _Decision("quantize", f"subclass of {mapped_name}, keeps its own forward")

    def _decide_unmapped(self, name: str, module: nn.Module) -> _Decision:
        """The decision for a module with parameters and no counterpart."""
        rule = reason_against_type(module)
        if rule:
            return _Decision("float", rule)
        if isinstance(module, torch.jit.ScriptModule):
            return _SCRIPTED
        if self._usage is None:
            return _suspect(module)
        calls = self._usage.products.get(name)
        if calls:
            return self._decide_calls(module, calls)
        functions = self._usage.functions.get(name)
        called = list_names(list(functions), 3) if functions else "nothing"
        return _Decision(
            "float", f"its own forward calls {called}: no matrix product that runs in int8"
        )

    def _decide_calls(self, module: nn.Module, calls: list[Contraction]) -> _Decision:
        """The decision for a module whose forward multiplies matrices itself."""
        if isinstance(module, torch.jit.ScriptModule):
            return _SCRIPTED
        rule = self._rules.reason_against_products(calls)
        if rule:
            return _Decision("float", rule)
        functions = {call.function for call in calls}
        is_reached = not functions.isdisjoint(WEIGHTED | MATRIX_PRODUCTS)
        hint = "see rewire_operations" if is_reached else "rewire_operations does not reach it"
        called = ", ".join(sorted(functions))
        return _Decision(
            "missed", f"{type(module).__name__}.forward calls {called} directly; {hint}"
        )

    def _plan_calls(self, planned: set[str]) -> list[PlannedModule]:
        """Modules without parameters whose forward multiplies.

        Args:
            planned: Dotted names of the modules that are planned already.
        """
        if self._usage is None:
            return []
        callers = []
        for name, calls in self._usage.products.items():
            if name not in planned:
                decision = self._decide_calls(self._modules[name], calls)
                callers.append(self._plan_caller(name, decision, self._usage))
        for name, macs in self._usage.macs.items():
            if macs and name not in planned and name not in self._usage.products:
                called = list_names(list(self._usage.functions[name]), 3)
                reason = f"its own forward calls {called}: no product that runs in int8"
                callers.append(self._plan_caller(name, _Decision("float", reason), self._usage))
        return callers

    def _plan_caller(self, name: str, decision: _Decision, usage: _Usage) -> PlannedModule:
        """The plan for a module without parameters.

        Args:
            name: Dotted name.
            decision: Action and reason.
            usage: How modules were used in the forward.
        """
        return PlannedModule(
            name,
            type(self._modules[name]).__name__,
            decision.action,
            decision.reason,
            weights=0,
            mapped=False,
            macs=usage.macs[name],
        )


def _describe_other_use(name: str, readers: set[str], usage: _Usage, *, never_runs: bool) -> str:
    """Why quantizers in a module would have no effect, according to the forward.

    Args:
        name: Dotted name.
        readers: Modules whose products read its weights.
        usage: How modules were used in the forward.
        never_runs: Whether its own forward never runs.

    Returns:
        The reason; "" if the module runs and its weights are used unchanged.
    """
    if never_runs:
        return "its own forward never runs: the module around it reads its weight directly"
    if name in usage.products and name not in readers:
        return "its forward transforms the weight and uses the result, which rewire_operations can quantize"
    return ""


class _Usage:
    """How modules were used in one forward.

    Args:
        trace: The forward.

    Attributes:
        num_runs: How often each module ran, by dotted name.
        products: Module -> the products that its forward called as functions.
        functions: Module -> the functions that its forward called, each once, in order.
        macs: Module -> MACs of these functions.
    """

    def __init__(self, trace: ForwardTrace) -> None:
        self.num_runs = trace.calls
        self.products: dict[str, list[Contraction]] = {}
        self.functions: dict[str, dict[str, None]] = {}
        self.macs: Counter[str] = Counter()
        self._readers: dict[int, set[str]] = {}  # of each memory
        for operation in trace.operations:
            self.macs[operation.module] += operation.metered // 2
            self.functions.setdefault(operation.module, {})[operation.function] = None
        for call in trace.contractions:
            self.products.setdefault(call.module, []).append(call)
            for storage in call.storages:
                self._readers.setdefault(storage, set()).add(call.module)

    def readers_of(self, memory: Iterable[int]) -> set[str]:
        """Modules whose products read any of the given tensors.

        Args:
            memory: Addresses of the memory of the tensors.
        """
        readers: set[str] = set()
        for address in memory:
            readers |= self._readers.get(address, set())
        return readers


def _is_candidate(module: nn.Module) -> bool:
    """Whether the plan names a module: one that is swapped, has a quantized counterpart or parameters of its own."""
    if isinstance(module, QuantInputMixin) or find_counterpart(type(module)) is not None:
        return True
    return any(parameter is not None for parameter in module._parameters.values())


def _find_obstacle(module: nn.Module, counterpart: type[QuantInputMixin]) -> str:
    """Why a module cannot become its counterpart; "" if it can."""
    if counterpart.replaces_forward and not _has_mapped_forward(module, counterpart):
        return (
            "its forward differs from that of the class in the map, and swapping would replace it"
        )
    if not issubclass(counterpart, QuantMixin):
        return ""
    weights = [module._parameters.get(name) for name in counterpart.weights_of(module).values()]
    if any(isinstance(weight, UninitializedParameter) for weight in weights):
        return "its weight is not initialized yet: run the model once, then swap"
    if any(weight is None for weight in weights):
        return "its weight is computed: rewire_operations quantizes the product, or remove the parametrization"
    return ""


def _has_mapped_forward(module: nn.Module, counterpart: type[QuantInputMixin]) -> bool:
    """Whether a module has the forward of the class in the map, not that of a subclass or one bound to the instance."""
    mapped_class = _find_entry(counterpart).replace_mod.float_class
    return getattr(module.forward, "__func__", None) is mapped_class.forward


def _find_entry(counterpart: type[QuantInputMixin]) -> _quant_entry:
    """The entry of the map whose quantized class a counterpart is, or is derived from."""
    return next(entry for entry in _DEFAULT_QUANT_MAP if issubclass(counterpart, entry.replace_mod))


def _list_memory(module: nn.Module, counterpart: type[QuantInputMixin]) -> set[int]:
    """Memory addresses of the weights that would be quantized in a module.

    Args:
        module: The module.
        counterpart: Its quantized class; one without weights gives an empty set.
    """
    addresses: set[int] = set()
    if not issubclass(counterpart, QuantMixin):
        return addresses
    for name in counterpart.weights_of(module).values():
        weight = module._parameters.get(name)
        if weight is not None:
            addresses.add(weight.untyped_storage().data_ptr())
    return addresses


def _suspect(module: nn.Module) -> _Decision:
    """The decision for a module with parameters and no counterpart, in a model that has not run."""
    if _count_weights(module) == 0:
        return _Decision("float", "its parameters are added or multiplied element by element")
    return _Decision(
        "missed",
        f"{type(module).__name__} has weights of its own and no counterpart in the map; give example inputs to see "
        "how it uses them, or add one with register_module",
    )


def _count_weights(module: nn.Module) -> int:
    """Number of elements of a module's own parameters with two or more dimensions."""
    count = 0
    for parameter in module._parameters.values():
        if parameter is None or isinstance(parameter, UninitializedParameter):
            continue
        if parameter.dim() >= 2:
            count += parameter.numel()
    return count


def _float_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was swapped."""
    return module.float_class if isinstance(module, QuantInputMixin) else type(module)


def _swap_one(
    name: str,
    module: nn.Module,
    input_desc: QuantDescriptor | None,
    weight_desc: QuantDescriptor | None,
    model_device: torch.device,
) -> None:
    """Give one module its quantized class and its quantizers, on the device of its parameters.

    Args:
        name: Dotted name.
        module: The module, of a mapped type.
        input_desc: As for `swap_modules`.
        weight_desc: As for `swap_modules`.
        model_device: Where the quantizers are if the module has no parameters.
    """
    quant_class = find_counterpart(type(module))
    assert quant_class is not None  # noqa: S101  # the plan has looked it up
    parameter = next(module.parameters(), None)
    device = model_device if parameter is None else parameter.device
    module.__class__ = quant_class
    if isinstance(module, QuantMixin):
        module.init_quantizer(input_desc, weight_desc)
    elif isinstance(module, QuantInputMixin):
        module.init_quantizer(input_desc)
    assert isinstance(module, QuantInputMixin)  # noqa: S101
    for attribute, quantizer in module.quantizers().items():
        quantizer.name = join_name(name, attribute)
        quantizer.train(module.training)
        quantizer.to(device)


def _restore_one(layer: QuantInputMixin) -> None:
    """Remove the quantizers of a layer and give it its float class."""
    for attribute in layer.quantizers():
        delattr(layer, attribute)
    layer.__class__ = layer.float_class  # type: ignore[assignment]


def switch_fast_paths(model: nn.Module) -> None:
    """Have transformer layers call their quantized children, also those of a number system.

    In evaluation `nn.TransformerEncoderLayer` hands the weights of its linear layers to one fused kernel, and
    quantization would be skipped without a warning. It does so only if it knows the activation of the layer.
    `nn.TransformerEncoder` hands it nested tensors if there is padding, which only that kernel accepts. The layer
    itself must be part of `model`: if its linear layers are swapped one by one, the fused kernel stays in use.

    Args:
        model: A model after its layers were quantized or restored.
    """
    for module in model.modules():
        for path in _FAST_PATHS:
            if isinstance(module, path.type):
                _switch_one_path(module, path)


def _switch_one_path(module: nn.Module, path: _FastPath) -> None:
    """Switch a fused kernel off if something in a module is quantized, and on again if not.

    Args:
        module: The transformer module.
        path: Its attribute; the float value is kept beside it, under another name.
    """
    is_quantized = any(_quantizes(inner) for inner in module.modules())
    backup = f"_float_{path.attribute}"
    is_off = backup in vars(module)
    if is_quantized and not is_off:
        vars(module)[backup] = getattr(module, path.attribute)
        setattr(module, path.attribute, path.off)
    elif is_off and not is_quantized:
        setattr(module, path.attribute, vars(module).pop(backup))


def _quantizes(module: nn.Module) -> bool:
    """Whether a module is a swapped one, or a quantizer of a number system, which says so itself."""
    return isinstance(module, QuantInputMixin) or getattr(module, "is_foreign_quantizer", False)
