"""Distiller's sample for image classifiers: its options, log lines and files, and from there to an int8 engine.

python recipes/compress_classifier.py -a efficientnet_lite0 --qe-calibration 0.5
python recipes/compress_classifier.py -a efficientnet_lite0 --evaluate --quantize-eval --qe-per-channel \
    --qe-calibration 0.5 --export-onnx model.onnx
python recipes/compress_classifier.py /data/imagenet -a resnet18 --exp-load-weights-from resnet18.pth \
    --evaluate --quantize-eval --qe-config-file resnet18_post_train.yaml
python recipes/compress_classifier.py /data/imagenet -a resnet18 --exp-load-weights-from resnet18.pth \
    --compress resnet18_train.yaml --epochs 10 --lr 0.0001
"""

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import qdq
from qdq.cli.main import run_command
from qdq.device import find_device, move_batch, without_tf32
from qdq.distiller import (
    KnowledgeDistillation,
    PostTrainLinearQuantizer,
    QuantizedCheckpoint,
    QuantizerMetadata,
    Scores,
    TrainingLog,
    TrainOptions,
    collect_histograms,
    collect_quant_stats,
    convert_to_pytorch,
    describe_arguments,
    fold_simulated_batchnorm,
    modularize,
    override_layers,
    ptq_coordinate_search,
    read_checkpoint,
    read_compress_file,
    read_post_training,
    read_statistics,
    rebuild_model,
    save_checkpoint,
    save_histogram_images,
    save_histograms,
    save_layer_quant_params,
    save_statistics,
    train_compressed,
)
from qdq.distiller.command import log
from qdq.distiller.command.options import Options
from qdq.distiller.command.quantize_options import QuantizeOptions
from qdq.distiller.command.run_options import ExportOptions, ModelOptions, TrainingOptions
from qdq.distiller.files import checkpoint as checkpoints
from qdq.distiller.files import file_kinds
from qdq.distiller.post_training.torch_int8 import require_int8
from qdq.distiller.statistics import histogram_images, histograms
from qdq.distiller.statistics.portion import MOST_PER_BATCH
from qdq.distiller.statistics.records import ModelStatistics
from qdq.distiller.training.compress_file import CompressPlan
from qdq.errors import DataError, ExportError, ModelError, StateError
from qdq.files import guard_files
from qdq.forward import evaluating
from qdq.quantizer import named_quantizers
from qdq.seeds import seeded_rng
from qdq.systems import to_tensorrt
from qdq.systems.input_ranges import calibrate_inputs
from qdq.trt.backend import Backend
from qdq.weights import load_plain
from qdq.workloads.classification.batches import ImageBatches
from qdq.workloads.classification.models import LoadedModel
from qdq.workloads.classification.sets import (
    EvaluationSets,
    TrainingSets,
    load_evaluation_sets,
    load_training_sets,
    take_crops,
    take_images,
)

logger = logging.getLogger("qdq.compress_classifier")

PACKAGED = "efficientnet_lite0"
DEFAULT_PORTION = 0.05  # of the calibration images
SCALES = ("output_scale", "output_zero_point", "w_scale", "w_zero_point")
JOURNAL_FILE = "lapq_journal.jsonl"  # in the folder of all runs: the next run continues from it
TRAINING_FOLDER = "training"
TRAINED_FILE = "checkpoint.pth.tar"


def choose_device(options: ModelOptions) -> torch.device:
    """The CPU, or the first of the GPUs."""
    if options.deterministic:
        torch.backends.cudnn.deterministic = True
    if options.cpu:
        return qdq.choose_device("cpu")
    if options.gpus is None:
        return qdq.choose_device()
    return qdq.choose_device(f"cuda:{options.gpus.split(',')[0]}")


def choose_builder(options: ExportOptions, device: torch.device) -> Backend:
    """TensorRT for the wanted GPU."""
    return qdq.find_backend("auto", options.sm, gpu_sm=qdq.find_sm(device))


def load_classifier(arch: str, pretrained: bool, checkpoint: Path | None, seed: int) -> LoadedModel:
    """A float classifier with weights of this machine, or random ones; nothing is downloaded."""
    arch = arch.lower()
    if checkpoint is not None:
        return qdq.load_model(arch, str(checkpoint.absolute()), seed)
    if arch == PACKAGED:
        return qdq.load_model(arch)
    if pretrained:
        return qdq.load_model(arch, find_published(arch), seed)
    return qdq.load_model(arch, "random", seed)


