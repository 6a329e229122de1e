"""Tasks with their models, data and metrics: one file or package for each task."""

from __future__ import annotations

from qdq.workloads.hf import PREFIX, load_transformers_model
from qdq.workloads.own import is_function_of_file, load_own
from qdq.workloads.workload import Workload, WorkloadOptions


def load_workload(options: WorkloadOptions) -> Workload:
    """Load a model with its data and its metric. The form of the name decides the task.

    | model | task |
    |---|---|
    | `net.py:build` | a network of the user's own, see `own.load_own` |
    | `hf/FOLDER` | a model that transformers has saved, with texts or images, see `hf.load_transformers_model` |
    | `efficientnet_lite0`, `resnet50`, another classifier of torchvision, `timm/NAME` | classification |

    Args:
        options: Model, weights, data, metric and how much data.

    Raises:
        QdqError: An unknown model, or options that do not fit it; the message says which.
    """
    if is_function_of_file(options.model):
        return load_own(options)
    if options.model.startswith(PREFIX):
        return load_transformers_model(options)
    from qdq.workloads.classification.classifier import load_classifier  # needs torchvision

    return load_classifier(options)
