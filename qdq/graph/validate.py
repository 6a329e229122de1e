"""The verdicts of onnx's checker, its shape inference and ONNX Runtime on a file.

All three are native code, and a damaged file can crash them or keep them busy forever. They run in a helper process
that starts at the first call, answers until this process ends, and is restarted after a file has crashed it.
"""

from __future__ import annotations

import atexit
import contextlib
import math
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
_WAIT_SECONDS = 600.0  # for a helper that waits without computing, however busy the machine is
_INFERENCE_BYTES = 2**30
_LARGEST_CONSTANT = 1024  # bytes; inference reads only shapes, which are smaller
_LARGEST_NESTED = 2**26  # bytes of a constant in a body that may be replaced by zeros
UNKNOWN_DOMAIN = "qdq.unknown"
"""The domain for operators that onnx does not know, so that its checker looks at the others."""

RefusalKind = Literal["invalid", "limit"]


@dataclass(frozen=True)
class CheckerVerdict:
    """The verdict of onnx.

    Args:
        version: Version of onnx.
        structure: Why `onnx.checker` refuses the model; None if it does not.
        types: Why shape and type inference refuses it; None if it does not.
        has_crashed: onnx crashed and ended its process.
        limit: Why onnx did not finish, such as "it took longer than 60 s of processor time"; None if it did.
        can_propagate: Whether inference may also follow the values of shape computations; they can grow without limit.
    """

    version: str
    structure: str | None
    types: str | None
    has_crashed: bool = False
    limit: str | None = None
    can_propagate: bool = True

    @property
    def may_ask_again(self) -> bool:
        """Whether onnx finishes on this file, so that this process may call it."""
        return not self.has_crashed and self.limit is None


@dataclass(frozen=True)
class RuntimeVerdict:
    """The verdict of ONNX Runtime.

    Args:
        version: Version of ONNX Runtime.
        refusal: Why it does not load the file; None if it does.
        kind: "invalid" if the file is at fault, "limit" if ONNX Runtime lacks an operator or version or took too long;
            None if loaded.
        unknown_operators: The queried operators that it does not have, as `DOMAIN::OPERATOR`.
    """

    version: str
    refusal: str | None
    kind: RefusalKind | None
    unknown_operators: tuple[str, ...]


