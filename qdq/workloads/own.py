"""A network, batches and a metric from Python files of the user: FILE.py:FUNCTION."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from qdq.batch import count_samples, find_labels, require_batches, take_samples
from qdq.errors import ArgumentError, DataError, ModelError, QdqError
from qdq.forward import call_model, evaluating, require_model
from qdq.outputs import name_outputs
from qdq.seeds import seeded_rng
from qdq.text import list_names
from qdq.workloads.sample_batches import SampleBatches, ShuffledBatches
from qdq.workloads.user_errors import describe_user_error
from qdq.workloads.workload import Workload, WorkloadOptions

_SUFFIX = ".py"
_SHOWN_FUNCTIONS = 5


def is_function_of_file(text: str) -> bool:
    """Whether a text has the form FILE.py:FUNCTION.

    Args:
        text: The value of an option.
    """
    path, separator, name = text.rpartition(":")
    return bool(separator) and path.endswith(_SUFFIX) and name.isidentifier()


def load_own(options: WorkloadOptions) -> Workload:
    """The workload of a user's own functions.

    `build()` of `--model` returns the module. `batches()` of `--data` returns batches in any form that `qdq.predict`
    takes: the first `calib_batches` of them calibrate, the following ones evaluate. `score(predict)` of `--metric`
    returns a number, or numbers by name.

    Args:
        options: The names of the functions, and how much data. `batch_size` does not matter: the batches come as they
            are.

    Raises:
        ArgumentError: Options that an own network does not have, or an option that is no function of a file.
        DataError: The batches cannot be read, or are too few.
        ModelError: The network cannot be built, or is no module.
    """
    if options.weights != "DEFAULT":
        raise ArgumentError(
            f"--weights {options.weights} is given, and {options.model} builds its own weights.",
            "leave --weights out, and load them in that function.",
        )
    if options.image_size is not None:
        raise ArgumentError(
            f"--image-size {options.image_size} is given, and the batches of {options.model} come as they are.",
            "leave --image-size out, and make images of that size in the function of --data.",
        )
    if options.data is None:
        raise ArgumentError(
            f"{options.model} needs data of its own.",
            "pass --data FILE.py:FUNCTION, a function that returns batches.",
        )
    build = load_function(options.model, "--model")
    make_batches = load_function(str(options.data), "--data")
    score = None
    if options.metric is not None:
        score = load_function(options.metric, "--metric")
    module = _build(build, options)
    calibration_batches, evaluation_batches = _divide(make_batches, options)
    has_answers = _gives_classes(module, calibration_batches[0], options)
    calibration = SampleBatches(
        calibration_batches,
        f"the first {len(calibration_batches)} batches of {options.data}",
        _list_classes(calibration_batches) if has_answers else None,
    )
    num_samples = sum(map(count_samples, evaluation_batches))
    labels = _list_classes(evaluation_batches) if has_answers else None
    evaluation = SampleBatches(
        evaluation_batches,
        f"the following {num_samples} samples of {options.data}",
        labels,
        "none" if labels is None else f"of the batches of {options.data}",
    )
    training = ShuffledBatches(calibration_batches, calibration.description, calibration.labels)
    return Workload(
        name=options.model,
        weights=f"as {options.model} builds it",
        module=module,
        calibration=calibration,
        evaluation=evaluation,
        load_training=lambda: training,
        score=score,
        outputs=options.outputs,
        mask=options.mask,
        output_weights=options.output_weights,
    )


def load_function(text: str, option: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION names.

    The file is imported as a script would be: its own folder is on the path of imports.

    Args:
        text: The file and the function.
        option: The option, for messages.

    Raises:
        ArgumentError: Another form, no such file or function, or a file that cannot be imported.
    """
    if not is_function_of_file(text):
        raise ArgumentError(
            f"{option} is {text!r}; expected FILE.py:FUNCTION.",
            f"write for example {option} net.py:{option.strip('-')}.",
        )
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ArgumentError(
            f"there is no file {path} for {option}.", "check the path; it is relative to here."
        )
    module = _import_file(path.resolve(), option)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        raise ArgumentError(
            f"{path} has no function {name} for {option}.", _suggest_function(module, name)
        )
    return function


