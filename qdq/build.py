"""Build an engine from an ONNX file with Q/DQ, and report the type in which each layer runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qdq.check.facts import FileFacts
from qdq.check.inspection import inspect_file
from qdq.check.load import load_onnx
from qdq.check.rules import GraphView, choose_rules, find_violations
from qdq.check.rules.attention import list_attention
from qdq.check.rules.view import name_of
from qdq.errors import ArgumentError, BuildError, CheckError, DependencyError
from qdq.files import as_path, guard_files, write_atomic
from qdq.graph.code_types import find_code_type, is_trt_quantizer, list_lacking
from qdq.graph.coverage import Coverage, list_work_nodes, measure_coverage
from qdq.graph.names import name_unnamed
from qdq.graph.pairs import QDQ_OPS, is_op, producer_of
from qdq.graph.shapes import complete_shapes
from qdq.graph.tensors import list_data_files
from qdq.graph.validate import CheckerVerdict
from qdq.product_types import LOW_TYPES, list_low_types, word_of
from qdq.trt.backend import DEFAULT_SM, Backend, find_backend
from qdq.trt.builder import build_plan
from qdq.trt.census import LayerCensus, take_census
from qdq.trt.kernels import Kernel
from qdq.trt.profiles import Profile, Shape, choose_profiles
from qdq.trt.trtexec import trtexec_lines

ENGINE_SUFFIXES = {"rtx": ".rtx.engine", "tensorrt": ".engine"}
"""Suffix of the engine file for each backend."""

# TensorRT builds no file that breaks one of these rules. It may accept other files that onnx's checker refuses.
_FATAL_RULES = ("QDQ205", "QDQ208")
# Rules whose findings name a Softmax with the reason why its attention is split.
_ATTENTION_RULES = ("QDQ118", "QDQ136")
_FEWEST_KEYS = 32  # 31 are two products in TensorRT-RTX 1.7.1, 32 are one kernel, on SM 89
_UNKNOWN_SPLIT = "no rule knows why; TensorRT fuses attention in half precision only."
# Constant, and the operators that TensorRT folds between a constant and the scale of a Q/DQ. It crashes on others, for
# example on ReduceMax.
_FOLDED_INTO_SCALE = frozenset(
    {"Cast", "Constant", "DequantizeLinear", "Identity", "Mul", "Reshape"}
)


@dataclass(frozen=True)
class TypeCensus:
    """The layers of one type, such as "FP8".

    Args:
        expected: Number of layers with Q/DQ of the type on both operands; for stored weights, on the weight.
        missing: Modules of those that the engine runs in another type.
        macs: Fraction of the known MACs that runs in the type, 0 to 1; None if no size is known.
    """

    expected: int
    missing: list[str]
    macs: float | None


@dataclass(frozen=True)
class AttentionCensus:
    """An attention of the graph: two products around a softmax.

    Args:
        softmax: Name of the Softmax node.
        is_fused: Whether one kernel computes both products.
        reason: Why not; empty if one does.
    """

    softmax: str
    is_fused: bool
    reason: str


@dataclass(frozen=True)
class BuildReport:
    """Result of `build_engine`: the engine, and the type in which each layer runs.

    Args:
        onnx: The ONNX file.
        engine: The engine file.
        engine_bytes: Its size in bytes.
        backend: `rtx` or `tensorrt`.
        backend_version: Version of that package.
        sm: Compute capability of the target, 89 for 8.9; None for the GPU of this machine.
        seconds: Time of parsing and building.
        profiles: Dynamic input -> `min`, `opt` and `max` shape.
        layers: Every convolution and matrix product, in the order of the graph.
        coverage: The expectation for each of them before the build.
        attention: Every attention that is written as MatMul, Softmax and MatMul.
        trtexec: Command for the target by version, `tensorrt8.6`, `tensorrt10` and `tensorrt11` (see `trtexec_lines`).
        warnings: The reason why onnx's checker refuses a file that TensorRT builds; each builder message of severity
            WARNING or above, once.
    """

    onnx: Path
    engine: Path
    engine_bytes: int
    backend: str
    backend_version: str
    sm: int | None
    seconds: float
    profiles: dict[str, Profile]
    layers: list[LayerCensus]
    coverage: Coverage
    attention: list[AttentionCensus]
    trtexec: dict[str, str]
    warnings: list[str]

    @property
    def expected_int8(self) -> int:
        """Number of layers with Q/DQ on both operands."""
        return sum(layer.expected_int8 for layer in self.layers)

    @property
    def int8(self) -> int:
        """Number of layers that run in int8, expected or not."""
        return sum(layer.int8 for layer in self.layers)

    @property
    def missing_int8(self) -> list[LayerCensus]:
        """Layers that were quantized but do not run in int8."""
        return [layer for layer in self.layers if layer.expected_int8 and not layer.int8]

    @property
    def missing(self) -> list[LayerCensus]:
        """Layers that were quantized, to int8, FP8 or FP4, but do not run in that type."""
        return [layer for layer in self.layers if layer.is_missing]

    @property
    def int8_share(self) -> float | None:
        """Fraction of the known MACs that runs in int8, 0 to 1; None if no size is known."""
        return self.share_of("Int8")

    def share_of(self, type_name: str) -> float | None:
        """Fraction of the known MACs that runs in a type.

        Args:
            type_name: TensorRT's name, such as "FP8".

        Returns:
            0 to 1; None if no size is known.
        """
        if not self.coverage.macs:
            return None
        nodes = {layer.node for layer in self.layers if layer.built == type_name}
        macs = 0
        for layer in self.coverage.layers:
            if layer.name in nodes:
                macs += layer.macs or 0
        return macs / self.coverage.macs

    @property
    def low_types(self) -> list[str]:
        """The types below 16 bit that layers should run in, or do; int8 if there are none."""
        promised = [layer.promised for layer in self.layers]
        built = [layer.built for layer in self.layers]
        return list_low_types([*promised, *built])

    def count_types(self) -> dict[str, TypeCensus]:
        """The layers of each type below 16 bit, by TensorRT's names; int8 if there are none."""
        census = {}
        for type_name in self.low_types:
            expected = [layer for layer in self.layers if layer.promised == type_name]
            missing = [layer.module for layer in expected if layer.built != type_name]
            census[type_name] = TypeCensus(len(expected), missing, self.share_of(type_name))
        return census

    def format_table(self) -> str:
        """One line for each layer that is not in int8, FP8 or FP4 as expected, with the reason, then the summary."""
        lines = self._format_layers()
        for text in self.warnings:
            lines.append(f"warning: {text}")
        target = "this GPU" if self.sm is None else f"SM {self.sm}"
        lines.append(
            f"{self.engine}: {self.engine_bytes / 1e6:.1f} MB, {self.backend} {self.backend_version}, "
            f"{target}, {self.seconds:.1f} s"
        )
        lines += map(self._describe_share, self.low_types if self.coverage.macs else ())
        if self.coverage.macs and self.coverage.num_unknown:
            lines[-1] += f" ({self.coverage.num_unknown} nodes of unknown work not counted)"
        if "FP8" in self.low_types:
            lines += self._format_attention()
        lines += map(self._summarize, self.low_types)
        return "\n".join(lines)

    def _format_attention(self) -> Iterator[str]:
        """One line for each attention in several kernels, with the reason, then how many are in one."""
        for attention in self.attention:
            if not attention.is_fused:
                yield f"{attention.softmax}: attention in several kernels: {attention.reason}"
        if self.attention:
            fused = [attention for attention in self.attention if attention.is_fused]
            yield f"attention: {len(fused)} of {len(self.attention)} in one kernel"

    def _describe_share(self, type_name: str) -> str:
        """The fraction of the MACs in a type, built and predicted."""
        built, predicted = self.share_of(type_name), self.coverage.share_of(type_name)
        return f"{built:.1%} of all MACs in {word_of(type_name)}, {predicted:.1%} were predicted"

    def _format_layers(self) -> list[str]:
        """The layers that have a reason, in columns."""
        layers = [layer for layer in self.layers if layer.reason]
        names = [layer.module or layer.node for layer in layers]
        verdicts = list(map(_verdict, layers))
        operators = [layer.op_type for layer in layers]
        name_width = max(map(len, names), default=0)
        operator_width = max(map(len, operators), default=0)
        verdict_width = max(map(len, verdicts), default=0)

        lines = []
        for name, verdict, layer in zip(names, verdicts, layers, strict=True):
            lines.append(
                f"{name:{name_width}}  {layer.op_type:{operator_width}}  {verdict:{verdict_width}}  {layer.reason}"
            )
        return lines

    def _summarize(self, type_name: str) -> str:
        """The last line, one for each type: how many layers run in it."""
        expected = [layer for layer in self.layers if layer.promised == type_name]
        reached = [layer for layer in expected if layer.built == type_name]
        built = [layer for layer in self.layers if layer.built == type_name]
        summary = f"{word_of(type_name)}: {len(reached)} of {len(expected)} expected"
        unexpected = len(built) - len(reached)
        if unexpected:
            summary += f", and {unexpected} more"
        if not expected:
            summary += ": nothing in the file is quantized"
        return summary


