"""Float layers exchanged for their quantized counterparts, in place, and back.

A module keeps its identity: only its class changes and quantizers are attached. So parameters, hooks, flags, device,
references from anywhere and modules used twice need no care.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import Linear
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd
from torch.nn.parameter import UninitializedParameter

from qdq.dataflow import Dataflow
from qdq.defaults import reason_against_convolution, reason_against_linear
from qdq.errors import ArgumentTypeError
from qdq.forward import Contraction, ForwardTrace, Operation, require_model, trace_forward
from qdq.functions import ATTENTION, CONVOLUTIONS, LINEAR, MATRIX_PRODUCTS, WEIGHTED
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.nn.functions import QuantFunctionsMixin, remove_function_quantizers
from qdq.nn.registry import _DEFAULT_QUANT_MAP, find_counterpart
from qdq.patterns import Pattern, Patterns
from qdq.quantizer import QuantDescriptor, disable_quantization
from qdq.text import group_names, list_names

logger = logging.getLogger(__name__)

# What switches the fused kernel of a transformer off: class, attribute, value.
_FAST_PATHS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_NEVER_INT8 = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.EmbeddingBag, nn.PReLU)


@dataclass(frozen=True)
class PlannedModule:
    """What happens to one module, and why.

    Args:
        name: Dotted name.
        type: Class of the float module.
        action: "quantize"; "float" (left so on purpose); "missed" (multiplies matrices, and qdq cannot reach it).
        reason: One sentence.
        weights: Number of elements of its own parameters with two or more dimensions.
        mapped: Whether its class, or a base of it, is in `_DEFAULT_QUANT_MAP`.
    """

    name: str
    type: str
    action: str
    reason: str
    weights: int
    mapped: bool


@dataclass(frozen=True)
class SwapPlan:
    """Every module with weights or of a mapped type.

    Args:
        modules: In the order of `named_modules`.
    """

    modules: tuple[PlannedModule, ...]

    def of(self, action: str) -> list[PlannedModule]:
        """The modules with one action."""
        return [module for module in self.modules if module.action == action]

    @property
    def weighted(self) -> list[PlannedModule]:
        """The modules with weights that are quantized."""
        return [module for module in self.of("quantize") if module.weights]

    def format_table(self) -> str:
        """The counts, then what is not quantized and why, alike modules in one line."""
        counts = Counter(module.action for module in self.modules)
        without_weights = counts["quantize"] - len(self.weighted)
        lines = [
            f"{len(self.weighted)} layers with weights quantized"
            + (f" and {without_weights} without" if without_weights else "")
            + f"; left in float: {counts['float']}, missed: {counts['missed']}"
        ]
        passed_over = self.of("missed") + self.of("float")
        groups = group_names(
            ((each.action, each.type, each.reason), each.name or "the model")
            for each in passed_over
        )
        lines += [
            f"  {action:6}  {len(names)} {kind} ({list_names(names, 2)}): {reason}"
            for (action, kind, reason), names in groups.items()
        ]
        return "\n".join(lines)


def plan_swap(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
) -> SwapPlan:
    """The dry run of `swap_modules`: what would be quantized, what not, and why.

    What a pattern may be says `qdq.patterns`. A name that matches stands for everything below it too.

    Args:
        model: A float model, or one that is partly swapped.
        example_inputs: One batch (see `trace.call_model`). With it the model runs once, and modules whose weights are
            used in another way than by calling them, and plain calls such as `F.conv2d`, are found too.
        include: Only these; they are quantized even against a default rule. None: whatever the rules allow.
        exclude: Not these, whatever else is said.

    Returns:
        The plan. A pattern that matches nothing is logged as a warning.

    Raises:
        ArgumentTypeError: A pattern of another kind.
        ArgumentError: A regular expression that cannot be compiled.
    """
    require_model(model)
    trace = None if example_inputs is None else trace_forward(model, example_inputs)
    included, excluded = Patterns(include or (), "include"), Patterns(exclude, "exclude")
    rules, usage = _DefaultRules(model, trace), None if trace is None else _Usage(trace)
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    planned = []
    for module, names in names_of.items():
        if _is_candidate(module):
            name = names[0]
            exclusion, inclusion = excluded.match(names, module), included.match(names, module)
            action, reason = _decide(
                name, module, usage, rules, exclusion, inclusion, include is None
            )
            float_type = _float_type(module)
            counterpart = find_counterpart(float_type)
            mapped = counterpart is not None
            planned.append(
                PlannedModule(
                    name, float_type.__name__, action, reason, _own_weights(module), mapped
                )
            )
            if action == "quantize" and counterpart is not None and usage is not None:
                usage.runs.update(
                    f"{name}.{child}".lstrip(".") for child in counterpart.called_children
                )
    planned.extend(_unplanned_calls(usage, model, rules, {module.name for module in planned}))
    included.warn_unused("module")
    excluded.warn_unused("module")
    return SwapPlan(tuple(planned))


def swap_modules(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
    input_desc: QuantDescriptor | None = None,
    weight_desc: QuantDescriptor | None = None,
) -> SwapPlan:
    """Give every module of a mapped type, or of a subclass of one, its quantizers, in place.

    Args:
        model: A float model or any part of one (`model.layer1`).
        example_inputs: As for `plan_swap`.
        include: As for `plan_swap`.
        exclude: As for `plan_swap`.
        input_desc: How inputs are quantized; the default of each quantized class if None.
        weight_desc: How weights are quantized; the default of each quantized class if None.

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
    plan = plan_swap(model, example_inputs, include=include, exclude=exclude)
    modules = dict(model.named_modules())
    for planned in plan.of("quantize"):
        module = modules[planned.name]
        if not isinstance(module, QuantInputMixin):
            _swap_one(planned.name, module, input_desc, weight_desc)
    _switch_fast_path(model)
    if plan.of("missed"):
        logger.warning("some modules multiply matrices in float:\n%s", plan.format_table())
    return plan