def _suggest_function(module: ModuleType, missing: str) -> str:
    """What to do about a function that a file does not have."""
    functions = []
    for name, value in vars(module).items():
        if callable(value) and getattr(value, "__module__", None) == module.__name__:
            functions.append(name)
    if not functions:
        return f"define {missing} in it."
    return f"name one of {list_names(functions, _SHOWN_FUNCTIONS)}."


def _import_file(path: Path, option: str) -> ModuleType:
    """Import a Python file once, under a name that no installed package has.

    Raises:
        ArgumentError: It raises an error.
    """
    name = f"qdq_own_{path.stem}_{zlib.crc32(bytes(path)):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: S101  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses and pickles of the file look it up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ArgumentError(
            f"{path} cannot be imported for {option}: {describe_user_error(error)}.",
            "run it with python to see the whole error, or pass -v.",
        ) from error
    return module


def _build(build: Callable[..., Any], options: WorkloadOptions) -> nn.Module:
    """The module in evaluation mode.

    Raises:
        ArgumentTypeError: The module cannot be quantized (`require_model`).
        ModelError: The function fails, or returns something else.
    """
    with torch.inference_mode(False), seeded_rng(options.seed):
        try:
            module = build()
        except QdqError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"{options.model} fails: {describe_user_error(error)}.",
                "call it in python to see the whole error, or pass -v.",
            ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{options.model} returns a {type(module).__name__}; expected a torch module.",
            "return the network.",
        )
    require_model(module)
    return module.eval()


def _divide(
    make_batches: Callable[..., Any], options: WorkloadOptions
) -> tuple[list[Any], list[Any]]:
    """Batches to calibrate and to evaluate on; no batch is in both.

    Raises:
        DataError: The function fails, returns no batches, or too few.
    """
    try:
        with seeded_rng(options.seed):
            batches = make_batches()
            require_batches(batches)
            iterator = iter(batches)
            calibration = list(itertools.islice(iterator, options.calib_batches))
            evaluation = _take(iterator, options.eval_samples)
    except QdqError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(
            f"{options.data} fails: {describe_user_error(error)}.",
            "call it in python to see the whole error, or pass -v.",
        ) from error
    if not evaluation:
        raise DataError(
            f"{options.data} returns {len(calibration)} batches, and all of them are to calibrate on: "
            f"--calib-batches is {options.calib_batches}.",
            "return more batches, or lower --calib-batches: the others are to evaluate on.",
        )
    return calibration, evaluation


def _take(batches: Iterable[Any], num_samples: int) -> list[Any]:
    """The first samples of some batches; the last batch is cut."""
    taken: list[Any] = []
    for batch in batches:
        taken.append(take_samples(batch, num_samples))
        num_samples -= count_samples(batch)
        if num_samples <= 0:
            break
    return taken


def _gives_classes(module: nn.Module, batch: Any, options: WorkloadOptions) -> bool:
    """Whether the network has one output `[N, classes]`. It is run here so that it fails before any work.

    Raises:
        ModelError: Its forward fails.
        QdqError: The batch is not what its forward takes.
    """
    sample = take_samples(batch, 1)
    with evaluating(module):
        try:
            result = call_model(module, sample)
        except QdqError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"{options.model} fails on the first sample of {options.data}: "
                f"{describe_user_error(error)}.",
                "call the network on a batch in python to see the whole error, or pass -v.",
            ) from error
    outputs = list(name_outputs(result).values())
    return len(outputs) == 1 and outputs[0].dim() == 2


def _list_classes(batches: Sequence[Any]) -> list[int] | None:
    """The class of each sample, if every batch has whole numbers `[N]` for labels; else None."""
    classes: list[int] = []
    for batch in batches:
        labels = find_labels(batch)
        is_tensor = isinstance(labels, torch.Tensor) and not labels.is_floating_point()
        if not is_tensor or labels.shape != (count_samples(batch),):
            return None
        classes += labels.tolist()
    return classes