def _verdict(layer: LayerCensus) -> str:
    if layer.built in LOW_TYPES:
        return word_of(layer.built)
    if layer.is_missing:
        return f"NOT {word_of(layer.promised).upper()}"
    return "float"


def build_engine(
    onnx_path: Path | str,
    output: Path | str | None = None,
    *,
    backend: str = "auto",
    sm: int = DEFAULT_SM,
    min_shapes: Mapping[str, Shape] | None = None,
    opt_shapes: Mapping[str, Shape] | None = None,
    max_shapes: Mapping[str, Shape] | None = None,
) -> BuildReport:
    """Build a TensorRT engine and read from the builder the type in which each layer runs.

    The file is checked first. The build runs in a separate process: a crash is a `BuildError`, Ctrl-C ends it.

    Args:
        onnx_path: The ONNX file with Q/DQ.
        output: The engine file. By default it is beside the ONNX file and ends in `.rtx.engine` or `.engine`.
        backend: `rtx` (TensorRT-RTX, needs no GPU), `tensorrt` (needs one), or `auto`: the latter if usable.
        sm: Compute capability that TensorRT-RTX builds for, 89 for 8.9; TensorRT builds for the GPU of this machine.
        min_shapes: Input name -> smallest shape, for inputs with dynamic dimensions.
        opt_shapes: Likewise the usual shape.
        max_shapes: Likewise the largest. By default, if only the batch is dynamic, it is 1, 8 and 16.

    Returns:
        The report; `missing` is empty if every quantized layer runs in the type of its Q/DQ.

    Raises:
        ArgumentError: There is no such file; invalid shapes, backend or compute capability.
        BuildError: Not an ONNX file, a damaged one, a computed scale (R-DYN), Q/DQ of a type that the GPU does not have
            (R-SM), or TensorRT refuses the graph or crashes.
        DependencyError: No TensorRT is installed, or it cannot build here.
    """
    onnx_path = as_path(onnx_path, "onnx_path")
    model, facts = _load(onnx_path)
    _refuse_computed_scales(model)
    requests = {"min": min_shapes or {}, "opt": opt_shapes or {}, "max": max_shapes or {}}
    profiles = choose_profiles(_read_inputs(model), requests)
    # The suffix .plan: the command must not overwrite the engine written here, which no other version can read.
    target_engine = onnx_path.with_suffix(".plan")
    commands = trtexec_lines(
        onnx_path,
        target_engine,
        profiles,
        half=_decides_types(model),
        opset=model.opset_imports.get("", 0),
    )
    chosen_backend = _find_backend(backend, commands)
    engine = _choose_engine_path(onnx_path, output, chosen_backend.name)
    target = sm if chosen_backend.name == "rtx" else None
    if target is not None:
        _refuse_lacking_types(onnx_path, model, target)

    start = time.perf_counter()
    refusal = _describe_refusal(facts.checker)
    try:
        plan = build_plan(chosen_backend, onnx_path, profiles, target)
    except BuildError as error:
        raise BuildError(" ".join([error.message, *refusal]), error.fix) from error
    seconds = time.perf_counter() - start
    write_atomic(engine, plan.engine)
    return BuildReport(
        onnx=onnx_path,
        engine=engine,
        engine_bytes=len(plan.engine),
        backend=chosen_backend.name,
        backend_version=chosen_backend.version,
        sm=target,
        seconds=seconds,
        profiles=profiles,
        layers=take_census(list_work_nodes(model), plan.kernels),
        coverage=measure_coverage(model, **facts.inference),
        attention=_find_attention(model, plan.kernels, facts),
        trtexec=commands,
        warnings=[*refusal, *plan.warnings],
    )


