"""Parse an ONNX file and build a serialized engine from it, with TensorRT or TensorRT-RTX.

Both are native code that a damaged file can crash, so the build runs in a separate process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq.child import Child, ChildCrashError
from qdq.errors import ArgumentError, BuildError, QdqError
from qdq.trt.backend import Backend, find_backend, find_compute_capability, make_logger
from qdq.trt.kernels import Kernel, parse_build_log, parse_layer_json
from qdq.trt.profiles import Profile

WORKSPACE_BYTES = 4 << 30
_ERRORS = ("ERROR", "INTERNAL_ERROR")
_ALARMS = ("WARNING", *_ERRORS)


@dataclass(frozen=True)
class EnginePlan:
    """Result of one build.

    Args:
        engine: The serialized engine.
        log: Every message of parser and builder as (severity, text), in order.
        layer_json: The engine inspector's JSON; None with TensorRT-RTX, whose inspector needs a GPU.
    """

    engine: bytes
    log: list[tuple[str, str]]
    layer_json: str | None

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels of the engine, in order of execution."""
        if self.layer_json is not None:
            return parse_layer_json(self.layer_json)
        return parse_build_log(text for _, text in self.log)

    @property
    def warnings(self) -> list[str]:
        """Messages of severity WARNING and above, each once."""
        texts = [text for severity, text in self.log if severity in _ALARMS]
        return list(dict.fromkeys(texts))


def build_plan(
    backend: Backend, onnx_path: Path, profiles: Mapping[str, Profile], sm: int | None
) -> EnginePlan:
    """Build an engine in a separate process.

    Args:
        backend: The TensorRT to build with.
        onnx_path: The ONNX file, with its external data next to it.
        profiles: Input name -> `min`, `opt` and `max` shape, for every input with a dynamic dimension.
        sm: Compute capability to build for, 89 for 8.9 (TensorRT-RTX); None for the GPU of this machine (TensorRT).

    Raises:
        ArgumentError: TensorRT-RTX has no such compute capability.
        BuildError: The parser or the builder refuses the file, with the names of the nodes; or one of them crashes.
    """
    request = {"backend": backend.name, "onnx": str(onnx_path), "profiles": profiles, "sm": sm}
    try:
        with Child("qdq.trt.builder:answer_build") as child:
            answer, engine = child.call(request)
    except ChildCrashError as died:
        raise BuildError(
            f"TensorRT crashed while it built {onnx_path}: {died.reason}.",
            f"run `qdq check {onnx_path}` and fix the nodes that it names; if it names none, export parts of the model "
            "to find the node, and report it to NVIDIA with the file.",
        ) from died
    _raise_failure(answer)
    log = [(severity, text) for severity, text in answer["log"]]
    return EnginePlan(engine, log, answer["layer_json"])


def _raise_failure(answer: dict[str, Any]) -> None:
    """Raise the error of the child, if its answer is one."""
    error = answer.get("error")
    if error is None:
        return
    if error["kind"] == ArgumentError.__name__:
        raise ArgumentError(error["message"], error["fix"])
    raise BuildError(error["message"], error["fix"])


def answer_build(request: dict[str, Any], _: bytes) -> tuple[dict[str, Any], bytes]:
    """The child's side of `build_plan`.

    Args:
        request: Name of the backend, path of the ONNX file, profiles and compute capability.

    Returns:
        Log and layers, or an error; the engine.
    """
    onnx_path = Path(request["onnx"])
    try:
        backend = find_backend(request["backend"])
        plan = _build(backend, onnx_path, request["profiles"], request["sm"])
    except QdqError as error:
        return _describe_error(error), b""
    except Exception as error:  # the type that pybind11 raises for an error in C++
        message = f"{type(error).__name__}: {error}"
        return _describe_error(_build_failure(onnx_path, [("ERROR", message)])), b""
    return {"log": plan.log, "layer_json": plan.layer_json}, plan.engine


def _describe_error(error: QdqError) -> dict[str, Any]:
    kind = type(error).__name__
    return {"error": {"kind": kind, "message": error.message, "fix": error.fix}}


def _build(
    backend: Backend, onnx_path: Path, profiles: Mapping[str, Profile], sm: int | None
) -> EnginePlan:
    trt = backend.module
    log = make_logger(trt)
    builder = trt.Builder(log)
    config = _configure(trt, builder, profiles, sm)
    network = builder.create_network(_network_flags(backend))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise _parse_failure(onnx_path, errors)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _build_failure(onnx_path, log.messages)
    layer_json = _inspect(trt, log, engine) if sm is None else None
    return EnginePlan(bytes(engine), log.messages, layer_json)


def _configure(trt: Any, builder: Any, profiles: Mapping[str, Profile], sm: int | None) -> Any:
    """The builder's configuration: target, memory, profile, and the detail of its log."""
    config = builder.create_builder_config()
    # Only the log at this level lists the kernels.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if sm is None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    else:
        config.num_compute_capabilities = 1
        config.set_compute_capability(find_compute_capability(trt, sm), 0)
    if profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in profiles.items():
            profile.set_shape(name, shapes["min"], shapes["opt"], shapes["max"])
        config.add_optimization_profile(profile)
    return config


def _network_flags(backend: Backend) -> int:
    """Strong typing if it is an option: only Q/DQ and the types in the graph decide."""
    if not backend.weakly_typed:
        return 0
    return 1 << int(backend.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse_failure(onnx_path: Path, errors: list[Any]) -> BuildError:
    """The error for a file that the parser refuses, with its reason for each node."""
    reasons = []
    for error in errors:
        reasons.append(
            f"node '{error.node_name()}' ({error.node_operator()}): {error.desc().strip()}"
        )
    return BuildError(
        f"TensorRT cannot parse {onnx_path}: {'; '.join(reasons) or 'no reason given'}.",
        f"run `qdq check {onnx_path}`: its rules name the cause at that node; an operator that TensorRT does "
        "not have must be replaced in the model before the export.",
    )


def _build_failure(onnx_path: Path, messages: list[tuple[str, str]]) -> BuildError:
    """The error for a file that the builder refuses, with the builder's messages."""
    reasons = []
    for severity, text in messages:
        if severity in _ERRORS:
            reasons.append(text.strip())
    return BuildError(
        f"TensorRT cannot build {onnx_path}: {'; '.join(reasons) or 'no reason given'}.",
        "leave the layer that it names in float, or choose another compute capability; "
        f"`qdq check {onnx_path}` names known causes.",
    )


def _inspect(trt: Any, log: Any, engine: Any) -> str:
    """The inspector's JSON of a new engine (TensorRT only: it loads the engine onto the GPU)."""
    loaded = trt.Runtime(log).deserialize_cuda_engine(engine)
    if loaded is None:
        raise BuildError(
            f"the engine cannot be loaded on this machine to list its layers: {log.messages[-1][1]}.",
            "free memory on the GPU, or read the layers with the trtexec line on the target.",
        )
    inspector = loaded.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
