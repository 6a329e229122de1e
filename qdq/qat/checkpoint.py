"""Files of fine-tuning: the model, and the state from which a killed run goes on. safetensors, whole or absent."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from qdq.calibrate.collect import bytes_of, format_of
from qdq.errors import DataError, ModelError
from qdq.files import as_path, read_file, write_atomic
from qdq.forward import require_model
from qdq.quantize import from_log2
from qdq.quantizer import named_quantizers
from qdq.schema import digest_parts, parse_json
from qdq.text import printable

MODEL_FORMAT = "qdq fine-tuned model 2"  # 1 did not say the formats
STATE_FORMAT = "qdq fine-tuning state 1"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> Path:
    """Write tensors and what belongs to them as one file, atomically.

    Args:
        path: The file.
        tensors: By name; tied ones are written once for each name.
        facts: What JSON can hold; it stands in the metadata of the file.

    Raises:
        ArgumentError: The folder cannot be written to.
    """
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return write_atomic(
        path, save(own, {"qdq": json.dumps(facts | {"digest": _digest(own, facts)})})
    )


def load_tensors(
    path: Path, form: str, read: Callable[[Path], bytes] = read_file
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Args:
        path: The file.
        form: What the entry "format" of its facts must be.
        read: What gives its content.

    Raises:
        DataError: The file cannot be read, or is of another kind.
    """
    fix = "give a file that finetune wrote, or remove it and begin again."
    try:
        content = read(path)
        tensors = load(content)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {path}: {printable(error, 100)}.", fix) from error
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
    metadata = parse_json(header, f"the header of {path}", fix).get("__metadata__", {})
    facts = parse_json(
        metadata.get("qdq", "{}"), f"the metadata of {path}", fix, finite=False
    )  # of a loss, say
    if not isinstance(facts, dict) or facts.get("format") != form:
        raise DataError(
            f"{path} is no {form!r} file.", "give a file that this version of finetune wrote."
        )
    digest = facts.pop("digest", None)  # of earlier versions there is none
    if digest is not None and digest != _digest(tensors, facts):
        raise DataError(f"{path} is damaged: its digest is not that of its content.", fix)
    return tensors, facts


def _digest(tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> str:
    parts = {
        f"{name} {tensor.dtype} {list(tensor.shape)}": bytes_of(tensor)
        for name, tensor in tensors.items()
    }
    return digest_parts(json.loads(json.dumps(facts)), parts)


def save_tuned(model: nn.Module, path: Path | str, facts: dict[str, Any] | None = None) -> Path:
    """Write weights and ranges of a quantized model, the formats of its quantizers, and which of them are off.

    Args:
        model: A calibrated model.
        path: Ends in `.safetensors`; the keys in it are those of the state dict.
        facts: What else to say about it.

    Raises:
        ArgumentError: The folder cannot be written to.
    """
    require_model(model)
    disabled = [name for name, quantizer in named_quantizers(model) if not quantizer.is_enabled]
    known = {"format": MODEL_FORMAT, "disabled": disabled, "quantizers": _describe_formats(model)}
    return save_tensors(as_path(path, "path"), plain_state(model), known | (facts or {}))


def _describe_formats(model: nn.Module) -> dict[str, list[Any]]:
    """Width, unsigned, narrow range and axis of each quantizer, and the one that has its range."""
    names = {quantizer: name for name, quantizer in named_quantizers(model)}
    formats = {q: astuple(known) if (known := format_of(q)) else () for q in names}
    return {name: [*formats[q], q.axis, names.get(q.leader)] for q, name in names.items()}


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with ranges as buffers, also while they are learned; copies."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    learned = [name for name in state if name.endswith("._log2_amax")]
    return state | {
        name.replace("._log2_amax", "._amax"): from_log2(state.pop(name)) for name in learned
    }


def load_tuned(model: nn.Module, path: Path | str) -> dict[str, Any]:
    """Give a model the weights, ranges and float layers that `save_tuned` or `finetune` wrote, in place.

    Args:
        model: The model, folded, swapped and rewired as it was then; it need not be calibrated.
        path: The file.

    Returns:
        What else the file says: step and metric.

    Raises:
        DataError: The file cannot be read, or is of another kind.
        ModelError: It is of another model; nothing is changed then.
    """
    require_model(model)
    tensors, facts = load_tensors(as_path(path, "path"), MODEL_FORMAT)
    _require_same(_describe_formats(model), facts["quantizers"], path)
    quantizers = dict(named_quantizers(model))
    state = {
        name: tensor for name, tensor in model.state_dict().items() if not name.endswith("._amax")
    }
    weights = {
        name: tensor
        for name, tensor in tensors.items()
        if name.rpartition("._amax")[0] not in quantizers
    }
    require_same_shapes(state, weights, path)
    for name, amax in tensors.items():
        if (own := model.state_dict().get(name)) is not None and own.numel() != amax.numel():
            require_same_shapes({name: own}, {name: amax}, path)
    model.load_state_dict(tensors, strict=False)
    for name, quantizer in quantizers.items():
        quantizer.is_enabled = name not in facts["disabled"]
    return {
        key: value
        for key, value in facts.items()
        if key not in ("format", "disabled", "quantizers")
    }


def require_same_shapes(
    own: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], path: Path | str
) -> None:
    """Refuse a file whose tensors have other names or shapes than those of the model.

    Raises:
        ModelError: With the first of them.
    """
    shapes, others = (
        {name: list(tensor.shape) for name, tensor in of.items()} for of in (own, theirs)
    )
    _require_same(shapes, others, path)


def _require_same(own: Mapping[str, Any], theirs: Mapping[str, Any], path: Path | str) -> None:
    """Refuse a file in which a name is missing, is too many or stands for something else.

    Raises:
        ModelError: With the first of them.
    """
    different = sorted(
        name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)
    )
    if different:
        first = different[0]
        more = f" and {len(different) - 1} more differ" if len(different) > 1 else ""
        raise ModelError(
            f"{path} is of another model: {first} is {theirs.get(first, 'absent')} there, "
            f"{own.get(first, 'absent')} here{more}.",
            "fold, swap and rewire the model, with the same formats, as before fine-tuning.",
        )


def pack_random() -> dict[str, torch.Tensor]:
    """The state of the random numbers of Python, numpy and torch."""
    version, words, gauss = random.getstate()
    assert version == 3  # noqa: S101  # since Python 3.2
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)  # noqa: S101
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy position": torch.tensor(numpy_state["state"]["pos"]),
        "gauss": torch.tensor(
            [np.nan if gauss is None else gauss, numpy_state["gauss"]], dtype=torch.float64
        ),
        "numpy has gauss": torch.tensor(numpy_state["has_gauss"]),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def unpack_random(tensors: Mapping[str, torch.Tensor]) -> None:
    """Undo `pack_random`."""
    python_gauss, numpy_gauss = tensors["gauss"].tolist()
    random.setstate(
        (3, tuple(tensors["python"].tolist()), None if math.isnan(python_gauss) else python_gauss)
    )
    key, position = tensors["numpy"].numpy().astype(np.uint32), int(tensors["numpy position"])
    np.random.set_state(("MT19937", key, position, int(tensors["numpy has gauss"]), numpy_gauss))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


@contextmanager
def keeping_random_state(generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Random numbers, those of the generators too, go on after the block as if it had drawn none."""
    before, states = pack_random(), [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        unpack_random(before)
        for generator, state in states:
            generator.set_state(state)