class _Helper:
    """The process that runs the checks, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None
        atexit.register(self._close)
        if hasattr(os, "register_at_fork"):  # a fork must not talk to the helper of its parent
            os.register_at_fork(after_in_child=self._forget)

    def start(self) -> None:
        """Start the process if it is not running."""
        with self._lock:
            self._require_child()

    def ask(self, request: dict[str, Any], blob: bytes = b"") -> dict[str, Any]:
        """Send a request to the process and return its answer.

        Args:
            request: The check and its arguments, as JSON.
            blob: Bytes that go with it.

        Raises:
            ChildCrashError: The process crashed, or used up its time.
        """
        with self._lock:
            child = self._require_child()
            reply, _ = child.call(request, blob, seconds=_WAIT_SECONDS, cpu_seconds=_CPU_SECONDS)
        return dict(reply)

    def _require_child(self) -> Child:
        """The process, restarted if a file has crashed it."""
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
    """Start the helper process now, so that it loads its libraries while this process loads its own."""
    _helper.start()


def check_model(proto: onnx.ModelProto, unknown: Iterable[tuple[str, str]]) -> CheckerVerdict:
    """Check a model with onnx, without its large constants.

    TensorRT reads some models that onnx's checker refuses. Their flaws are removed from the copy that is checked: a
    graph without name, a newer IR version, inputs and outputs without shape, operators that onnx does not know.

    Args:
        proto: The model, which is not changed.
        unknown: Domain and type of the operators that onnx does not know.
    """
    outline = _outline(proto, set(unknown))
    try:
        verdict = _helper.ask({"do": "check"}, outline.SerializeToString())
    except ChildCrashError as error:
        return _checker_verdict_of(error)
    return CheckerVerdict(**verdict)


def _checker_verdict_of(error: ChildCrashError) -> CheckerVerdict:
    """The verdict of a checker whose process has ended."""
    import onnx

    if error.is_timeout:
        return skip_checker(error.reason)

    refusal = f"onnx crashes on it: {error.reason}"
    return CheckerVerdict(onnx.__version__, structure=refusal, types=None, has_crashed=True)


def load_in_runtime(path: Path, operators: Iterable[tuple[str, str]] = ()) -> RuntimeVerdict:
    """Load a file in ONNX Runtime, as its users do.

    Args:
        path: The file.
        operators: Domain and type of the operators to look up in ONNX Runtime.
    """
    path = Path(os.path.abspath(path))  # the helper has its own current folder
    request = {"do": "load", "path": str(path), "operators": sorted(set(operators))}
    try:
        verdict = _helper.ask(request)
    except ChildCrashError as error:
        return _runtime_verdict_of(error)

    return RuntimeVerdict(
        version=verdict["version"],
        refusal=verdict["refusal"],
        kind=verdict["kind"],
        unknown_operators=tuple(verdict["unknown_operators"]),
    )


def _runtime_verdict_of(error: ChildCrashError) -> RuntimeVerdict:
    """The verdict of an ONNX Runtime whose process has ended."""
    import onnxruntime

    if error.is_timeout:
        return skip_runtime(error.reason)

    refusal = f"it crashes on it: {error.reason}"
    return RuntimeVerdict(onnxruntime.__version__, refusal, "invalid", unknown_operators=())


def skip_checker(reason: str) -> CheckerVerdict:
    """The verdict of a checker that did not finish.

    Args:
        reason: Why it did not.
    """
    import onnx

    return CheckerVerdict(onnx.__version__, structure=None, types=None, limit=reason)


def skip_runtime(reason: str) -> RuntimeVerdict:
    """The verdict of an ONNX Runtime that did not finish.

    Args:
        reason: Why it did not.
    """
    import onnxruntime

    return RuntimeVerdict(onnxruntime.__version__, reason, "limit", unknown_operators=())


# --- the request ----------------------------------------------------------------------------------------------------


def _outline(proto: onnx.ModelProto, unknown: set[tuple[str, str]]) -> onnx.ModelProto:
    """A copy for onnx, without large constants.

    Everything that onnx finds wrong with it is wrong for TensorRT too.

    Args:
        proto: The model.
        unknown: Domain and type of the operators that onnx does not know.
    """
    import onnx

    outline = onnx.ModelProto()
    outline.ir_version = min(proto.ir_version or onnx.IR_VERSION, onnx.IR_VERSION)
    outline.opset_import.extend(proto.opset_import)
    outline.functions.extend(proto.functions)
    outline.graph.name = proto.graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        entries = getattr(proto.graph, field)
        getattr(outline.graph, field).extend(entries)

    _copy_initializers(proto.graph, outline.graph)
    for graph in iterate_graphs(outline.graph):
        graph.name = graph.name or "graph"
        for tensor in _tensors_in(graph):
            _fill_external(tensor)

    _import_domains(outline, unknown)
    return outline


def _copy_initializers(graph: onnx.GraphProto, outline: onnx.GraphProto) -> None:
    """Copy the small initializers of a graph, and declare the large ones as inputs, with their shape but no data.

    Args:
        graph: The graph.
        outline: The copy for onnx, which has the inputs of the graph already.
    """
    import onnx

    declared_names = {value.name for value in outline.input}
    for tensor in graph.initializer:
        is_external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if not is_external and tensor.ByteSize() <= _LARGEST_CONSTANT:
            outline.initializer.append(tensor)
        elif tensor.name not in declared_names:
            declaration = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, tensor.dims
            )
            outline.input.append(declaration)


def iterate_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies of its nodes, at any depth.

    Args:
        graph: The main graph of a model, or a part of it.
    """
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current

        for node in current.node:
            for attribute in node.attribute:
                pending.extend(attribute.graphs)
                if attribute.HasField("g"):
                    pending.append(attribute.g)


