"""Files of fine-tuning: the model, and the state from which a killed run resumes. safetensors, written atomically."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import Linear

from qdq.calibrate.collect import bytes_of, format_of
from qdq.device import find_device
from qdq.errors import DataError, ModelError
from qdq.files import as_path, read_file, write_atomic
from qdq.formats import FP8_BITS
from qdq.forward import require_model
from qdq.nn.width import ADDED_KEY, read_added, resize_layer, undoing_widths
from qdq.quantize import from_log2
from qdq.quantizer import named_quantizers
from qdq.schema import digest_parts, parse_json
from qdq.text import printable

MODEL_FORMAT = "qdq fine-tuned model 2"  # version 1 did not hold the formats
STATE_FORMAT = "qdq fine-tuning state 1"
_FIX = "give a file that finetune wrote, or remove it and start again."
_DESCRIBED = ("num_bits", "unsigned", "narrow_range", "axis", "leader")
_FORMAT_FACTS = ("format", "disabled", "quantizers")  # the facts that every model file has


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> Path:
    """Write tensors and facts about them as one file, atomically.

    Args:
        path: The file.
        tensors: By name; tied ones are written once for each name.
        facts: JSON values; they are stored in the metadata of the file.

    Raises:
        ArgumentError: The folder cannot be written to.
    """
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    metadata = {"qdq": json.dumps(facts | {"digest": _digest(copies, facts)})}
    return write_atomic(path, save(copies, metadata))


def load_tensors(
    path: Path, form: str, read: Callable[[Path], bytes] = read_file
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file that `save_tensors` wrote.

    Args:
        path: The file.
        form: The value that the entry "format" of its facts must have.
        read: Returns the content of a file.

    Raises:
        DataError: The file cannot be read, is damaged, or is another kind of file.
    """
    try:
        content = read(path)
        tensors = load(content)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {path}: {printable(error, 100)}.", _FIX) from error
    facts = _read_facts(content, path)
    if not isinstance(facts, dict) or facts.get("format") != form:
        raise DataError(
            f"{path} is not a {form!r} file.", "give a file that this version of finetune wrote."
        )
    digest = facts.pop("digest", None)  # files of earlier versions have none
    if digest is not None and digest != _digest(tensors, facts):
        raise DataError(f"{path} is damaged: its digest is not that of its content.", _FIX)
    return tensors, facts


def _read_facts(content: bytes, path: Path) -> Any:
    """The facts in the metadata of a safetensors file, which follows the 8 bytes of its length."""
    length = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + length].decode(), f"the header of {path}", _FIX)
    metadata = header.get("__metadata__", {})
    text = metadata.get("qdq", "{}")
    return parse_json(text, f"the metadata of {path}", _FIX, finite=False)  # a loss may be NaN


def select_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with a prefix, without it."""
    selected = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = tensor
    return selected


def _digest(tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> str:
    parts = {}
    for name, tensor in tensors.items():
        parts[f"{name} {tensor.dtype} {list(tensor.shape)}"] = bytes_of(tensor)
    return digest_parts(json.loads(json.dumps(facts)), parts)


def save_tuned(model: nn.Module, path: Path | str, facts: dict[str, Any] | None = None) -> Path:
    """Write weights and ranges of a quantized model, the formats of its quantizers, and which of them are disabled.

    Args:
        model: A calibrated model.
        path: Ends in `.safetensors`; it has the keys of the state dict.
        facts: More facts to store.

    Raises:
        ArgumentError: The folder cannot be written to.
    """
    require_model(model)
    disabled = [name for name, quantizer in named_quantizers(model) if not quantizer.is_enabled]
    model_facts = {
        "format": MODEL_FORMAT,
        "disabled": disabled,
        "quantizers": _describe_formats(model),
    }
    return save_tensors(as_path(path, "path"), plain_state(model), model_facts | (facts or {}))


def _describe_formats(model: nn.Module) -> dict[str, list[Any]]:
    """Width, unsigned, narrow range and axis of each quantizer, and the name of the one that holds its range.

    They are values of JSON, so that those of a model and of a file can be compared.
    """
    names = {quantizer: name for name, quantizer in named_quantizers(model)}
    descriptions: dict[str, list[Any]] = {}
    for quantizer, name in names.items():
        fmt = format_of(quantizer)
        fields: tuple[Any, ...] = ()
        if fmt is not None:
            num_bits = list(FP8_BITS) if fmt.is_float else fmt.num_bits
            fields = (num_bits, fmt.unsigned, fmt.narrow_range)
        descriptions[name] = [*fields, quantizer.axis, names.get(quantizer.leader)]
    return descriptions


def _list_changed_formats(
    present: Mapping[str, list[Any]], in_file: Mapping[str, list[Any]]
) -> dict[str, list[Any]]:
    """The descriptions in a file of quantizers that are int8 in the model and FP8 in the file, or the reverse.

    Such a model is of the same layers: `choose_formats` has changed one of them.
    """
    changed = {}
    for name, description in in_file.items():
        here = present.get(name, [])
        if len(here) != len(description) or len(description) != len(_DESCRIBED):
            continue
        differing = {
            field
            for field, value, other in zip(_DESCRIBED, here, description, strict=True)
            if value != other
        }
        widths = [here[0], description[0]]
        is_int8_or_fp8 = all(width in (8, list(FP8_BITS)) for width in widths)
        if "num_bits" in differing and differing <= {"num_bits", "axis"} and is_int8_or_fp8:
            changed[name] = description
    return changed


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict, with ranges as buffers even while they are learned."""
    state = {}
    learned = {}
    for name, tensor in model.state_dict().items():
        copied = tensor.detach().clone()
        if name.endswith("._log2_amax"):
            learned[name.replace("._log2_amax", "._amax")] = from_log2(copied)
        else:
            state[name] = copied
    return state | learned


