"""A recipe in a process that has what it needs imported already, and that may be stopped at a chosen moment."""

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torchvision",
        "torch.onnx",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "sklearn",
        "skimage",
        "tensorrt_rtx",
    ]
)
# How a file that is whole gets its name.
_NAMING = "os.link" if hasattr(os, "O_TMPFILE") else "os.rename"


@dataclass(frozen=True)
class Stop:
    """Where a signal reaches a run.

    Args:
        stage: The stage, as it is printed.
        files: The signal comes when so many files of the stage have got their names, and another one would.
        number: The signal.
    """

    stage: str
    files: int
    number: int


def run_recipe(recipe, arguments, folder, stop=None):
    """Exit code of a recipe, minus the number of the signal that killed it, and what it wrote to its error stream."""
    process = _CONTEXT.Process(
        target=_run, args=(recipe, [*map(str, arguments)], folder, stop), daemon=True
    )
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    return process.exitcode, (folder / "errors.txt").read_text()


def _run(recipe, arguments, folder, stop):
    for number, name in ((1, "output.txt"), (2, "errors.txt")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    if stop:
        _prepare(stop)
    sys.argv = [str(recipe), *arguments]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    runpy.run_path(str(recipe), run_name="__main__")


def _prepare(stop):
    """Send the signal from the audit event of the system call, which no thread and no load of the machine can delay."""
    from qdq.run import Run

    stages, begin = [], Run.stage

    def stage(run, name):
        stages.append([name, 0])
        begin(run, name)

    def watch(event, _):
        if event == _NAMING and stages and stages[-1][0] == stop.stage:
            if stages[-1][1] == stop.files:
                os.kill(os.getpid(), stop.number)
            stages[-1][1] += 1

    Run.stage = stage
    sys.addaudithook(watch)