def find_published(arch: str) -> str:
    """The name of the weights that Distiller took as pretrained, if their file is in torch's folder."""
    from torchvision.models import get_model_weights

    entry = next(iter(get_model_weights(arch)))
    file = Path(torch.hub.get_dir(), "checkpoints", entry.url.rpartition("/")[2])
    if not file.is_file():
        raise ModelError(
            f"the published weights of {arch} are not on this machine: there is no {file}.",
            "put the file there, or pass a checkpoint to --exp-load-weights-from.",
        )
    return str(entry.name)


def read_resumed(options: Options) -> QuantizedCheckpoint | None:
    """The quantized model of `--resume-from`; None if that is a float one, the folder of a training, or left out."""
    file, arch = options.model.resume_from, options.model.arch.lower()
    if file is None:
        return None
    if file.is_dir():
        if options.training.compress is None:
            raise ModelError(
                f"{file} is a folder; expected a checkpoint.",
                "pass a .pth.tar file in it; to continue a training, repeat its --compress.",
            )
        return None
    content = load_plain(file)
    if not isinstance(content, Mapping) or "quantizer_metadata" not in content:
        return None
    checkpoint = read_checkpoint(file)
    if checkpoint.arch not in (None, arch):
        raise ModelError(
            f"{file} is of {checkpoint.arch}, and --arch is {arch}.", f"pass -a {checkpoint.arch}."
        )
    if options.quantize.quantize_eval:
        raise StateError(
            f"{file} is quantized already, by {checkpoint.metadata.type}.",
            "leave out --quantize-eval to evaluate it.",
        )
    return checkpoint


def load_float(options: ModelOptions, resumed: QuantizedCheckpoint | None) -> LoadedModel:
    """The float classifier; its weights do not matter if those of a quantized one follow."""
    file = options.exp_load_weights_from
    if file is None and resumed is None and options.resume_from and options.resume_from.is_file():
        file = options.resume_from
    net = load_classifier(options.arch, options.pretrained, file, options.seed or 0)
    if net.weights.startswith("random") and resumed is None:
        logger.warning(
            "%s has random weights; pass --pretrained or --exp-load-weights-from", net.name
        )
    return net


def load_images(data: Path | None, net: LoadedModel, options: Options) -> EvaluationSets:
    """The images to calibrate and to test on."""
    images = options.images
    sets = load_evaluation_sets(data, net, images.batch_size, options.model.seed or 0)
    needs_labels = options.model.evaluate or options.training.compress
    if needs_labels and sets.test.labels is None:
        raise DataError(
            f"the accuracy cannot be measured: {sets.test.label_note}.", "give labelled images."
        )
    calibration = take_images(sets.calibration, images.effective_train_size)
    return EvaluationSets(
        calibration=replace(calibration, batch_size=min(images.batch_size, MOST_PER_BATCH)),
        test=take_images(sets.test, images.effective_test_size),
    )


def load_training_images(
    data: Path | None, net: LoadedModel, options: Options
) -> TrainingSets | None:
    """The images to train and to validate on; None without `--compress`."""
    if options.training.compress is None:
        return None
    images, seed = options.images, options.model.seed or 0
    sets = load_training_sets(data, net, images.validation_split, images.batch_size, seed)
    validation = sets.validation
    if validation is not None:
        validation = take_images(validation, images.effective_valid_size)
    return TrainingSets(take_crops(sets.training, images.effective_train_size), validation)


def make_example(net: LoadedModel) -> torch.Tensor:
    """Two images of noise."""
    size = net.preprocess.crop_size
    with seeded_rng(0):
        return torch.randn(2, 3, size, size)


def evaluate(
    model: nn.Module, images: ImageBatches, print_freq: int, title: str = log.TEST
) -> dict[str, float]:
    """Loss, Top1 and Top5 of a model, with Distiller's lines."""
    logger.info(title)
    logger.info(log.SAMPLES, images.num_images, images.batch_size)
    scores = Scores()
    device = find_device(model)
    num_whole = images.num_images // images.batch_size  # as Distiller counts
    with torch.no_grad(), evaluating(model), without_tf32():
        for step, (batch, labels) in enumerate(tqdm(images, unit="batch", disable=None), 1):
            scores.add(model(move_batch(batch, device)), labels)
            if step % print_freq == 0:
                logger.info(log.format_progress(scores.read(), step, max(step, num_whole)))
    means: dict[str, float] = scores.read()
    logger.info(log.SCORES, means["Top1"], means["Top5"], means["Loss"])
    return means


