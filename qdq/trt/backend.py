"""Find a TensorRT to build with: TensorRT-RTX, which needs no GPU, or TensorRT itself."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from qdq.errors import ArgumentError, DependencyError

logger = logging.getLogger(__name__)

DEFAULT_SM = 89
"""Compute capability that TensorRT-RTX builds for unless told otherwise: 8.9."""

# Name of the backend -> module to import. The extra of qdq that installs it has the same name.
_MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class Backend:
    """A TensorRT that can build engines here.

    Args:
        name: `rtx` or `tensorrt`.
        module: The imported Python package.
        sm: Compute capability that TensorRT-RTX builds for, 89 for 8.9; TensorRT builds for the GPU of this machine.
    """

    name: str
    module: ModuleType
    sm: int = DEFAULT_SM

    @property
    def version(self) -> str:
        """Version of the package, for example `1.7.1.116`."""
        return str(self.module.__version__)

    @property
    def weakly_typed(self) -> bool:
        """Whether networks are weakly typed by default: TensorRT before 11, never RTX."""
        return self.name == "tensorrt" and int(self.version.partition(".")[0]) < 11


def find_backend(name: str, sm: int | None = None, *, gpu_sm: int | None = None) -> Backend:
    """Import the TensorRT to build with.

    Args:
        name: `rtx`, `tensorrt`, or `auto`: TensorRT if it is installed and can build (it needs a GPU), TensorRT-RTX
            otherwise.
        sm: Compute capability for TensorRT-RTX, so that an invalid one fails here and not in the build.
        gpu_sm: Compute capability of the GPU of this machine, None if there is none. It is the default of `sm`. Without
            it, or if TensorRT-RTX cannot build for it, which is a warning, the default is 89.

    Raises:
        ArgumentError: Another name, or a compute capability that TensorRT-RTX does not have.
        DependencyError: The package is not installed or cannot build on this machine.
    """
    if name != "auto" and name not in _MODULES:
        raise ArgumentError(
            f"backend {name!r} is unknown.", f"choose one of auto, {', '.join(sorted(_MODULES))}."
        )
    backend = _find_any() if name == "auto" else _load(name)
    if sm is None:
        return replace(backend, sm=_choose_default_sm(backend, gpu_sm))
    if backend.name == "rtx":
        find_compute_capability(backend.module, sm)
    return replace(backend, sm=sm)


def _choose_default_sm(backend: Backend, gpu_sm: int | None) -> int:
    """The compute capability of the GPU of this machine, or `DEFAULT_SM`."""
    if gpu_sm is None:
        return DEFAULT_SM
    if backend.name != "rtx":
        return gpu_sm
    try:
        find_compute_capability(backend.module, gpu_sm)
    except ArgumentError as error:
        logger.warning("%s It builds for SM %d instead.", error.message, DEFAULT_SM)
        return DEFAULT_SM
    return gpu_sm


def find_compute_capability(trt: Any, sm: int) -> Any:
    """The enumerator of TensorRT-RTX for a compute capability.

    Args:
        trt: The package.
        sm: 89 for 8.9.

    Raises:
        ArgumentError: It has no such compute capability.
    """
    capabilities = {}
    for name, value in trt.ComputeCapability.__members__.items():
        if name.startswith("SM"):
            capabilities[name.removeprefix("SM")] = value
    if str(sm) not in capabilities:
        raise ArgumentError(
            f"TensorRT-RTX {trt.__version__} cannot build for SM {sm}; it supports {', '.join(capabilities)}.",
            "choose one of these (a GeForce or RTX workstation GPU); for data-centre GPUs such as SM 90 and "
            "SM 100 use the trtexec line that `qdq build` prints, or backend 'tensorrt', on such a machine.",
        )
    return capabilities[str(sm)]


def _find_any() -> Backend:
    """TensorRT if it can build here, else TensorRT-RTX, with a warning if TensorRT is installed."""
    try:
        return _load("tensorrt")
    except DependencyError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):  # installed, but cannot build here
            logger.warning("%s Building with TensorRT-RTX instead.", error.message)
    try:
        return _load("rtx")
    except DependencyError as error:
        raise DependencyError(
            f"no TensorRT can build here: {error.message}",
            "pip install 'qdq[rtx]' (builds without a GPU) or 'qdq[tensorrt]' (needs one)",
        ) from error


def import_package(name: str) -> ModuleType:
    """Import the package of a backend.

    Args:
        name: `rtx` or `tensorrt`.

    Raises:
        DependencyError: It is not installed, or cannot be imported.
    """
    package = _MODULES[name]
    try:
        return importlib.import_module(package)
    except (
        ImportError,
        OSError,
    ) as error:
        # OSError: the package is installed, but one of its libraries is missing.
        raise DependencyError(
            f"the package {package} cannot be imported: {error}.", f"pip install 'qdq[{name}]'"
        ) from error


def _load(name: str) -> Backend:
    """Import a backend and check that it can create a builder."""
    module = import_package(name)
    log = make_logger(module)
    try:
        module.Builder(log)
    except Exception as error:  # the type that pybind11 raises for a null pointer
        cause = str(error)
        if log.messages:
            _, cause = log.messages[-1]
        fix = "reinstall it: pip install --force-reinstall 'qdq[rtx]'"
        if name == "tensorrt":
            fix = "choose backend 'rtx', which builds without a GPU."
        raise DependencyError(
            f"{module.__name__} {module.__version__} cannot build on this machine: {cause}.", fix
        ) from error
    return Backend(name, module)


def make_logger(module: ModuleType) -> Any:
    """A logger for this TensorRT that stores every message as (severity, text) in `messages`."""

    class Log(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.messages.append((severity.name, text))

    return Log()