def _find_backend(name: str, commands: Mapping[str, str]) -> Backend:
    """Find the backend; if there is none, the error says how to build on the target."""
    try:
        return find_backend(name)
    except DependencyError as error:
        raise DependencyError(
            error.message,
            f"{error.fix}; or build on the target, with TensorRT 10: {commands['tensorrt10']} -- with "
            f"TensorRT 11: {commands['tensorrt11']}",
        ) from error


def _load(path: Path) -> tuple[ir.Model, FileFacts]:
    """Read an ONNX file, refuse a damaged one, and give unnamed nodes the names that TensorRT's parser gives them."""
    _require_file(path)
    try:
        loaded = load_onnx(path)
    except CheckError as error:
        raise BuildError(error.message, error.fix) from error
    facts = inspect_file(loaded, ask_runtime=False)
    for finding in find_violations(loaded.model, choose_rules(_FATAL_RULES), facts):
        raise BuildError(
            f"{path} cannot be built ({finding.rule}): {finding.node}: {finding.message}.",
            finding.fix,
        )
    _refuse_without_verdict(path, facts.checker)
    name_unnamed(loaded.model)
    return loaded.model, facts


def _require_file(path: Path) -> None:
    if path.is_file():
        return
    message = f"there is no file {path}"
    if path.is_dir():
        message += ": it is a folder"
    raise ArgumentError(
        f"{message}.", "give an ONNX file, such as the model.onnx that `qdq ptq` writes."
    )


