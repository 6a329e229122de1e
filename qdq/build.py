"""From an ONNX file with Q/DQ to an engine, and to the proof of which layers run in int8."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qdq.check.facts import FileFacts
from qdq.check.inspection import inspect_file
from qdq.check.load import load_onnx
from qdq.check.rules import choose_rules, find_violations
from qdq.errors import ArgumentError, BuildError, CheckError, DependencyError
from qdq.files import as_path, guard_files, write_atomic
from qdq.graph.coverage import Coverage, list_weighted_nodes, measure_coverage
from qdq.graph.tensors import list_data_files
from qdq.graph.validate import CheckerVerdict
from qdq.trt.backend import Backend, find_backend
from qdq.trt.builder import build_plan
from qdq.trt.census import LayerCensus, take_census
from qdq.trt.profiles import Profile, Shape, solve_profiles
from qdq.trt.trtexec import trtexec_lines

ENGINE_SUFFIXES = {"rtx": ".rtx.engine", "tensorrt": ".engine"}
"""What takes the place of `.onnx` in the name of the engine, for each backend."""

# Rules that no file breaks which TensorRT builds. What else onnx's checker refuses, TensorRT may well read.
_FATAL_RULES = ("QDQ205", "QDQ208")
# Operators that TensorRT folds between a constant and the scale of a Q/DQ; on ReduceMax, for one, it crashes.
_FOLDED_INTO_SCALE = frozenset({"Cast", "Identity", "Mul", "Reshape"})


@dataclass(frozen=True)
class BuildReport:
    """What was built, and which layers run in int8.

    Args:
        onnx: The ONNX file.
        engine: The engine file.
        engine_bytes: Its size in bytes.
        backend: `rtx` or `tensorrt`.
        backend_version: Version of that package.
        sm: Compute capability built for, 89 for 8.9; None: the GPU of this machine.
        seconds: Time of parsing and building.
        profiles: Dynamic input -> `min`, `opt` and `max` shape.
        layers: Every convolution and matrix product of the graph, in its order.
        coverage: What was to be expected of them before the build.
        trtexec: Command for the target by version, `tensorrt10` and `tensorrt11`.
        warnings: What onnx's checker refuses and TensorRT does not; messages of the builder of severity WARNING and
            above, each once.
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
    def int8_share(self) -> float | None:
        """Part of the known MACs that runs in int8, 0..1; None where no size is known."""
        running = {layer.node for layer in self.layers if layer.int8}
        macs = sum(layer.macs or 0 for layer in self.coverage.layers if layer.name in running)
        return macs / self.coverage.macs if self.coverage.macs else None

    def format_table(self) -> str:
        """One line for each layer that is not in int8 as expected, with the reason, then the summary."""
        rows = [
            (layer.module or layer.node, layer.op_type, _verdict(layer), layer.reason)
            for layer in self.layers
            if layer.reason
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]
            )
            for row in rows
        ]
        reached = self.expected_int8 - len(self.missing_int8)
        summary = f"int8: {reached} of {self.expected_int8} expected"
        if extra := self.int8 - reached:
            summary += f", and {extra} more"
        if not self.expected_int8:
            summary += ": nothing in the file is quantized"
        target = "this GPU" if self.sm is None else f"SM {self.sm}"
        lines += [f"warning: {text}" for text in self.warnings]
        lines.append(
            f"{self.engine}: {self.engine_bytes / 1e6:.1f} MB, {self.backend} {self.backend_version}, "
            f"{target}, {self.seconds:.1f} s"
        )
        if self.int8_share is not None and self.coverage.int8_share is not None:
            lines.append(
                f"{self.int8_share:.1%} of all MACs in int8, {self.coverage.int8_share:.1%} were predicted"
            )
        return "\n".join([*lines, summary])


def _verdict(layer: LayerCensus) -> str:
    if layer.int8:
        return "int8"
    return "NOT INT8" if layer.expected_int8 else "float"