def collect(
    model: nn.Module, images: ImageBatches, portion: float, folder: Path
) -> ModelStatistics:
    """Collect statistics on a portion of the calibration images, and save them."""
    logger.info(log.COLLECTING, log.format_portion(portion), "calibration")
    statistics: ModelStatistics = collect_quant_stats(model, take_images(images, portion))
    path = save_statistics(folder / file_kinds.STATISTICS_FILE, statistics)
    logger.info(log.STATS_SAVED, path)
    return statistics


def draw_histograms(model: nn.Module, images: ImageBatches, portion: float, folder: Path) -> None:
    """Save histograms of all activations, and pictures of them if matplotlib is there."""
    statistics = collect(model, images, portion, folder)
    counted = collect_histograms(model, take_images(images, portion), statistics)
    path = save_histograms(folder / histograms.FILE, counted)
    logger.info("Histograms saved to %s", path)
    if histogram_images.can_draw():
        save_histogram_images(folder, counted)
    else:
        logger.warning("no pictures of the histograms: matplotlib is not installed")


def make_quantizer(
    model: nn.Module, options: QuantizeOptions, statistics: ModelStatistics | Path | None
) -> PostTrainLinearQuantizer:
    """The quantizer that the configuration or the options describe."""
    if options.qe_config_file is not None:
        configured: PostTrainLinearQuantizer = read_post_training(options.qe_config_file).build(
            model
        )
        return configured
    return PostTrainLinearQuantizer(
        model,
        bits_activations=options.qe_bits_acts,
        bits_parameters=options.qe_bits_wts,
        bits_accum=options.qe_bits_accum,
        overrides=override_layers(options.qe_no_clip_layers, options.qe_no_quant_layers),
        mode={"activations": options.mode_acts, "weights": options.mode_wts},
        clip_acts=options.qe_clip_acts.upper(),
        per_channel_wts=options.qe_per_channel,
        model_activation_stats=statistics,
        clip_n_stds=options.qe_clip_n_stds,
        scale_approx_mult_bits=options.qe_scale_approx_bits,
        save_fp_weights=options.qe_save_fp_weights,
    )


def prepare_quantizer(
    model: nn.Module, sets: EvaluationSets, options: Options, folder: Path
) -> PostTrainLinearQuantizer:
    """The quantizer with the statistics that it needs."""
    settings = options.quantize
    statistics: ModelStatistics | Path | None = settings.qe_stats_file
    if not (settings.qe_dynamic or settings.qe_stats_file or settings.qe_config_file):
        portion = settings.qe_calibration or DEFAULT_PORTION
        statistics = collect(model, sets.calibration, portion, folder)
    quantizer = make_quantizer(model, settings, statistics)
    if options.search.qe_lapq and quantizer.model_activation_stats is None:
        collected = collect(model, sets.calibration, DEFAULT_PORTION, folder)
        quantizer.model_activation_stats = collected
    return quantizer


def quantize(
    model: nn.Module, example: torch.Tensor, sets: EvaluationSets, options: Options, folder: Path
) -> nn.Module:
    """Quantize a float model after training, evaluate it, and save it with all that builds it again."""
    settings = options.quantize
    quantizer = prepare_quantizer(model, sets, options, folder)
    float_statistics = quantizer.model_activation_stats
    if options.search.qe_lapq:
        scores = search(quantizer, example, sets, options)
        save_settings(quantizer, folder)
    else:
        quantizer.prepare_model(example)
        save_settings(quantizer, folder)
        if options.export.file is not None:
            warn_of_refusal(quantizer.model, options.export.export_convert)
        evaluated = quantizer.model
        if settings.qe_convert_pytorch:
            evaluated = convert_to_pytorch(evaluated, settings.qe_pytorch_backend)
        scores = evaluate(evaluated, sets.test, options.images.print_freq)

    arguments = describe_arguments(quantizer, float_statistics)
    metadata = QuantizerMetadata(type(quantizer).__name__, arguments, example)
    checkpoint = QuantizedCheckpoint(
        quantizer.model.state_dict(),
        metadata,
        arch=options.model.arch.lower(),
        extras={"quantized_top1": scores["Top1"]},
    )
    save(checkpoint, folder / checkpoints.FILE)
    return model


def warn_of_refusal(model: nn.Module, convert: bool) -> None:
    """Say before the evaluation what the export will refuse, such as asymmetric modes in overrides of a file."""
    try:
        to_tensorrt(copy.deepcopy(model), convert=convert)
    except ExportError as error:
        logger.warning("--export-onnx will be refused: %s", error.message.replace("\n", "; "))
        if not convert:
            logger.warning("--export-convert sets new symmetric ranges in the place of zero points")


