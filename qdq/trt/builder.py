"""Parse an ONNX file and build a serialized engine from it, with TensorRT or TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq.errors import BuildError
from qdq.trt.backend import Backend, find_compute_capability, make_logger
from qdq.trt.kernels import Kernel, parse_build_log, parse_layer_json
from qdq.trt.profiles import Profile

WORKSPACE_BYTES = 4 << 30
_ALARMS = ("WARNING", "ERROR", "INTERNAL_ERROR")


@dataclass(frozen=True)
class Plan:
    """What one build gave.

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
        return list(dict.fromkeys(text for severity, text in self.log if severity in _ALARMS))


def build_plan(backend: Backend, onnx_path: Path, profiles: Mapping[str, Profile], sm: int | None) -> Plan:
    """Build an engine.

    Args:
        backend: What to build with.
        onnx_path: The ONNX file; its external data beside it.
        profiles: Input name -> `min`, `opt` and `max` shape, for every input with a dynamic dimension.
        sm: Compute capability to build for, 89 for 8.9 (TensorRT-RTX); None: the GPU at hand (TensorRT).

    Raises:
        ArgumentError: TensorRT-RTX has no such compute capability.
        BuildError: The parser or the builder refuses the file; names the nodes.
    """
    trt = backend.module
    log = make_logger(trt)
    builder = trt.Builder(log)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else no list of kernels
    if sm is None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    else:
        config.num_compute_capabilities = 1
        config.set_compute_capability(find_compute_capability(trt, sm), 0)
        _forget_last_build(trt, builder, config)
        log.messages.clear()
    network = builder.create_network(_network_flags(backend))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        raise _parse_failure(onnx_path, [parser.get_error(i) for i in range(parser.num_errors)])
    if profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in profiles.items():
            profile.set_shape(name, shapes["min"], shapes["opt"], shapes["max"])
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _build_failure(onnx_path, log.messages)
    return Plan(bytes(engine), log.messages, None if sm is not None else _inspect(trt, log, engine))


def _forget_last_build(trt: Any, builder: Any, config: Any) -> None:
    """Build a network that does nothing.

    TensorRT-RTX 1.7 keeps something of a build for SM 75 that failed and applies it to the next one of the process,
    for whatever SM: its convolutions stay in float, in silence. The empty build (30 ms) takes that away.
    """
    network = builder.create_network(0)
    output = network.add_identity(network.add_input("x", trt.float32, (1,))).get_output(0)
    network.mark_output(output)
    builder.build_serialized_network(network, config)


def _network_flags(backend: Backend) -> int:
    """Strong typing where it is not the only kind: Q/DQ and the graph's own types decide, nothing else."""
    if not backend.weakly_typed:
        return 0
    return 1 << int(backend.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse_failure(onnx_path: Path, errors: list[Any]) -> BuildError:
    """What the parser refuses, by node."""
    found = "; ".join(
        f"node '{error.node_name()}' ({error.node_operator()}): {error.desc().strip()}" for error in errors
    )
    return BuildError(
        f"TensorRT cannot parse {onnx_path}: {found or 'no reason given'}.",
        f"run `qdq check {onnx_path}`: its rules name the cause at that node; an operator that TensorRT does "
        "not have must be replaced in the model before the export.",
    )


def _build_failure(onnx_path: Path, messages: list[tuple[str, str]]) -> BuildError:
    """Why the builder gave no engine, in its own words."""
    found = "; ".join(text.strip() for severity, text in messages if severity in _ALARMS[1:])
    return BuildError(
        f"TensorRT cannot build {onnx_path}: {found or 'no reason given'}.",
        "leave the layer that it names in float, or choose another compute capability; "
        f"`qdq check {onnx_path}` names known causes.",
    )


def _inspect(trt: Any, log: Any, engine: Any) -> str:
    """The inspector's JSON of a freshly built engine (TensorRT only: it loads the engine onto the GPU)."""
    loaded = trt.Runtime(log).deserialize_cuda_engine(engine)
    if loaded is None:
        raise BuildError(
            f"the engine cannot be loaded on this machine to list its layers: {log.messages[-1][1]}.",
            "free memory on the GPU, or read the layers with the trtexec line on the target.",
        )
    inspector = loaded.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