def build_engine(
    onnx_path: Path | str,
    output: Path | str | None = None,
    *,
    backend: str = "auto",
    sm: int = 89,
    min_shapes: Mapping[str, Shape] | None = None,
    opt_shapes: Mapping[str, Shape] | None = None,
    max_shapes: Mapping[str, Shape] | None = None,
) -> BuildReport:
    """Build a TensorRT engine and read from the builder which layers run in int8.

    The file is checked first. The build runs in a process of its own: a crash is a `BuildError`, Ctrl-C ends it.

    Args:
        onnx_path: The ONNX file with Q/DQ.
        output: The engine file; beside the ONNX file when not given, ending in `.rtx.engine` or `.engine`.
        backend: `rtx` (TensorRT-RTX, needs no GPU), `tensorrt` (needs one), or `auto`: the latter if usable.
        sm: Compute capability that TensorRT-RTX builds for, 89 for 8.9; TensorRT builds for the GPU at hand.
        min_shapes: Input name -> smallest shape, for inputs with dynamic dimensions.
        opt_shapes: Likewise the usual shape.
        max_shapes: Likewise the largest. Where only the batch is dynamic and nothing is given: 1, 8 and 16.

    Returns:
        The report; `missing_int8` is empty when every quantized layer runs in int8.

    Raises:
        ArgumentError: No such file, or shapes, backend or compute capability that cannot be meant.
        BuildError: Not an ONNX file, a damaged one, a computed scale (R-DYN), or TensorRT refuses the graph or crashes.
        DependencyError: No TensorRT is installed, or it cannot build here.
    """
    onnx_path = as_path(onnx_path, "onnx_path")
    model, facts = _load(onnx_path)
    _refuse_computed_scales(model)
    given = {"min": min_shapes or {}, "opt": opt_shapes or {}, "max": max_shapes or {}}
    profiles = solve_profiles(_read_inputs(model), given)
    # .plan: never the file written here, and no two versions can read one another's anyway
    lines = trtexec_lines(
        onnx_path, onnx_path.with_suffix(".plan"), profiles, half=_has_float16(model)
    )
    chosen_backend = _find_backend(backend, lines)
    engine = _engine_path(onnx_path, output, chosen_backend.name)
    target = sm if chosen_backend.name == "rtx" else None

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
        layers=take_census(list_weighted_nodes(model), plan.kernels),
        coverage=measure_coverage(model, **facts.inference),
        trtexec=lines,
        warnings=[*refusal, *plan.warnings],
    )


def _find_backend(name: str, lines: Mapping[str, str]) -> Backend:
    """Find the backend; where there is none, the error still carries the way to build on the target."""
    try:
        return find_backend(name)
    except DependencyError as error:
        raise DependencyError(
            error.message,
            f"{error.fix}; or build on the target, with TensorRT 10: {lines['tensorrt10']} -- with "
            f"TensorRT 11: {lines['tensorrt11']}",
        ) from error


def _load(path: Path) -> tuple[ir.Model, FileFacts]:
    """Read an ONNX file, refuse a damaged one, and name nameless nodes as TensorRT's parser will."""
    if not path.is_file():
        message = f"there is no file {path}" + (": it is a folder" if path.is_dir() else "")
        raise ArgumentError(
            f"{message}.", "give an ONNX file, such as the model.onnx that `qdq ptq` writes."
        )
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
    for node in loaded.model.graph:
        if not node.name and node.outputs:
            node.name = f"node_of_{node.outputs[0].name}"
    return loaded.model, facts


def _refuse_without_verdict(path: Path, checker: CheckerVerdict) -> None:
    """Refuse what ends onnx's checker or keeps it busy: TensorRT has no limit, and it may take all memory."""
    if checker.may_ask_again:
        return
    reason = checker.limit or checker.structure
    raise BuildError(
        f"{path} cannot be built: onnx's checker crashed on it or did not come to an end: {reason}.",
        f"run `qdq check {path}` and mend what it names; if it names nothing, write the nodes of functions into the "
        "graph, or build parts of the model to find the node.",
    )


def _describe_refusal(checker: CheckerVerdict) -> list[str]:
    """What onnx's checker refuses, none if nothing."""
    refusal = checker.structure or checker.types
    return [f"onnx {checker.version} refuses the file: {refusal}."] if refusal else []


def _read_inputs(model: ir.Model) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the true inputs, None for a dynamic dimension; initializers are no inputs."""
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
        inputs[name] = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
    return inputs


def _refuse_computed_scales(model: ir.Model) -> None:
    """R-DYN, L09: the builder of TensorRT-RTX crashes the process on a scale that is not a constant."""
    for node in model.graph.all_nodes():
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 2:
            continue
        if not _is_constant(node.inputs[1]):
            raise BuildError(
                f"the scale of {node.op_type} '{node.name}' is computed in the graph; TensorRT needs a "
                "constant (R-DYN).",
                "calibrate the model and export it with fixed ranges; dynamic quantization cannot be built.",
            )


def _is_constant(value: ir.Value | None) -> bool:
    """An initializer or Constant, perhaps behind operators that TensorRT folds."""
    visited: set[ir.Node] = set()
    values = [value]
    while values:
        operand = values.pop()
        if operand is not None and operand.is_initializer():
            continue
        node = operand.producer() if operand is not None else None
        if node is None or node.op_type not in (*_FOLDED_INTO_SCALE, "Constant"):
            return False
        if node not in visited:
            visited.add(node)
            values += node.inputs
    return True


def _has_float16(model: ir.Model) -> bool:
    values = [
        *model.graph.initializers.values(),
        *(value for node in model.graph for value in node.outputs),
    ]
    return any(value.dtype == ir.DataType.FLOAT16 for value in values)


def _engine_path(onnx_path: Path, output: Path | str | None, backend: str) -> Path:
    path = onnx_path.with_suffix(ENGINE_SUFFIXES[backend]) if output is None else Path(output)
    guard_files(inputs=[onnx_path, *list_data_files(onnx_path)], outputs=[path])
    return path
