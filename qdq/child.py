"""A function in a process of its own: native code that crashes or hangs there ends only that process.

`python -m qdq.child MODULE:FUNCTION` is the other end. Both talk in frames: a JSON value and some bytes, over pipes, so
that no file is left behind whatever ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import IO, Any

_HEADER = struct.Struct(">QQ")  # bytes of the JSON, bytes of the blob
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_DIES_WITH_PARENT = "--dies-with-parent"


class ChildCrashError(Exception):
    """The process ended before it answered.

    Args:
        reason: What is known of its end, such as "it was ended by SIGSEGV".
        is_timeout: Whether it did nothing wrong but take longer than it may.
    """

    def __init__(self, reason: str, *, is_timeout: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_timeout = is_timeout


class Child:
    """A process that answers calls of one function, one at a time.

    It starts with a fresh interpreter, not with a copy of this one and without this one's `__main__`, so it may be used
    in a notebook and in a script without a main guard.

    Args:
        function: `MODULE:NAME` of a function that takes a JSON value and bytes, and returns such a pair.
    """

    def __init__(self, function: str) -> None:
        command = [sys.executable, "-m", "qdq.child", function]
        if (
            threading.current_thread() is threading.main_thread()
        ):  # the signal comes when the starting thread ends
            command.append(_DIES_WITH_PARENT)
        # The same modules as here, whatever stands in the current folder.
        paths = os.pathsep.join(str(path) or os.getcwd() for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
        self._is_expired = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether it can be called."""
        return self._process.poll() is None

    def call(
        self,
        request: Any,
        blob: bytes = b"",
        *,
        seconds: float | None = None,
        cpu_seconds: int | None = None,
    ) -> tuple[Any, bytes]:
        """Have the function answer; Ctrl-C ends the process.

        Args:
            request: Any JSON value.
            blob: Any bytes.
            seconds: Longest time to wait for the answer; no limit if None.
            cpu_seconds: Most processor time that the answer may take, however busy the machine is; no limit if None,
                and on Windows.

        Raises:
            ChildCrashError: The process crashed, or was ended because it took too long.
        """
        timer = threading.Timer(seconds or 0, self._expire)
        if seconds is not None:
            timer.start()
        try:
            answer = self._exchange([request, cpu_seconds], blob)
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()
        if answer is None:
            crash = self._explain_end(seconds, cpu_seconds)
            self.close()
            raise crash
        return answer

    def _explain_end(self, seconds: float | None, cpu_seconds: int | None) -> ChildCrashError:
        if self._is_expired:
            return ChildCrashError(f"it took longer than {seconds:g} s", is_timeout=True)
        if cpu_seconds is not None and self._process.wait() == -getattr(signal, "SIGXCPU", 0):
            return ChildCrashError(
                f"it took longer than {cpu_seconds} s of processor time", is_timeout=True
            )
        return ChildCrashError(self._describe_end())

    def _expire(self) -> None:
        self._is_expired = True
        self._process.kill()

    def close(self) -> None:
        """End the process; nothing of it remains."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):  # what was not sent any more
                if stream is not None:
                    stream.close()

    def _exchange(self, request: Any, blob: bytes) -> tuple[Any, bytes] | None:
        assert self._process.stdin is not None  # noqa: S101  # both are pipes
        assert self._process.stdout is not None  # noqa: S101
        try:
            _write_frame(self._process.stdin, request, blob)
            return _read_frame(self._process.stdout)
        except OSError:  # a broken pipe
            return None

    def _describe_end(self) -> str:
        number = max(0, -self._process.wait())  # of the signal
        self._stderr.seek(0)
        lines = [
            line
            for line in self._stderr.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
        last_words = f": {lines[-1].strip()}" if lines else ""
        if not number:
            return f"it ended with exit code {self._process.returncode}{last_words}"
        if number == signal.SIGKILL:
            return "it was ended by SIGKILL, as the system does when memory runs out"
        name = signal.Signals(number).name
        meaning = ", a segmentation fault" if name == "SIGSEGV" else ""
        return f"it was ended by {name}{meaning}{last_words}"


def _write_frame(stream: IO[bytes], value: Any, blob: bytes) -> None:
    text = json.dumps(value).encode()
    stream.write(_HEADER.pack(len(text), len(blob)))
    stream.write(text)
    stream.write(blob)
    stream.flush()


def _read_frame(stream: IO[bytes]) -> tuple[Any, bytes] | None:
    """The next frame; None where the other end is gone."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    text_bytes, blob_bytes = _HEADER.unpack(header)
    text, blob = stream.read(text_bytes), stream.read(blob_bytes)
    if len(text) < text_bytes or len(blob) < blob_bytes:
        return None
    return json.loads(text), blob


def _limit_cpu(seconds: int | None) -> None:
    """Let the system end this process after that much more processor time of all its threads."""
    if sys.platform == "win32":
        return
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = (
        resource.RLIM_INFINITY
        if seconds is None
        else math.ceil(usage.ru_utime + usage.ru_stime) + seconds
    )
    limits = [number for number in (limit, hard) if number != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_CPU, (min(limits, default=resource.RLIM_INFINITY), hard))


def main() -> None:
    """Answer calls until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this process
    if _DIES_WITH_PARENT in sys.argv and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory runs out, this process goes and not its parent
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever native code prints must not stand between the frames
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    while (frame := _read_frame(sys.stdin.buffer)) is not None:
        (request, cpu_seconds), blob = frame
        _limit_cpu(cpu_seconds)
        _write_frame(answers, *function(request, blob))


if __name__ == "__main__":
    main()
