"""What onnx's checker, its shape inference and ONNX Runtime say of a file.

All three are native code, and a damaged file can crash them or keep them busy for ever. They run in a helper process
that is started at the first call, answers until this process ends, and is started again when a file has ended it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qdq.child import Child, ChildCrashError
from qdq.errors import is_out_of_memory

if TYPE_CHECKING:
    import onnx

_CPU_SECONDS = 60
_WAIT_SECONDS = 600.0  # only for what waits and does not compute, however busy the machine is
_INFERENCE_BYTES = 2**30
_LARGEST_CONSTANT = 1024  # bytes; larger ones are no shapes, which alone inference reads
_LARGEST_NESTED = 2**26  # bytes of a constant in a body that may be replaced by zeros
UNKNOWN_DOMAIN = "qdq.unknown"
"""Where operators that onnx does not know are put, so that its checker looks at the rest."""

RefusalKind = Literal["invalid", "limit"]


@dataclass(frozen=True)
class CheckerVerdict:
    """What onnx says.

    Args:
        version: Of onnx.
        structure: What `onnx.checker` refuses, None if nothing.
        types: What shape and type inference refuses, None if nothing.
        has_crashed: onnx ended the process.
        limit: Why onnx came to no verdict, such as "it took longer than 60 s of processor time"; None if it did.
        can_propagate: Whether inference may also follow the values of shape computations; they can grow without end.
    """

    version: str
    structure: str | None
    types: str | None
    has_crashed: bool = False
    limit: str | None = None
    can_propagate: bool = True

    @property
    def may_ask_again(self) -> bool:
        """Whether onnx comes to an end on this file, so that it may be called on it in this process."""
        return not self.has_crashed and self.limit is None


@dataclass(frozen=True)
class RuntimeVerdict:
    """What ONNX Runtime says.

    Args:
        version: Of ONNX Runtime.
        refusal: Why it does not load the file, None if it does.
        kind: "invalid" if the file is at fault, "limit" if ONNX Runtime lacks an operator or version or took too long;
            None if loaded.
        unknown_operators: Those of the operators asked for that it does not have, as `DOMAIN::OPERATOR`.
    """

    version: str
    refusal: str | None
    kind: RefusalKind | None
    unknown_operators: tuple[str, ...]


class _Helper:
    """The process that answers, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None
        atexit.register(self._close)
        if hasattr(os, "register_at_fork"):  # a fork may not talk to the helper of its parent
            os.register_at_fork(after_in_child=self._forget)

    def start(self) -> Child:
        with self._lock:
            return self._start()

    def ask(self, request: dict[str, Any], blob: bytes = b"") -> dict[str, Any]:
        with self._lock:
            answer, _ = self._start().call(
                request, blob, seconds=_WAIT_SECONDS, cpu_seconds=_CPU_SECONDS
            )
        return dict(answer)

    def _start(self) -> Child:
        if self._child is None or not self._child.is_running:
            self._close()
            self._child = Child("qdq.graph.validate:answer")
        return self._child

    def _close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child = None

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._child = None


_helper = _Helper()


def start_helper() -> None:
    """Start the helper process now, so that it loads its libraries while this process loads others."""
    _helper.start()


def check_model(proto: onnx.ModelProto, unknown: Iterable[tuple[str, str]]) -> CheckerVerdict:
    """Have onnx check a model, but for its large constants.

    What TensorRT reads and onnx's checker does not is put right in the copy that is checked: a graph without name, a
    newer IR version, inputs and outputs without shape, operators that onnx does not know.

    Args:
        proto: The model; it stays as it is.
        unknown: Domain and type of the operators that onnx does not know.
    """
    try:
        answer = _helper.ask({"do": "check"}, _outline(proto, set(unknown)).SerializeToString())
    except ChildCrashError as died:
        import onnx

        if died.is_timeout:
            return skip_checker(died.reason)
        return CheckerVerdict(
            onnx.__version__, f"onnx crashes on it: {died.reason}", None, has_crashed=True
        )
    return CheckerVerdict(**answer)


