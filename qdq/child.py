"""Calls a function in a separate process: native code that crashes or hangs there ends only that process.

`python -m qdq.child MODULE:FUNCTION` is the other end. Both ends exchange frames over pipes, each a JSON value and some
bytes, so that no file is left behind whichever process ends.
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
        reason: How it ended, such as "it was ended by SIGSEGV".
        is_timeout: Whether it was ended because it exceeded its time limit.
    """

    def __init__(self, reason: str, *, is_timeout: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_timeout = is_timeout


class Child:
    """A process that answers calls of one function, one at a time.

    It starts a fresh interpreter that does not import `__main__`, so it works in a notebook and in a script without a
    main guard.

    Args:
        function: `MODULE:NAME` of a function that takes a JSON value and bytes, and returns such a pair.
    """

    def __init__(self, function: str) -> None:
        command = [sys.executable, "-m", "qdq.child", function]
        # The system sends the signal when the thread that started the process ends.
        if threading.current_thread() is threading.main_thread():
            command.append(_DIES_WITH_PARENT)
        # The child imports the same modules, whatever the current folder contains.
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
        """Whether the process can be called."""
        return self._process.poll() is None

    def call(
        self,
        request: Any,
        blob: bytes = b"",
        *,
        seconds: float | None = None,
        cpu_seconds: int | None = None,
    ) -> tuple[Any, bytes]:
        """Call the function and wait for its answer; Ctrl-C ends the process.

        Args:
            request: Any JSON value.
            blob: Any bytes.
            seconds: Longest time to wait for the answer; no limit if None.
            cpu_seconds: Limit on the processor time of the answer, which does not depend on the load of the machine; no
                limit if None, and on Windows.

        Returns:
            The JSON value and the bytes that the function returned.

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
        """End the process and close its pipes."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):  # a broken pipe: the last request was not sent
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
        exit_code = self._process.wait()
        last_line = self._read_last_line()
        detail = f": {last_line}" if last_line else ""
        if exit_code >= 0:
            return f"it ended with exit code {exit_code}{detail}"
        signal_number = -exit_code
        if signal_number == signal.SIGKILL:
            return "it was ended by SIGKILL, as the system does when memory runs out"
        name = signal.Signals(signal_number).name
        meaning = ", a segmentation fault" if name == "SIGSEGV" else ""
        return f"it was ended by {name}{meaning}{detail}"

    def _read_last_line(self) -> str:
        """The last line that the process printed to its standard error."""
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace").rstrip()
        return text.splitlines()[-1].strip() if text else ""


def _write_frame(stream: IO[bytes], value: Any, blob: bytes) -> None:
    text = json.dumps(value).encode()
    stream.write(_HEADER.pack(len(text), len(blob)))
    stream.write(text)
    stream.write(blob)
    stream.flush()


def _read_frame(stream: IO[bytes]) -> tuple[Any, bytes] | None:
    """The next frame; None if the other end is gone."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    text_bytes, blob_bytes = _HEADER.unpack(header)
    text, blob = stream.read(text_bytes), stream.read(blob_bytes)
    if len(text) < text_bytes or len(blob) < blob_bytes:
        return None
    return json.loads(text), blob


def _limit_cpu(seconds: int | None) -> None:
    """Let the system end this process after this much more processor time, summed over its threads."""
    if sys.platform == "win32":
        return
    import resource

    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    soft_limit = hard_limit
    if seconds is not None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        soft_limit = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
        if hard_limit != resource.RLIM_INFINITY:
            soft_limit = min(soft_limit, hard_limit)
    resource.setrlimit(resource.RLIMIT_CPU, (soft_limit, hard_limit))


def main() -> None:
    """Answer calls until the other end is gone."""
    # Ctrl-C reaches the parent too, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _DIES_WITH_PARENT in sys.argv and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # when memory runs out, the system ends this process and not its parent
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of native code must not mix with the frames
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    while (frame := _read_frame(sys.stdin.buffer)) is not None:
        (request, cpu_seconds), blob = frame
        _limit_cpu(cpu_seconds)
        _write_frame(answers, *function(request, blob))


if __name__ == "__main__":
    main()