def _refuse_without_verdict(path: Path, checker: CheckerVerdict) -> None:
    """Refuse a file that crashes onnx's checker or keeps it busy.

    TensorRT has no limit: such a file may take all memory.
    """
    if checker.may_ask_again:
        return
    reason = checker.limit or checker.structure
    raise BuildError(
        f"{path} cannot be built: onnx's checker crashed on it or did not finish: {reason}.",
        f"run `qdq check {path}` and fix the nodes that it names; if it names none, write the nodes of functions into "
        "the graph, or build parts of the model to find the node.",
    )


def _describe_refusal(checker: CheckerVerdict) -> list[str]:
    """The reason why onnx's checker refuses the file; an empty list if it does not."""
    refusal = checker.structure or checker.types
    if not refusal:
        return []
    return [f"onnx {checker.version} refuses the file: {refusal}."]


def _read_inputs(model: ir.Model) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the inputs without initializers, None for a dynamic dimension."""
    inputs = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name in model.graph.initializers:
            continue
        if value.shape is None:
            raise BuildError(
                f"input {name} has no shape, not even a number of dimensions.",
                "export the model again with an example input.",
            )
        inputs[name] = tuple(size if isinstance(size, int) else None for size in value.shape)
    return inputs


def _refuse_computed_scales(model: ir.Model) -> None:
    """Refuse a scale that is not a constant: TensorRT-RTX crashes on it (R-DYN, L09)."""
    for node in model.graph.all_nodes():
        is_quantizer = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if not is_quantizer or len(node.inputs) < 2:
            continue
        if is_trt_quantizer(
            producer_of(node.inputs[0])
        ):  # a dynamic Q, which TensorRT has for blocks
            continue
        if not _is_constant(node.inputs[1]):
            raise BuildError(
                f"the scale of {node.op_type} '{node.name}' is computed in the graph; TensorRT needs a "
                "constant (R-DYN).",
                "calibrate the model and export it with fixed ranges; dynamic quantization cannot be built.",
            )


def _refuse_lacking_types(path: Path, model: ir.Model, sm: int) -> None:
    """Refuse Q/DQ of a type that the GPU does not have (R-SM): TensorRT-RTX does not build such a file.

    Args:
        path: The file, for the message.
        model: Its graph.
        sm: Compute capability of the target, 89 for 8.9.
    """
    lacking = list(list_lacking(model.graph.all_nodes(), sm))
    if not lacking:
        return
    counts = Counter(word for _, word, _ in lacking)
    types = " and ".join(f"{count} Q/DQ of {word}" for word, count in counts.items())
    least_sm = max(least_sm for _, _, least_sm in lacking)
    raise BuildError(
        f"{path} cannot be built for SM {sm}: it has {types}, which need SM {least_sm} or later (R-SM).",
        f"build for SM {least_sm} or later, or leave these layers in int8 or float.",
    )


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer or a Constant, possibly after operators that TensorRT folds."""
    visited: set[ir.Node] = set()
    values = [value]
    while values:
        operand = values.pop()
        if operand is None:
            return False
        if operand.is_initializer():
            continue
        node = operand.producer()
        if node is None or node.op_type not in _FOLDED_INTO_SCALE:
            return False
        if node not in visited:
            visited.add(node)
            values.extend(node.inputs)
    return True