def load_tuned(model: nn.Module, path: Path | str) -> dict[str, Any]:
    """Give a model the weights, ranges and float layers that `save_tuned` or `finetune` wrote, in place.

    A layer without a bias gets one if `correct_bias` had given it one, and a layer that `split_channels` had made wider
    becomes as wide. A quantizer that is int8 here and was FP8 there becomes FP8, and the reverse, so a model in which
    `choose_formats` chose is loaded into one that is just swapped.

    Args:
        model: The model, folded, swapped and rewired as before fine-tuning; it need not be calibrated.
        path: The file.

    Returns:
        The other facts in the file: step and metric.

    Raises:
        DataError: The file cannot be read, or is another kind of file.
        ModelError: It is of another model; `model` is then unchanged.
    """
    require_model(model)
    tensors, facts = load_tensors(as_path(path, "path"), MODEL_FORMAT)
    present = _describe_formats(model)
    changed = _list_changed_formats(present, facts["quantizers"])
    _require_same(present | changed, facts["quantizers"], path)
    quantizers = dict(named_quantizers(model))
    biases = _list_new_biases(model, tensors)
    widths = _list_new_widths(model, tensors)
    names = {layer: name for name, layer in model.named_modules()}
    with undoing_widths(layer for layer, _, _ in widths):
        for layer, outputs, inputs in widths:
            resize_layer(layer, outputs, inputs)
        state = {**model.state_dict(), **biases}
        for name in changed:
            state.pop(f"{name}._amax", None)  # a range of the other format
        widened = {f"{names[layer]}._weight_quantizer" for layer, _, _ in widths}
        widened &= quantizers.keys()  # a layer may be in float
        for name in widened:
            state.pop(f"{name}._amax", None)  # ranges of fewer channels
        _require_fit(state, tensors, list(quantizers), path)
        for name in widened:
            quantizers[name].set_format(quantizers[name].num_bits, quantizers[name].axis)
    for name, (num_bits, _, _, axis, leader) in changed.items():
        if leader == name:
            quantizers[name].set_format(8 if num_bits == 8 else FP8_BITS, axis)
    for name in biases:
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.bias = nn.Parameter(torch.zeros_like(tensors[name], device=find_device(model)))
    model.load_state_dict(tensors, strict=False)
    for name, quantizer in quantizers.items():
        quantizer.is_enabled = name not in facts["disabled"]
    return {key: value for key, value in facts.items() if key not in _FORMAT_FACTS}


