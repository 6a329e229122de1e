"""The options of `compress_classifier.py` for the run, the images and the training, under Distiller's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UInt32


@Parameter(name="*")
@dataclass(frozen=True)
class ModelOptions:
    """The model and where it runs.

    Args:
        arch: efficientnet_lite0, whose weights are packaged, or the name of a torchvision classifier.
        pretrained: Take the published weights, if they are on this machine. Nothing is downloaded.
        exp_load_weights_from: Take the weights of this checkpoint.
        resume_from: Continue with this checkpoint: a quantized model, or a training that was stopped.
        evaluate: Evaluate on the test images.
        cpu: Run on the CPU.
        gpus: Numbers of GPUs, such as 0,1. The first one is used.
        deterministic: Compute the same bits in every run.
        seed: Seed of the images, the training and random weights. By default 0.
        name: Begins the name of the run folder.
        out_dir: Folder of the run folders.
    """

    arch: Annotated[str, Parameter(alias="-a")] = "resnet18"
    pretrained: bool = False
    exp_load_weights_from: Path | None = None
    resume_from: Path | None = None
    evaluate: Annotated[bool, Parameter(alias="-e")] = False
    cpu: bool = False
    gpus: str | None = None
    deterministic: Annotated[bool, Parameter(alias="--det")] = False
    seed: UInt32 | None = None
    name: Annotated[str | None, Parameter(alias="-n")] = None
    out_dir: Annotated[Path, Parameter(alias="-o")] = Path("logs")


@Parameter(name="*")
@dataclass(frozen=True)
class ImageOptions:
    """The images and the lines about them.

    Args:
        batch_size: Images per batch; at most 128 while statistics are collected.
        workers: Accepted for older scripts. Images are decoded by as many threads as there are processors.
        print_freq: Batches between two lines.
        validation_split: Fraction of the training images on which each epoch is validated.
        effective_train_size: Fraction of the training images that is used.
        effective_valid_size: Fraction of the validation images that is used.
        effective_test_size: Fraction of the test images that is used.
        activation_histograms: Collect histograms of the activations on this fraction of the calibration images, save
            them, and do nothing else.
    """

    batch_size: Annotated[PositiveInt, Parameter(alias="-b")] = 256
    workers: Annotated[NonNegativeInt, Parameter(alias="-j")] = 4
    print_freq: Annotated[PositiveInt, Parameter(alias="-p")] = 10
    validation_split: Annotated[float, Parameter(alias=("--valid-size", "--vs"))] = 0.1
    effective_train_size: Annotated[float, Parameter(alias="--etrs")] = 1.0
    effective_valid_size: Annotated[float, Parameter(alias="--evs")] = 1.0
    effective_test_size: Annotated[float, Parameter(alias="--etes")] = 1.0
    activation_histograms: Annotated[float | None, Parameter(alias="--act-hist")] = None


@Parameter(name="*")
@dataclass(frozen=True)
class TrainingOptions:
    """The training of a quantized model.

    Args:
        compress: YAML file with a quantizer and its schedule.
        epochs: Epochs.
        lr: Learning rate at the start.
        momentum: Momentum of the optimizer, SGD.
        weight_decay: L2 penalty on the parameters.
        kd_teacher: Architecture of a teacher, whose outputs are learned too. Named as for --arch.
        kd_pretrained: Take the published weights of the teacher, if they are on this machine.
        kd_resume: Take the weights of the teacher from this checkpoint.
        kd_temperature: Temperature of the outputs.
        kd_distill_wt: Weight of the loss between student and teacher.
        kd_student_wt: Weight of the loss between student and labels.
        kd_start_epoch: First epoch with a teacher.
    """

    compress: Path | None = None
    epochs: PositiveInt = 90
    lr: Annotated[PositiveFloat, Parameter(alias="--learning-rate")] = 0.1
    momentum: NonNegativeFloat = 0.9
    weight_decay: Annotated[NonNegativeFloat, Parameter(alias="--wd")] = 1e-4
    kd_teacher: str | None = None
    kd_pretrained: bool = False
    kd_resume: Path | None = None
    kd_temperature: Annotated[PositiveFloat, Parameter(alias="--kd-temp")] = 1.0
    kd_distill_wt: Annotated[NonNegativeFloat, Parameter(alias="--kd-dw")] = 0.5
    kd_student_wt: Annotated[NonNegativeFloat, Parameter(alias="--kd-sw")] = 0.5
    kd_start_epoch: NonNegativeInt = 0


@Parameter(name="*")
@dataclass(frozen=True)
class ExportOptions:
    """The way to an engine.

    Args:
        export_onnx: Export the quantized model to this file, check it and build an engine of it. Without a name, the
            file is model.onnx.
        export_convert: Also take what TensorRT int8 does not have, such as zero points; it gets new symmetric ranges.
        sm: Compute capability to build for: 75, 80, 86, 89, 120 or 121. By default that of the device, on a CPU 89.
    """

    export_onnx: Annotated[bool | Path | None, Parameter(negative=())] = None
    export_convert: bool = False
    sm: int | None = None

    @property
    def file(self) -> Path | None:
        """The file of the export; None if nothing is exported."""
        if isinstance(self.export_onnx, Path):
            return self.export_onnx
        return Path("model.onnx") if self.export_onnx else None