def save(checkpoint: QuantizedCheckpoint, file: Path) -> None:
    """Save a quantized model."""
    logger.info(log.SAVING_CHECKPOINT, file)
    save_checkpoint(file, checkpoint)


def search(
    quantizer: PostTrainLinearQuantizer,
    example: torch.Tensor,
    sets: EvaluationSets,
    options: Options,
) -> dict[str, float]:
    """Quantize a model by LAPQ, and return the scores of its best scales."""
    scores: dict[str, float] = {}
    portion = log.format_portion(options.search.lapq_eval_size)
    logger.info(
        "LAPQ searches on %s of the test images: Top1 on them is better than on new images", portion
    )

    def test(model: nn.Module) -> dict[str, float]:
        scores.update(evaluate(model, sets.test, options.images.print_freq))
        return scores

    ptq_coordinate_search(
        quantizer,
        example,
        sets.test,
        options.search.as_lapq(options.model.seed or 0),
        test=test,
        path=options.model.out_dir / JOURNAL_FILE,
    )
    return scores


def save_settings(quantizer: PostTrainLinearQuantizer, folder: Path) -> None:
    """Save the statistics after preparation, and the settings and scales of each layer."""
    if quantizer.model_activation_stats is not None:
        path = save_statistics(
            folder / file_kinds.PREPARED_STATISTICS_FILE, quantizer.model_activation_stats
        )
        logger.info(log.UPDATED_STATS_SAVED, path)
    settings = {name: layer.settings for name, layer in quantizer.layers.items()}
    scales = {}
    for name, tensor in quantizer.model.state_dict().items():
        if name.rpartition(".")[2] in SCALES:
            scales[name] = tensor
    path = save_layer_quant_params(folder / file_kinds.PARAMETERS_FILE, settings, scales)
    logger.info(log.PARAMETERS_SAVED, path)


def read_plan(options: TrainingOptions) -> CompressPlan:
    """The training that the file of `--compress` describes."""
    assert options.compress is not None  # noqa: S101  # the caller has asked
    plan: CompressPlan = read_compress_file(options.compress)
    if plan.quantizer is None:
        raise DataError(
            f"{options.compress} has no policy of a quantizer.",
            "add one; a network that stays float needs no quantizer.",
        )
    return plan


def load_teacher(
    options: TrainingOptions, seed: int, device: torch.device
) -> KnowledgeDistillation | None:
    """The teacher of a training; None if there is none."""
    if options.kd_teacher is None:
        return None
    net = load_classifier(options.kd_teacher, options.kd_pretrained, options.kd_resume, seed)
    return KnowledgeDistillation(
        net.module.to(device),
        temperature=options.kd_temperature,
        distill_wt=options.kd_distill_wt,
        student_wt=options.kd_student_wt,
        start_epoch=options.kd_start_epoch,
    )


def find_training_folder(options: ModelOptions, folder: Path) -> Path:
    """Where the state of a training is: in the run that is continued, or in this one."""
    resumed = options.resume_from
    if resumed is not None and resumed.is_dir():
        folder = resumed
    return folder / TRAINING_FOLDER


