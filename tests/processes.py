"""Processes that a test starts: none of them outlives the test, whatever becomes of it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
_MARK = "QDQ_TEST_PROCESSES"


class Processes:
    """Starts programs, and ends them and all that they started when the with-block is left.

    What belongs to a block is known by a variable in its environment. A process group is not enough: torchrun puts each
    worker into a session of its own, where it goes on when torchrun is killed.
    """

    def __init__(self):
        self._mark = f"{_MARK}={uuid.uuid4()}"
        self._started = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self._started:
            process.kill()
            process.wait()
        scans_without_any = 0
        while scans_without_any < 2:  # one that is just starting has no environment yet
            running = self._find_running()
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            scans_without_any = 0 if running else scans_without_any + 1
            time.sleep(0.01)

    def start(self, *arguments, environment=None, **options):
        """Start Python with these arguments, for `subprocess.Popen`; the packages and this folder can be imported."""
        name, value = self._mark.split("=")
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths,
            name: value,
            **(environment or {}),
        }
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, env=variables, start_new_session=True, **options)
        self._started.append(process)
        return process

    def start_pair(self, arguments, store, **options):
        """Start two processes with a group over gloo: RANK, WORLD_SIZE and STORE are in their environment."""
        processes = []
        for rank, arguments_of_rank in enumerate(arguments):
            environment = {"WORLD_SIZE": "2", "STORE": str(store), "RANK": str(rank)}
            process = self.start(*arguments_of_rank, environment=environment, **options)
            processes.append(process)
        return processes

    def _find_running(self):
        """The processes with the mark of this block, dead ones apart; none where there is no /proc."""
        mark = self._mark.encode()
        running = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended, or is another user's
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    running.append(int(folder.name))
        return running


def wait_for(paths, processes):
    """Wait until all files are there; an error if a process ends before."""
    while not all(path.exists() for path in paths):
        for process in processes:
            assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        time.sleep(0.02)
