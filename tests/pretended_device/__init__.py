"""A device over CPU memory, on which the tests of GPUs run where there is none.

It keeps the rules of CUDA that a CPU does not have:

- tensors of two devices do not meet in one operator;
- a copy between the devices, and a value that is read, are told (`watch`), so that a test can count what waits;
- a float tensor that is divided by a number is multiplied by its reciprocal;
- convolutions round to TF32 unless `torch.backends.cudnn.allow_tf32` is off, matrix products if
  `torch.backends.cuda.matmul.allow_tf32` is on;
- operators without a deterministic implementation raise after `torch.use_deterministic_algorithms(True)`;
- new memory holds garbage.

It says nothing about the speed, the memory or the nondeterminism of a GPU.
"""

from __future__ import annotations

import functools
import traceback
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

NAME = "pretended"
_PACKAGE = Path(__file__).parents[2] / "qdq"


@dataclass(frozen=True)
class Event:
    """A copy between the host and the device, or a wait for the device.

    Args:
        kind: "copy in", "copy out" or "wait".
        what: "blocking" or "non-blocking" for a copy, the operator for a wait.
        num_bytes: Size of what is copied.
        place: File and line in qdq that caused it; "" if qdq did not.
    """

    kind: str
    what: str
    num_bytes: int
    place: str

    @property
    def waits(self) -> bool:
        """Whether the host waits until the device has done its work."""
        return self.what != "non-blocking"


@functools.cache
def install(folder: Path) -> torch.device:
    """Build the device on first use, in about half a minute, and register it with torch.

    Args:
        folder: Where the built extension is looked for and kept.

    Raises:
        RuntimeError, OSError: There is no compiler or no ninja.
    """
    built = _build(folder / torch.__version__)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _make_module())
    built.start(_tell)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME, 0)


def _build(folder: Path) -> types.ModuleType:
    """Compile the extension, or load it if its source has not changed."""
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "one_builder"):
        # torch waits for this file, even if the process that made it was killed.
        (folder / "lock").unlink(missing_ok=True)
        return cpp_extension.load(
            "qdq_pretended_device",
            [str(Path(__file__).with_name("device.cpp"))],
            extra_cflags=["-O0"],
            build_directory=str(folder),
        )


def _make_module() -> types.ModuleType:
    """`torch.pretended`, with what torch looks for in it."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.device = lambda device: nullcontext()
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.synchronize = lambda device=None: None
    module.manual_seed = lambda seed: None
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=0: torch.get_rng_state()
    module.set_rng_state = lambda state, device=0: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


_watchers: list[list[Event]] = []


def _tell(kind: str, what: str, num_bytes: int) -> None:
    """Called by the device."""
    if not _watchers:
        return
    event = Event(kind, what, num_bytes, _find_place())
    for events in _watchers:
        events.append(event)


def _find_place() -> str:
    """The innermost line of qdq that runs."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE.parent)}:{frame.lineno}"
    return ""


@contextmanager
def watch(device: torch.device) -> Iterator[list[Event]]:
    """What the block copies and waits for; the list grows while it runs.

    Args:
        device: The pretended device, or a GPU, of which CUDA tells the waits only.
    """
    events: list[Event] = []
    if device.type == "cuda":
        with _watch_cuda(events):
            yield events
        return
    _watchers.append(events)
    try:
        yield events
    finally:
        _watchers.remove(events)


@contextmanager
def _watch_cuda(events: list[Event]) -> Iterator[None]:
    """Add an event for each warning of CUDA that the host waits."""

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing" in str(message):
            events.append(Event("wait", str(message), 0, _find_place()))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def list_waits(events: list[Event]) -> list[str]:
    """A line for each event that waits: what, and where in qdq.

    Args:
        events: As `watch` gives them.
    """
    return [
        f"{event.kind} ({event.what}) at {event.place or '?'}" for event in events if event.waits
    ]
