"""A small network with two outputs of one shape, its bundle, and what can go wrong with it on the target."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import qdq

STAND_IN = Path(__file__).parent / "stand_in_trtexec.py"
VERSIONS = ("8.6.1", "10.3.0", "10.16.0", "11.0.0", "11.1.0")
TOOLS = ("awk", "cat", "cut", "dirname", "grep", "head", "mkdir", "mv", "rm", "sed", "sha256sum")
MORE_TOOLS = ("sort", "tail", "tr", "uname", "wc")


@dataclass(frozen=True)
class Fault:
    """What is wrong on the target, and how the result names it.

    Args:
        check: Name of the check that fails.
        text: A part of its text.
        file: Name of a file of the bundle that is damaged; otherwise the stand-in is told to break something.
    """

    check: str
    text: str
    file: str = ""


FAULTS = {
    "scale_times_two": Fault("numbers", "SQNR"),
    "zeroed_layer": Fault("numbers", "SQNR"),
    "transposed_weight": Fault("numbers", "SQNR"),
    "flipped_kernel": Fault("numbers", "SQNR"),
    "missing_bias": Fault("numbers", "SQNR"),
    "missing_relu": Fault("numbers", "SQNR"),
    "saturated_weight": Fault("numbers", "SQNR"),
    "swapped_outputs": Fault("numbers", "SQNR"),
    "stuck_outputs": Fault("numbers a", "the worst is pair"),
    "ignored_inputs": Fault("numbers", "SQNR"),
    "wrong_shape": Fault("numbers a", "has shape [8, 1], expected [1, 8]"),
    "truncated_output": Fault("numbers a", "has shape [1, 7], expected [1, 8]"),
    "cut_file": Fault("numbers a", "is damaged or cut off"),
    "nan": Fault("numbers a", "1 values that are NaN or infinite"),
    "infinite": Fault("numbers a", "1 values that are NaN or infinite"),
    "missing_output": Fault("numbers b", "has no output b, but a"),
    "no_outputs": Fault("numbers a", "trtexec wrote no results/outputs.0.json"),
    "run_crash": Fault("run pair 0", "illegal memory access"),
    "float_engine": Fault("census", "0 of 4 products in int8"),
    "missing_qdq": Fault("census", "middle/Conv (Half"),
    "names_only": Fault("census", "names only"),
    "slower_than_float": Fault("time", "int8 is not faster"),
    "no_times": Fault("time", "no times"),
    "build_crash": Fault("build int8", "Assertion isValid failed"),
    "no_engine": Fault("build int8", "wrote no engine"),
    "wrong digest": Fault("files", "model.onnx (changed)", file="model.onnx"),
    "stale file": Fault("files", "references/1.0.a.npy (changed)", file="references/1.0.a.npy"),
    "missing file": Fault("files", "inputs/0.0.x.npy (missing)", file="inputs/0.0.x.npy"),
}
"""Name -> what must be found. Those without a file are values of STAND_IN_FAULT."""


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.a = nn.Linear(16, 8)
        self.b = nn.Linear(16, 8)

    def forward(self, x):
        features = self.middle(self.stem(x).relu()).relu().mean((2, 3))
        return {"a": self.a(features), "b": self.b(features)}


def make_run(folder, fp8=()):
    """A folder with the two files of a run that a bundle is made from.

    Args:
        fp8: Names of the layers in FP8; the others are in int8.
    """
    torch.manual_seed(0)
    model = TwoHeads().eval()
    batches = [2 * torch.randn(4, 3, 8, 8)]
    if fp8:
        others = [name for name, _ in model.named_children() if name not in fp8]
        qdq.swap_modules(model, batches[0], include="*", exclude=others, formats=("fp8",))
    qdq.swap_modules(model, batches[0], include="*")
    qdq.calibrate_model(model, batches, method="max")
    onnx = qdq.export_onnx(model, batches[0], folder / "model.onnx").path
    qdq.save_references(model, batches, folder / "references.safetensors", onnx)
    return folder


def write_trtexec(folder, version):
    """A program named trtexec of a version."""
    program = folder / f"trtexec {version}"
    command = shlex.join([sys.executable, str(STAND_IN), version])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
    return program


def write_tools(folder):
    """A folder with all programs that verify.sh needs, and no python."""
    for name in (*TOOLS, *MORE_TOOLS):
        path = shutil.which(name)
        assert path, f"there is no {name}"
        (folder / name).symlink_to(path)
    return folder


def verify(bundle, trtexec, *arguments, shell="sh", fault="", seed=0, path=None, capability="8.9"):
    """Run verify.sh with the stand-in; returns its finished process."""
    environment = {**os.environ, "STAND_IN_FAULT": fault, "STAND_IN_SEED": str(seed)}
    environment |= {
        "STAND_IN_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
        "PATH": str(path) if path else environment["PATH"],
    }
    command = [shutil.which(shell), bundle / "verify.sh", "--trtexec", trtexec, *arguments]
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )


def damage(bundle, name):
    """Break a file of a bundle: remove it, or write another value into it."""
    path = bundle / FAULTS[name].file
    if name == "missing file":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10
    path.write_bytes(content)


def read_checks(bundle):
    """The checks in result.json: name -> status and text."""
    content = json.loads((bundle / "result.json").read_text())
    return {check["name"]: (check["status"], check["text"]) for check in content["checks"]}


def is_named(bundle, name):
    """Whether the result says what is wrong: the right check fails, and its text says how."""
    fault = FAULTS[name]
    for check, (status, text) in read_checks(bundle).items():
        if status == "failed" and check.startswith(fault.check) and fault.text in text:
            return True
    return False