def iterate_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a model, of its bodies and of its functions."""
    for graph in iterate_graphs(proto.graph):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _tensors_in(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The initializers of a graph, and the single tensors in the attributes of its nodes.

    Only these can have data in another file.
    """
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _fill_external(tensor: onnx.TensorProto) -> None:
    """Write zeros in place of data in another file: onnx would look for that file in the current folder."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return

    try:
        item_bytes = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError, ValueError):  # no such type
        return

    byte_count = item_bytes * math.prod(tensor.dims)
    if 0 <= byte_count <= _LARGEST_NESTED:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = bytes(byte_count)


def _import_domains(outline: onnx.ModelProto, unknown: set[tuple[str, str]]) -> None:
    """Give every unknown operator a domain that the model imports and onnx does not look up.

    Args:
        outline: The copy for onnx, changed in place.
        unknown: Domain and type of the operators that onnx does not know. Those of ONNX's own domain get another.
    """
    domains = set()
    for node in iterate_nodes(outline):
        if (node.domain, node.op_type) in unknown:
            node.domain = node.domain or UNKNOWN_DOMAIN
            domains.add(node.domain)

    for importer in (outline, *outline.functions):
        imported_domains = {opset.domain for opset in importer.opset_import}
        for domain in sorted(domains - imported_domains):
            importer.opset_import.add(domain=domain, version=1)


# --- the helper's side ----------------------------------------------------------------------------------------------


def answer(request: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Run one of the checks in the helper process; every exception of the libraries becomes text.

    Args:
        request: From `_Helper.ask`.
        blob: The outline of the model, for a check by onnx.

    Returns:
        The fields of the verdict, and no bytes.
    """
    if request["do"] == "check":
        return _check(blob), b""
    return _load_and_look_up(request), b""


def _check(blob: bytes) -> dict[str, Any]:
    """The fields of a `CheckerVerdict`."""
    import onnx

    proto = onnx.load_model_from_string(blob)
    can_propagate = True
    try:
        with _limited_memory():
            types = _refusal_of_inference(proto, data_prop=True)
    except MemoryError:
        can_propagate = False
        types = _refusal_of_inference(proto, data_prop=False)

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


def _refusal_of_inference(proto: onnx.ModelProto, data_prop: bool) -> str | None:
    """Why shape and type inference refuses a model; None if it does not.

    Args:
        proto: The model.
        data_prop: Whether to follow the values of shape computations.

    Raises:
        MemoryError: The values take too much memory.
    """
    import onnx

    try:
        onnx.shape_inference.infer_shapes(
            proto, check_type=True, strict_mode=True, data_prop=data_prop
        )
    except Exception as error:  # onnx and protobuf have their own exception types
        if data_prop and isinstance(error, MemoryError):
            raise
        return first_line(error)
    return None


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Limit the memory of this process, if the system can.

    Inference of a valid file needs little. If the constants of a file double at every node, it would use all memory.
    """
    if sys.platform == "win32":
        yield
        return
    import resource

    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    used_bytes = _used_address_space()
    limit = used_bytes + _INFERENCE_BYTES
    is_allowed = hard_limit == resource.RLIM_INFINITY or limit < hard_limit
    if used_bytes and is_allowed:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft_limit, hard_limit))


def _used_address_space() -> int:
    """Bytes of address space that this process uses; 0 if the system does not tell."""
    if sys.platform != "linux":
        return 0
    import resource

    page_count = int(Path("/proc/self/statm").read_text().split()[0])
    return page_count * resource.getpagesize()


def _fill_types(proto: onnx.ModelProto) -> None:
    """Give every input and output of a graph without type or shape one, so that the checker goes on.

    TensorRT reads such files. Without a type a value counts as a float32 tensor.
    """
    import onnx

    for graph in iterate_graphs(proto.graph):
        for value in (*graph.input, *graph.output):
            if not value.HasField("type"):
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT

            is_tensor = value.type.HasField("tensor_type")
            if is_tensor and not value.type.tensor_type.HasField("shape"):
                value.type.tensor_type.shape.SetInParent()


def _load_and_look_up(request: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `RuntimeVerdict`."""
    import onnxruntime

    refusal, kind = _load(request["path"])
    operators = [(domain, name) for domain, name in request["operators"]]
    return {
        "version": onnxruntime.__version__,
        "refusal": refusal,
        "kind": kind,
        "unknown_operators": _unknown_to_runtime(operators),
    }