def load_in_runtime(path: Path, operators: Iterable[tuple[str, str]] = ()) -> RuntimeVerdict:
    """Have ONNX Runtime load a file, as its users do.

    Args:
        path: The file.
        operators: Domain and type of operators of which it shall say whether it has them.
    """
    path = Path(os.path.abspath(path))  # the helper has its own current folder
    request = {"do": "load", "path": str(path), "operators": sorted(set(operators))}
    try:
        answer = _helper.ask(request)
    except ChildCrashError as died:
        import onnxruntime

        if died.is_timeout:
            return skip_runtime(died.reason)
        return RuntimeVerdict(
            onnxruntime.__version__, f"it crashes on it: {died.reason}", "invalid", ()
        )
    return RuntimeVerdict(
        answer["version"], answer["refusal"], answer["kind"], tuple(answer["unknown_operators"])
    )


def skip_checker(reason: str) -> CheckerVerdict:
    """The verdict of a checker that came to none."""
    import onnx

    return CheckerVerdict(onnx.__version__, None, None, limit=reason)


def skip_runtime(reason: str) -> RuntimeVerdict:
    """The verdict of an ONNX Runtime that came to none."""
    import onnxruntime

    return RuntimeVerdict(onnxruntime.__version__, reason, "limit", ())


# --- what is sent ---------------------------------------------------------------------------------------------------


def _outline(proto: onnx.ModelProto, unknown: set[tuple[str, str]]) -> onnx.ModelProto:
    """A copy without large constants, in which only what is wrong for TensorRT too is wrong for onnx."""
    import onnx

    outline = onnx.ModelProto()
    outline.ir_version = min(proto.ir_version or onnx.IR_VERSION, onnx.IR_VERSION)
    outline.opset_import.extend(proto.opset_import)
    outline.functions.extend(proto.functions)
    graph = outline.graph
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(graph, field).extend(getattr(proto.graph, field))
    graph.name = proto.graph.name
    declared = {value.name for value in graph.input}
    for tensor in proto.graph.initializer:
        if (
            tensor.data_location != onnx.TensorProto.EXTERNAL
            and tensor.ByteSize() <= _LARGEST_CONSTANT
        ):
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    for nested in iterate_graphs(graph):
        nested.name = nested.name or "graph"
        for tensor in [
            *nested.initializer,
            *(a.t for node in nested.node for a in node.attribute if a.HasField("t")),
        ]:
            _fill_external(tensor)
    _import_domains(outline, unknown)
    return outline


def iterate_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies of its nodes, at any depth."""
    graphs = [graph]
    while graphs:
        current = graphs.pop()
        yield current
        for node in current.node:
            for attribute in node.attribute:
                graphs.extend(attribute.graphs)
                if attribute.HasField("g"):
                    graphs.append(attribute.g)


def iterate_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a model, of its bodies and of its functions."""
    for graph in iterate_graphs(proto.graph):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _fill_external(tensor: onnx.TensorProto) -> None:
    """Zeros instead of data in another file: onnx would look for it in the current folder."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    try:
        size = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError, ValueError):  # no such type
        return
    for length in tensor.dims:
        size *= length
    if 0 <= size <= _LARGEST_NESTED:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = bytes(size)


def _import_domains(outline: onnx.ModelProto, unknown: set[tuple[str, str]]) -> None:
    used = set()
    for node in iterate_nodes(outline):
        if (node.domain, node.op_type) in unknown:
            node.domain = node.domain or UNKNOWN_DOMAIN
            used.add(node.domain)
    for importing in (outline, *outline.functions):
        imported = {opset.domain for opset in importing.opset_import}
        for domain in sorted(used - imported):
            importing.opset_import.add(domain=domain, version=1)


# --- the helper's side ----------------------------------------------------------------------------------------------


def answer(request: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Do one of the checks; any exception of the libraries becomes text."""
    return (_answer_check(blob) if request["do"] == "check" else _answer_load(request)), b""