def _list_new_biases(
    model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The biases that `correct_bias` gave to layers without one."""
    biases = {}
    layers = dict(model.named_modules())
    for name, tensor in tensors.items():
        layer, _, attribute = name.rpartition(".")
        if attribute == "bias" and getattr(layers.get(layer), "bias", tensor) is None:
            biases[name] = tensor
    return biases


def _list_new_widths(
    model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> list[tuple[nn.Module, int, int]]:
    """The layers that `split_channels` had made wider than they are here, and how many outputs and inputs they lack."""
    widths: list[tuple[nn.Module, int, int]] = []
    layers = dict(model.named_modules())
    for name, added in tensors.items():
        layer_name, _, key = name.rpartition(".")
        if key != ADDED_KEY or layer_name not in layers:
            continue
        layer = layers[layer_name]
        if not isinstance(layer, _ConvNd | Linear):
            continue
        outputs, inputs = (added.cpu() - read_added(layer)).tolist()
        if min(outputs, inputs) >= 0 < max(outputs, inputs):
            widths.append((layer, outputs, inputs))
    return widths


def _require_fit(
    state: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    quantizers: Sequence[str],
    path: Path | str,
) -> None:
    """Refuse tensors that do not fit a model, whose ranges may not exist yet.

    Raises:
        ModelError: A name or a shape differs.
    """
    range_names = {f"{name}._amax" for name in quantizers}
    weights = {name: tensor for name, tensor in tensors.items() if name not in range_names}
    present = {name: tensor for name, tensor in state.items() if not name.endswith("._amax")}
    require_same_shapes(present, weights, path)
    for name, tensor in tensors.items():
        if name in state and state[name].numel() != tensor.numel():
            require_same_shapes({name: state[name]}, {name: tensor}, path)


def require_same_shapes(
    present: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], path: Path | str
) -> None:
    """Refuse a file whose tensors differ from those of the model in names or shapes.

    Raises:
        ModelError: The message names the first of them.
    """
    _require_same(_list_shapes(present), _list_shapes(tensors), path)


def _list_shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _require_same(present: Mapping[str, Any], in_file: Mapping[str, Any], path: Path | str) -> None:
    """Refuse a file in which a name is missing, unexpected or has another value.

    Raises:
        ModelError: With the first of them.
    """
    names = sorted(present.keys() | in_file.keys())
    different = [name for name in names if present.get(name) != in_file.get(name)]
    if not different:
        return
    first = different[0]
    more = f" and {len(different) - 1} more differ" if len(different) > 1 else ""
    raise ModelError(
        f"{path} is of another model: {first} is {in_file.get(first, 'absent')} there, "
        f"{present.get(first, 'absent')} here{more}.",
        "fold, swap and rewire the model, with the same formats, as before fine-tuning.",
    )


_CPU = torch.device("cpu")


def pack_random(device: torch.device = _CPU) -> dict[str, torch.Tensor]:
    """The state of the random numbers of Python, numpy and torch, as tensors.

    Args:
        device: Its state is packed too, under its type. No other device is touched.
    """
    version, words, gauss = random.getstate()
    assert version == 3  # noqa: S101  # since Python 3.2
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)  # noqa: S101
    python_gauss = math.nan if gauss is None else gauss
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy position": torch.tensor(numpy_state["state"]["pos"]),
        "gauss": torch.tensor([python_gauss, numpy_state["gauss"]], dtype=torch.float64),
        "numpy has gauss": torch.tensor(numpy_state["has_gauss"]),
    }
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state(device)
    return tensors


def unpack_random(tensors: Mapping[str, torch.Tensor], device: torch.device = _CPU) -> None:
    """Restore the state that `pack_random` returned.

    Args:
        tensors: The state, which may be that of a process on another kind of device.
        device: The device whose state is restored, if it is there.
    """
    python_gauss, numpy_gauss = tensors["gauss"].tolist()
    words = tuple(tensors["python"].tolist())
    random.setstate((3, words, None if math.isnan(python_gauss) else python_gauss))
    key = tensors["numpy"].numpy().astype(np.uint32)
    position = int(tensors["numpy position"])
    has_gauss = int(tensors["numpy has gauss"])
    np.random.set_state(("MT19937", key, position, has_gauss, numpy_gauss))
    torch.set_rng_state(tensors["torch"])
    if device.type != "cpu" and device.type in tensors:
        torch.get_device_module(device).set_rng_state(tensors[device.type], device)


@contextmanager
def keeping_random_state(
    generators: Iterable[torch.Generator] = (), device: torch.device = _CPU
) -> Iterator[None]:
    """Restore the state of the random numbers on exit.

    Args:
        generators: Their states are restored too.
        device: Likewise.
    """
    state = pack_random(device)
    generator_states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        unpack_random(state, device)
        for generator, generator_state in generator_states:
            generator.set_state(generator_state)