def _unknown_to_runtime(operators: list[tuple[str, str]]) -> list[str]:
    """The operators that ONNX Runtime does not have, as `DOMAIN::OPERATOR`.

    The function that lists its operators is private, but there is no other. Without it, ONNX Runtime is assumed to have
    all.
    """
    import onnxruntime

    list_schemas: Any = getattr(
        onnxruntime.capi.onnxruntime_pybind11_state, "get_all_operator_schema", None
    )
    if list_schemas is None:
        return []

    available = {(schema.domain, schema.name) for schema in list_schemas()}
    if not available:
        return []
    return [f"{domain}::{name}" for domain, name in operators if (domain, name) not in available]


def _load(path: str) -> tuple[str | None, RefusalKind | None]:
    """Why ONNX Runtime refuses a file, and what kind of refusal that is; None for both if it loads it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Prepacking copies weights, and nothing runs here.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(
            path,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_DISABLED_OPTIMIZERS,
        )
    except Exception as error:  # its exception types have no common base
        return _read_refusal(error)
    return None, None


# The first would compute every constant, however large it gets. The others do not know FP8: they end with an error at a
# Clip before a Q, and at a Transpose beside one. The file is not at fault.
_DISABLED_OPTIMIZERS = ["ConstantFolding", "ClipQuantRewrite", "TransposeOptimizer"]

# Messages of ONNX Runtime that say that it lacks something itself.
_LIMITS = re.compile(
    r"NOT_IMPLEMENTED|is not a registered function/op|No Op registered for|No opset import for domain"
    r"|Unsupported model IR version|Current official support for domain|Failed to construct locale"
)
_RUNTIME_PREFIX = re.compile(
    r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )?(Load model from .*? failed: ?)?"
)
_RUNTIME_SOURCE = re.compile(r"/\S+\.(?:cc|h):\d+ (?:.*?\)(?: const)? (?=[A-Za-z\"'(]))?")


def _read_refusal(error: Exception) -> tuple[str, RefusalKind]:
    """The message of an exception of ONNX Runtime, and what kind of refusal it is."""
    message = _message_of(error)
    is_limit = is_out_of_memory(error) or _LIMITS.search(message) is not None
    return clean_runtime_message(message), "limit" if is_limit else "invalid"


def _message_of(error: Exception) -> str:
    """The message of an exception of ONNX Runtime in one line."""
    if isinstance(error, UnicodeDecodeError):
        return first_line(error)
    return " ".join(str(error).split())


def clean_runtime_message(message: str) -> str:
    """The message of an exception of ONNX Runtime without its codes, the path and places in its source."""
    text = _RUNTIME_PREFIX.sub("", message)
    text = _RUNTIME_SOURCE.sub("", text)
    text = text.strip().rstrip(".")
    return text or "no reason given"


def first_line(error: Exception) -> str:
    """The first line of the message of an error, or its type if it has no message."""
    if isinstance(error, UnicodeDecodeError):
        return "a text in it is not UTF-8"

    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0].rstrip(".")