def restore_modules(model: nn.Module) -> int:
    """Give the float model back: the former classes, no quantizers; parameters are as they are now.

    A module whose class was written as a quantized one (`class MyConv(QuantConv2d)`) has no float class of its own:
    its quantizers are disabled, and a warning names it.

    Returns:
        How many layers were restored.
    """
    require_model(model)
    found = quantized_layers(model)
    own = {
        name: module for name, module in found.items() if "float_class" not in vars(type(module))
    }
    if own:
        logger.warning(
            "%d modules are of classes that only exist quantized; their quantizers are disabled instead: %s",
            len(own),
            ", ".join(f"{name} ({type(module).__name__})" for name, module in own.items()),
        )
        for module in own.values():
            disable_quantization(module)
    swapped = [module for name, module in found.items() if name not in own]
    for module in swapped:
        for attribute in module.quantizers():
            delattr(module, attribute)
        module.__class__ = module.float_class  # type: ignore[assignment]
    for owner in [module for module in model.modules() if isinstance(module, QuantFunctionsMixin)]:
        remove_function_quantizers(owner)
    _switch_fast_path(model)
    return len(swapped)


def quantized_layers(model: nn.Module) -> dict[str, QuantInputMixin]:
    """The swapped modules by dotted name; a module used twice comes once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantInputMixin)
    }


def _swap_one(
    name: str,
    module: nn.Module,
    input_desc: QuantDescriptor | None,
    weight_desc: QuantDescriptor | None,
) -> None:
    quant_class = find_counterpart(type(module))
    assert quant_class is not None  # noqa: S101  # the plan has looked it up
    reference = next(module.parameters(), None)
    module.__class__ = quant_class
    if isinstance(module, QuantMixin):
        module.init_quantizer(input_desc, weight_desc)
    elif isinstance(module, QuantInputMixin):
        module.init_quantizer(input_desc)
    assert isinstance(module, QuantInputMixin)  # noqa: S101
    for attribute, quantizer in module.quantizers().items():
        quantizer.name = f"{name}.{attribute}" if name else attribute
        quantizer.train(module.training)
        if reference is not None:
            quantizer.to(reference.device)


def _switch_fast_path(model: nn.Module) -> None:
    """Have transformer layers call their swapped children.

    In evaluation `nn.TransformerEncoderLayer` hands the weights of its linear layers to one fused kernel, and
    quantization would be passed over in silence. It does so only where it knows its activation. `nn.TransformerEncoder`
    hands it nested tensors where there is padding, which nothing but that kernel takes. The layer itself must
    be part of `model`: swapping its linear layers one by one leaves the fused kernel in place.
    """
    for module in model.modules():
        for kind, attribute, off in _FAST_PATHS:
            if not isinstance(module, kind):
                continue
            swapped = any(isinstance(inner, QuantInputMixin) for inner in module.modules())
            kept = f"_float_{attribute}"
            if swapped and kept not in vars(module):
                vars(module)[kept] = getattr(module, attribute)
                setattr(module, attribute, off)
            elif not swapped and kept in vars(module):
                setattr(module, attribute, vars(module).pop(kept))


def _float_type(module: nn.Module) -> type[nn.Module]:
    return module.float_class if isinstance(module, QuantInputMixin) else type(module)


def _own_weights(module: nn.Module) -> int:
    parameters = [p for p in module._parameters.values() if p is not None]
    return sum(
        p.numel() for p in parameters if not isinstance(p, UninitializedParameter) and p.dim() >= 2
    )


def _initialized(model: nn.Module) -> Iterator[nn.Parameter]:
    return (
        parameter
        for parameter in model.parameters()
        if not isinstance(parameter, UninitializedParameter)
    )


def _has_own_weights(module: nn.Module, counterpart: type[QuantMixin]) -> bool:
    weights = [module._parameters.get(name) for name in counterpart.weights_of(module).values()]
    return not any(
        weight is None or isinstance(weight, UninitializedParameter) for weight in weights
    )


def _describe_missing_weight(module: nn.Module, counterpart: type[QuantMixin]) -> str:
    weights = [module._parameters.get(name) for name in counterpart.weights_of(module).values()]
    if any(isinstance(weight, UninitializedParameter) for weight in weights):
        return "its weight is not initialized yet: run the model once, then swap"
    return "its weight is computed: rewire_operations quantizes the product, or remove the parametrization"


def _has_mapped_forward(module: nn.Module, counterpart: type[QuantInputMixin]) -> bool:
    """Whether a module's forward is that of the class in the map, neither a subclass's nor bound to the instance."""
    mapped = next(
        entry.replace_mod
        for entry in _DEFAULT_QUANT_MAP
        if issubclass(counterpart, entry.replace_mod)
    )
    return getattr(module.forward, "__func__", None) is mapped.float_class.forward


def _is_candidate(module: nn.Module) -> bool:
    has_parameters = any(p is not None for p in module._parameters.values())
    return (
        has_parameters
        or isinstance(module, QuantInputMixin)
        or find_counterpart(type(module)) is not None
    )


def _decide(
    name: str,
    module: nn.Module,
    usage: _Usage | None,
    rules: _DefaultRules,
    excluded: str,
    included: str,
    include_all: bool,
) -> tuple[str, str]:
    """Action and reason for one module."""
    if isinstance(module, QuantInputMixin):
        return "quantize", "already swapped"
    counterpart = find_counterpart(type(module))
    if counterpart is None:
        return _decide_unmapped(name, module, usage, rules)
    if excluded:
        return "float", f"excluded by {excluded}"
    if not include_all and not included:
        return "float", "not included"
    if counterpart.replaces_forward and not _has_mapped_forward(module, counterpart):
        return (
            "missed",
            "its forward is not that of the class in the map, and swapping would replace it",
        )
    if issubclass(counterpart, QuantMixin) and not _has_own_weights(module, counterpart):
        return "missed", _describe_missing_weight(module, counterpart)
    if usage is not None and (missed := _reason_missed(name, module, counterpart, usage)):
        return "missed", missed
    if not included and (rule := rules.reason_against(name, module)):
        return "float", rule
    mapped = next(
        entry.mod_name for entry in _DEFAULT_QUANT_MAP if issubclass(counterpart, entry.replace_mod)
    )
    if mapped == type(module).__name__:
        return "quantize", f"{mapped} is in the map"
    return "quantize", f"subclass of {mapped}, keeps its own forward"


def _decide_unmapped(
    name: str, module: nn.Module, usage: _Usage | None, rules: _DefaultRules
) -> tuple[str, str]:
    """Action and reason for a module with parameters and no counterpart."""
    if isinstance(module, _NEVER_INT8):
        return "float", "normalisation, embedding or activation: no int8 counterpart (R-LN, R-SM)"
    if isinstance(module, torch.jit.ScriptModule):
        return "missed", "scripted: cannot be quantized; use the Python module"
    calls = [] if usage is None else usage.products.get(name, [])
    if calls:
        return rules.describe_calls(module, calls)
    if usage is not None:
        functions = usage.functions.get(name)
        called = list_names(list(functions), 3) if functions else "nothing"
        return "float", f"its own forward calls {called}: no matrix product that runs in int8"
    if _own_weights(module) == 0:
        return "float", "its parameters are added or multiplied element by element"
    return "missed", (
        f"{type(module).__name__} has weights of its own and no counterpart in the map; give example inputs to see "
        "how it uses them, or add one with register_module"
    )


def _reason_missed(
    name: str, module: nn.Module, counterpart: type[QuantInputMixin], usage: _Usage
) -> str:
    """Why swapping this module would change nothing, seen from how it was used; "" if it would."""
    names = counterpart.weights_of(module).values() if issubclass(counterpart, QuantMixin) else ()
    memory = {
        weight.untyped_storage().data_ptr()
        for n in names
        if (weight := module._parameters.get(n)) is not None
    }
    used_by = usage.readers_of(memory)
    if usage.runs[name] == 0:
        if used_by:
            return "its own forward never runs: the module around it reads its weight directly"
        return "it does not run on the example inputs"
    if name in usage.products and name not in used_by:
        return "its forward transforms the weight and uses the result, which rewire_operations can quantize"
    return ""


class _Usage:
    """How modules were used in one forward.

    Args:
        trace: The forward.

    Attributes:
        runs: How often each module ran, by dotted name.
        products: Module -> the products that its forward called as functions.
        functions: Module -> the functions that its forward called, each once.
    """

    def __init__(self, trace: ForwardTrace) -> None:
        self.runs = trace.calls
        self.products: dict[str, list[Contraction]] = {}
        self.functions: dict[str, dict[str, None]] = {}
        for operation in trace.operations:
            self.functions.setdefault(operation.module, {})[operation.function] = None
        self._readers: dict[int, set[str]] = {}  # of each memory
        for call in trace.contractions:
            self.products.setdefault(call.module, []).append(call)
            for storage in call.storages:
                self._readers.setdefault(storage, set()).add(call.module)

    def readers_of(self, memory: Iterable[int]) -> set[str]:
        """Modules whose products read one of some tensors, by the addresses of their memory."""
        return {module for address in memory for module in self._readers.get(address, ())}


class _DefaultRules:
    """The rules that leave a mapped module in float; `include` overrides them.

    Args:
        model: The model that is planned.
        trace: One forward of it, if there was one; without, only shapes speak.
    """

    def __init__(self, model: nn.Module, trace: ForwardTrace | None) -> None:
        convolutions = (
            name for name, module in model.named_modules() if isinstance(module, _ConvNd)
        )
        self._first = next(convolutions, None)
        self._writes_output: set[str] = set()
        self._modules = dict(model.named_modules())
        self._weights = {
            parameter.untyped_storage().data_ptr() for parameter in _initialized(model)
        }
        self._flow = None if trace is None else Dataflow(trace)
        self._made: dict[str, list[int]] = {}  # module -> tensors that its functions make
        if self._flow is not None:
            for operation in self._flow.operations:
                self._made.setdefault(operation.module, []).extend(operation.outputs)
            self._writes_output = {
                operation.module for operation in self._flow.output_convolutions()
            }
            self._first = next(
                (op.module for op in self._flow.operations if op.function in CONVOLUTIONS),
                self._first,
            )

    def describe_calls(self, module: nn.Module, calls: list[Contraction]) -> tuple[str, str]:
        """Action and reason for a module whose forward multiplies matrices itself."""
        if all(
            call.function in MATRIX_PRODUCTS | ATTENTION and not call.storages & self._weights
            for call in calls
        ):
            return (
                "float",
                "product of two activations: int8 Q/DQ would break the fused attention kernel (R-MHA-2)",
            )
        functions = ", ".join(sorted({call.function for call in calls}))
        is_reached = any(call.function in WEIGHTED | MATRIX_PRODUCTS for call in calls)
        hint = "see rewire_operations" if is_reached else "rewire_operations does not reach it"
        return "missed", f"{type(module).__name__}.forward calls {functions} directly; {hint}"

    def reason_against(self, name: str, module: nn.Module) -> str:
        """Why a module stays in float, "" if it does not."""
        if isinstance(module, _ConvTransposeNd):
            return "transposed convolution: int8 kernels are missing, wrong or slow (R-CT-3)"
        if name in self._writes_output:
            return "last convolution: it writes an output of the network (R-OUT)"
        if isinstance(module, _ConvNd):
            return reason_against_convolution(
                module.weight.shape, module.groups, name == self._first
            )
        if isinstance(module, Linear):
            return reason_against_linear(module.weight.shape)
        if isinstance(module, nn.MultiheadAttention):
            return reason_against_linear((module.embed_dim, min(module.kdim, module.vdim)))
        if isinstance(module, _AdaptiveAvgPoolNd) and set(_as_tuple(module.output_size)) == {1}:
            return "global average pooling: a tiny tensor that stays float (R-GAP)"
        if isinstance(module, _AvgPoolNd | _AdaptiveAvgPoolNd) and not self._feeds_product(name):
            return "average pooling that no int8 layer reads (R-AP)"
        return ""

    def _feeds_product(self, name: str) -> bool:
        """Whether a product that no rule leaves in float reads what a module makes; so it seems without a trace."""
        if self._flow is None:
            return True
        made = self._made.get(name, [])
        readers = {
            reader.module
            for value in made
            for reader in self._flow.readers_behind(value)
            if _multiplies(reader)
        }
        return any(not self.reason_against(reader, self._modules[reader]) for reader in readers)


def _multiplies(operation: Operation) -> bool:
    return operation.function in CONVOLUTIONS | LINEAR


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,)


def _unplanned_calls(
    usage: _Usage | None, model: nn.Module, rules: _DefaultRules, planned: set[str]
) -> list[PlannedModule]:
    """Modules without parameters of their own whose forward multiplies matrices."""
    if usage is None:
        return []
    modules = dict(model.named_modules())
    return [
        PlannedModule(
            name,
            type(modules[name]).__name__,
            *rules.describe_calls(modules[name], calls),
            0,
            mapped=False,
        )
        for name, calls in usage.products.items()
        if name not in planned
    ]
