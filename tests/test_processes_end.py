"""No process that a test started goes on after it."""

import sys
from pathlib import Path

import pytest
from processes import Processes, wait_for

CHILD = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
PARENT = f"""
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, sys.argv[1]], start_new_session=True)
Path(sys.argv[2]).write_text(str(child.pid))
"""


def is_running(process):
    """Whether it has memory: one that is dead and not yet collected has none."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are listed in /proc")
def test_a_child_in_a_session_of_its_own_ends_with_the_test(tmp_path):
    """As a worker of torchrun: its parent has ended, and its process group is another one."""
    with Processes() as processes:
        assert processes.start("-c", PARENT, tmp_path / "ready", tmp_path / "pid").wait() == 0
        wait_for([tmp_path / "ready"], [])
        child = int((tmp_path / "pid").read_text())
        assert is_running(child)
    assert not is_running(child)


def test_a_failed_test_ends_what_it_started():
    def fail():
        with Processes() as processes:
            running.append(processes.start("-c", "import time; time.sleep(600)"))
            raise ValueError("as a test fails")

    running = []
    with pytest.raises(ValueError, match="as a test fails"):
        fail()
    assert running[0].returncode is not None


def test_waiting_for_a_file_ends_with_the_process(tmp_path):
    with Processes() as processes:
        process = processes.start("-c", "raise SystemExit(4)")
        with pytest.raises(AssertionError, match="ended with 4"):
            wait_for([tmp_path / "never"], [process])