def train(
    model: nn.Module, example: torch.Tensor, sets: TrainingSets, options: Options, folder: Path
) -> None:
    """Train a model as the file of `--compress` says, and save it."""
    training, print_freq, seed = (
        options.training,
        options.images.print_freq,
        options.model.seed or 0,
    )
    plan = read_plan(training)
    optimizer = torch.optim.SGD(
        model.parameters(),
        training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    with TrainingLog(sets.training, model, print_freq) as batches:

        def validate(model: nn.Module) -> float:
            if sets.validation is None or not batches.has_begun:
                return math.nan  # ranges that have seen no batch are not measured
            title = log.VALIDATE % batches.epoch
            return evaluate(model, sets.validation, print_freq, title)["Top1"]

        train_options = TrainOptions(
            training.epochs,
            teaching=load_teacher(training, seed, find_device(model)),
            metric=validate if sets.validation else None,
            begin_phase=batches.begin_phase,
            folder=find_training_folder(options.model, folder),
            seed=seed,
        )
        train_compressed(model, optimizer, batches, plan, train_options, example)
    config = plan.quantizer
    assert config is not None  # noqa: S101  # `read_plan` has asked
    metadata = QuantizerMetadata(config.class_name, config.arguments, example)
    checkpoint = QuantizedCheckpoint(
        model.state_dict(), metadata, arch=options.model.arch.lower(), epoch=training.epochs
    )
    save(checkpoint, folder / TRAINED_FILE)


def export_engine(
    model: nn.Module,
    example: torch.Tensor,
    sets: EvaluationSets,
    options: ExportOptions,
) -> int:
    """Export a quantized model to ONNX, check the file, and build an engine of it; 1 if there are findings."""
    file = options.file
    assert file is not None  # noqa: S101  # the caller has asked
    backend = choose_builder(options, find_device(model))
    images = sets.test.subset(qdq.CHECKED_SAMPLES)
    logits = {"emulation": qdq.predict(model, images)}

    fold_simulated_batchnorm(model)
    transfer = to_tensorrt(model, convert=options.export_convert)
    if any(quantizer.amax is None for _, quantizer in named_quantizers(model)):
        calibrate_inputs(model, sets.calibration)
    logits["to TensorRT"] = qdq.predict(model, images)

    qdq.export_onnx(model, example, file)
    logits["ONNX"] = qdq.predict(file, images)
    check = qdq.check_onnx(
        file,
        expected=logits["to TensorRT"],
        found=logits["ONNX"],
        found_default=qdq.predict(file, images, session="default"),
        tie_floor_db=qdq.measure_tie_floor(model, images),
    )
    build = qdq.build_engine(file, backend=backend.name, sm=backend.sm)
    evaluation = qdq.evaluate_outputs(logits, images.labels)
    tables = [transfer.format_summary()]
    tables += [report.format_table() for report in (check, build, evaluation)]
    for line in "\n".join(tables).splitlines():
        logger.info("%s", line)
    return int(bool(check.problems or build.missing_int8))


def check_files(options: Options, device: torch.device) -> None:
    """Refuse files that cannot be read, or would be lost, before any work."""
    settings, training, file = options.quantize, options.training, options.export.file
    inputs = [options.model.exp_load_weights_from, options.model.resume_from, training.kd_resume]
    inputs += [settings.qe_stats_file, settings.qe_config_file, training.compress]
    guard_files(inputs=inputs, outputs=[file])
    if settings.qe_config_file is not None:
        read_post_training(settings.qe_config_file)
    if settings.qe_stats_file is not None:
        read_statistics(settings.qe_stats_file)
    if training.compress is not None:
        read_plan(training)
    if settings.qe_convert_pytorch:
        require_int8(settings.qe_pytorch_backend, device)
    if file is not None:
        choose_builder(options.export, device)


def collect_only(model: nn.Module, sets: EvaluationSets, options: Options, folder: Path) -> bool:
    """Collect histograms or statistics if that is all that is to be done."""
    portion = options.images.activation_histograms
    if portion is not None:
        draw_histograms(model, sets.calibration, portion, folder)
        return True
    portion = options.quantize.qe_calibration
    if portion is not None and not options.quantize.quantize_eval:
        collect(model, sets.calibration, portion, folder)
        return True
    return False


def log_sizes(sets: EvaluationSets, training: TrainingSets | None) -> None:
    """The line with the number of images in each set."""
    if training is None:
        logger.info(log.DATASET_SIZES, sets.test.num_images)
        return
    num_validation = training.validation.num_images if training.validation else 0
    num_training = training.training.num_images
    logger.info(log.ALL_DATASET_SIZES, num_training, num_validation, sets.test.num_images)


def compress_classifier(
    data: Path | None = None,
    /,
    *,
    options: Options = Options(),  # noqa: B008  # frozen
) -> int:
    """Quantize a classifier after training or in training, with the options of Distiller's sample.

    Args:
        data: A folder with one folder per class, with or without train and val above them; packaged photographs if
            left out.
        options: All other options.
    """
    # Invalid options and files are refused here, before any work.
    options.check()
    device = choose_device(options.model)
    check_files(options, device)
    resumed = read_resumed(options)
    net = load_float(options.model, resumed)
    example = make_example(net)
    training_sets = load_training_images(data, net, options)
    sets = load_images(data, net, options)

    with log.logging_run(options.model.name, options.model.out_dir) as folder:
        model: nn.Module = modularize(net.module, example).to(device)
        if resumed is not None:
            model = rebuild_model(model, resumed)
        if collect_only(model, sets, options, folder):
            return 0

        log_sizes(sets, training_sets)
        if training_sets is not None:
            train(model, example, training_sets, options, folder)
        if options.quantize.quantize_eval:
            model = quantize(model, example, sets, options, folder)
        else:
            evaluate(model, sets.test, options.images.print_freq)

        if options.export.file is None:
            return 0
        return export_engine(model, example, sets, options.export)


if __name__ == "__main__":
    run_command(compress_classifier)
