"""A process that answers: crashes, hangs, Ctrl-C and prints there do no harm here."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qdq.child import Child, ChildCrashError

SELF = f"{__name__}:answer"


def answer(request, blob):
    """The child's side."""
    if request == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if request == "raise":
        raise ValueError("a reason")
    if request == "hang":
        time.sleep(1000)
    if request == "work":
        while True:
            pass
    if request == "print":
        os.write(1, b"not between the frames")
        print("nor this")
    return {
        "pid": os.getpid(),
        "main": sys.modules["__main__"].__spec__.name,
        "request": request,
    }, blob[::-1]


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_answers_and_leaves_no_process():
    with Child(SELF) as child:
        for blob in (b"", b"abc", bytes(1 << 20) + b"end"):
            reply, reversed_blob = child.call({"a": [1, None]}, blob)
            assert reply["request"] == {"a": [1, None]}
            assert reply["main"] == "qdq.child"
            assert reversed_blob == blob[::-1]
        assert child.call("print")[0]["request"] == "print"
    assert reply["pid"] != os.getpid()
    assert is_gone(reply["pid"])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [("crash", "SIGSEGV, a segmentation fault"), ("raise", "exit code 1: ValueError: a reason")],
)
def test_a_crash_is_one_error(request_, reason):
    child = Child(SELF)
    with pytest.raises(ChildCrashError, match=reason):
        child.call(request_)
    assert not child.is_running


def test_a_hang_is_ended():
    child = Child(SELF)
    pid = child.call("x")[0]["pid"]
    with pytest.raises(ChildCrashError, match=r"longer than 0\.5 s"):
        child.call("hang", seconds=0.5)
    assert is_gone(pid)


def test_a_hang_is_no_crash():
    with pytest.raises(ChildCrashError) as caught, Child(SELF) as child:
        child.call("hang", seconds=0.5)
    assert caught.value.is_timeout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_the_limit_of_processor_time_counts_work_and_no_waiting():
    """What it used for an earlier call is not counted either."""
    child = Child(SELF)
    child.call("x", cpu_seconds=1)
    with pytest.raises(ChildCrashError, match=r"longer than 0\.5 s") as waiting:
        child.call("hang", seconds=0.5, cpu_seconds=1)
    assert waiting.value.is_timeout
    with (
        pytest.raises(ChildCrashError, match="longer than 1 s of processor time") as working,
        Child(SELF) as second,
    ):
        second.call("work", cpu_seconds=1)
    assert working.value.is_timeout


def test_ctrl_c_ends_it():
    child = Child(SELF)
    pid = child.call("x")[0]["pid"]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.call("hang")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert is_gone(pid)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
def test_it_ends_with_a_parent_that_is_killed():
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from qdq.child import Child
child = Child("test_child:answer")
print(child.call("x")[0]["pid"], flush=True)
child.call("hang")
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(pid)
