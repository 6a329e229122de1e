"""The configuration that a greedy search writes, for `--qe-config-file`."""

from __future__ import annotations

from pathlib import Path

from qdq.distiller.files.quantizer_arguments import describe_arguments
from qdq.distiller.files.quantizer_classes import POST_TRAINING
from qdq.distiller.files.yaml_text import write_yaml
from qdq.distiller.post_training.quantizer import PostTrainLinearQuantizer
from qdq.files import guard_files, write_atomic

_SECTION = "post_train_quantizer"


def save_config(path: Path, quantizer: PostTrainLinearQuantizer, statistics: Path) -> Path:
    """Write the arguments of a quantizer as a configuration, atomically.

    Args:
        path: The file.
        quantizer: The quantizer.
        statistics: The file of its statistics, which the configuration names.

    Raises:
        ArgumentError: It cannot be written.
    """
    guard_files(outputs=[path])
    arguments = {"class": POST_TRAINING, **describe_arguments(quantizer, statistics)}
    return write_atomic(path, write_yaml({"quantizers": {_SECTION: arguments}}))