def has_type(model: ir.Model, dtype: ir.DataType) -> bool:
    """Whether a constant or a result of the main graph is of a type."""
    values = list(model.graph.initializers.values())
    for node in model.graph:
        values.extend(node.outputs)
    return any(value.dtype == dtype for value in values)


def _decides_types(model: ir.Model) -> bool:
    """Whether the types of the graph must decide before TensorRT 11 too: float16, or codes other than int8."""
    if has_type(model, ir.DataType.FLOAT16):
        return True
    for node in model.graph.all_nodes():
        if is_trt_quantizer(node):
            return True
        if is_op(node, *QDQ_OPS) and find_code_type(node).name not in ("int8", "uint8"):
            return True
    return False


def _find_attention(
    model: ir.Model, kernels: Sequence[Kernel], facts: FileFacts
) -> list[AttentionCensus]:
    """Whether each attention of a graph is one kernel, and why not."""
    if facts.checker.may_ask_again:
        complete_shapes(model, data_prop=facts.checker.can_propagate)
    reasons = {}
    for finding in find_violations(model, choose_rules(_ATTENTION_RULES)):
        if finding.severity != "info":
            reasons[finding.node] = f"{finding.message} ({finding.rule})."

    census = []
    view = GraphView(model)
    for softmax, *products in list_attention(view):
        names = {str(product.name) for product in products}
        is_fused = any(names.issubset(kernel.onnx_nodes) for kernel in kernels)
        name = name_of(softmax)
        reason = "" if is_fused else reasons.get(name) or _explain_split(view, softmax)
        census.append(AttentionCensus(name, is_fused, reason))
    return census


def _explain_split(view: GraphView, softmax: ir.Node) -> str:
    """Why an attention without a fault is several kernels."""
    *_, num_keys = view.shape(softmax.inputs[0]) or (None,)
    if num_keys is not None and num_keys < _FEWEST_KEYS:
        return f"it has {num_keys} keys; TensorRT-RTX 1.7 fuses attention from {_FEWEST_KEYS} on."
    return _UNKNOWN_SPLIT


def _choose_engine_path(onnx_path: Path, output: Path | str | None, backend: str) -> Path:
    """The path of the engine file; it must not be one of the model's files."""
    default = onnx_path.with_suffix(ENGINE_SUFFIXES[backend])
    path = default if output is None else Path(output)
    guard_files(inputs=[onnx_path, *list_data_files(onnx_path)], outputs=[path])
    return path