def _answer_check(blob: bytes) -> dict[str, Any]:
    import onnx

    proto = onnx.load_model_from_string(blob)
    can_propagate, types = True, None
    try:
        with _limited_memory():
            onnx.shape_inference.infer_shapes(
                proto, check_type=True, strict_mode=True, data_prop=True
            )
    except MemoryError:
        can_propagate = False
        types = _infer_without_values(proto)
    except Exception as error:  # onnx and protobuf each have their own
        types = first_line(error)
    _fill_types(proto)
    structure = None
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        structure = first_line(error)
    return {
        "version": onnx.__version__,
        "structure": structure,
        "types": types,
        "can_propagate": can_propagate,
    }


def _infer_without_values(proto: onnx.ModelProto) -> str | None:
    import onnx

    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except Exception as error:
        return first_line(error)
    return None


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Inference of a sound file needs little; where constants double at every node it would take all there is."""
    if sys.platform == "win32":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limit = pages * resource.getpagesize() + _INFERENCE_BYTES
    if pages and (hard == resource.RLIM_INFINITY or limit < hard):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _fill_types(proto: onnx.ModelProto) -> None:
    """A type for every input and output of a graph that has none or lacks its shape, so that the checker goes on."""
    import onnx

    for graph in iterate_graphs(proto.graph):
        for value in (*graph.input, *graph.output):
            if not value.HasField("type"):
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
                value.type.tensor_type.shape.SetInParent()


def _answer_load(request: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime

    refusal, kind = _load(request["path"])
    # private, but the only list of them; without it every operator counts as one that it has
    schemas: Any = getattr(
        onnxruntime.capi.onnxruntime_pybind11_state, "get_all_operator_schema", None
    )
    available = None if schemas is None else {(schema.domain, schema.name) for schema in schemas()}
    missing = [
        f"{domain}::{name}"
        for domain, name in request["operators"]
        if available and (domain, name) not in available
    ]
    return {
        "version": onnxruntime.__version__,
        "refusal": refusal,
        "kind": kind,
        "unknown_operators": missing,
    }


def _load(path: str) -> tuple[str | None, RefusalKind | None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry(
        "session.disable_prepacking", "1"
    )  # copies of the weights that nobody runs
    try:
        # without folding, which computes whatever is constant, however large it gets
        onnxruntime.InferenceSession(
            path,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],
        )
    except Exception as error:  # its own types share no base
        message = (
            first_line(error)
            if isinstance(error, UnicodeDecodeError)
            else " ".join(str(error).split())
        )
        is_limit = is_out_of_memory(error) or _LIMITS.search(message) is not None
        return clean_runtime_message(message), "limit" if is_limit else "invalid"
    return None, None


# What ONNX Runtime says where it is the one that lacks something.
_LIMITS = re.compile(
    r"NOT_IMPLEMENTED|is not a registered function/op|No Op registered for|No opset import for domain"
    r"|Unsupported model IR version|Current official support for domain|Failed to construct locale"
)
_RUNTIME_PREFIX = re.compile(
    r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )?(Load model from .*? failed: ?)?"
)
_RUNTIME_SOURCE = re.compile(r"/\S+\.(?:cc|h):\d+ (?:.*?\)(?: const)? (?=[A-Za-z\"'(]))?")


def clean_runtime_message(message: str) -> str:
    """The message of an exception of ONNX Runtime without its codes, the path and places in its source."""
    return (
        _RUNTIME_SOURCE.sub("", _RUNTIME_PREFIX.sub("", message)).strip().rstrip(".")
        or "no reason given"
    )


def first_line(error: Exception) -> str:
    """The first line of an error that has any."""
    if isinstance(error, UnicodeDecodeError):
        return "a text in it is not UTF-8"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
