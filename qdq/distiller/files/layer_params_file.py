"""`layer_quant_params.yaml`: how each layer was quantized, with all scales and zero points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qdq.device import copy_to_host
from qdq.distiller.files.file_kinds import PARAMETERS_KEY
from qdq.distiller.files.plain import to_plain
from qdq.distiller.files.yaml_text import write_yaml
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.files import as_path, guard_files, write_atomic


def save_layer_quant_params(
    path: Path | str,
    settings: Mapping[str, LayerSettings],
    linear_quant_params: Mapping[str, torch.Tensor],
) -> Path:
    """Write the settings of all layers, and their scales and zero points, as YAML, atomically.

    Args:
        path: The file.
        settings: Name of a layer -> its settings.
        linear_quant_params: Name such as `conv1.w_scale` -> one value, or one for each channel, which is a list in the
            file.

    Raises:
        ArgumentError: It cannot be written.
    """
    path = as_path(path, "path")
    guard_files(outputs=[path])
    content = {name: to_plain(layer, name) for name, layer in settings.items()}
    params = {}
    on_host = copy_to_host(list(linear_quant_params.values()))
    for name, tensor in zip(linear_quant_params, on_host, strict=True):
        values = tensor.flatten().tolist()
        params[name] = values if len(values) > 1 else values[0]
    return write_atomic(path, write_yaml(content | {PARAMETERS_KEY: params}, flow=True))
