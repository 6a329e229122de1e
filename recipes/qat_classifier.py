"""Fine-tuning of a quantized image classifier: from trained weights to a checked int8 engine, labels or not.

python recipes/qat_classifier.py
torchrun --nproc-per-node 4 recipes/qat_classifier.py --model resnet50 --data-dir /data/imagenet --loss both
"""

from pathlib import Path
from typing import Annotated, Literal

import qdq
from qdq.cli.calibrate import CalibMethod
from qdq.cli.main import NonNegativeInt, Parameter, PositiveInt, UInt32, run_command
from qdq.cli.refusals import check_layers, check_tuning


def qat_classifier(
    *,
    model: str = "efficientnet_lite0",
    weights: str = "DEFAULT",
    data_dir: Path | None = None,
    output: Path = Path("runs/qat"),
    exclude: tuple[str, ...] = (),
    plan: Path | None = None,
    calib_method: CalibMethod = "mse",
    calib_batches: PositiveInt = 8,
    eval_images: PositiveInt = 500,
    max_float_layers: NonNegativeInt = 0,
    loss: Literal["distill", "labels", "both"] = "distill",
    ranges: Literal["frozen", "lsq", "pact", "ema"] = "frozen",
    layers: tuple[str, ...] | None = None,
    schedule: Annotated[qdq.Schedule, Parameter(name="*")] = qdq.Schedule(),  # noqa: B008  # frozen
    amp: bool = False,
    tensorboard: bool = False,
    batch_size: PositiveInt = 16,
    sm: int = 89,
    seed: UInt32 = 0,
) -> int:
    """Quantize a classifier, fine-tune what is in int8, export, check and build it; the same call goes on when killed.

    Args:
        model: efficientnet_lite0 (its weights are packaged) or any torchvision classifier.
        weights: DEFAULT, a torchvision name, random, or the path of a checkpoint.
        data_dir: ImageFolder, with train and val or without; the packaged photographs if left out.
        output: Run folder.
        exclude: Layers to keep in float: dotted names, globs or re:EXPRESSION.
        plan: YAML of an earlier run, perhaps edited: the layers that it names run as it says.
        calib_method: How the range of an activation is solved; best: per layer what costs its output least.
        calib_batches: Batches to calibrate on.
        eval_images: Images to evaluate on.
        max_float_layers: At most so many layers are left in float after the analysis.
        loss: The float model teaches the quantized one (no labels), the labels do, or both (then the last weights).
        ranges: Ranges stay as calibrated, are learned (lsq, pact), or follow the data (ema).
        layers: Layers to train alone, named as in exclude; left out: all.
        schedule: Length and learning rates.
        amp: Compute in bfloat16 where torch.autocast does so.
        tensorboard: Write the curves into the run folder for TensorBoard.
        batch_size: Images a batch.
        sm: Compute capability to build for: 75, 80, 86, 89, 120 or 121.
        seed: Of weights, crops and the choice of images.
    """
    settings = dict(locals())
    qdq.check_run_folder(output, settings)
    backend = qdq.find_backend("auto", sm)
    pinned = qdq.load_plan(plan) if plan else None
    net = qdq.load_model(model, weights, seed)
    check_layers(net, exclude=exclude, plan=pinned, layers=layers)
    calib_images = calib_batches * batch_size
    training = qdq.load_training_images(
        data_dir, net, None, calib_images, eval_images, batch_size, seed
    )
    check_tuning(loss, training.labels, schedule, tensorboard=tensorboard)
    calib, images = qdq.load_images(data_dir, net, calib_images, eval_images, batch_size, seed)
    run = qdq.start_run(output, seed=seed, settings=settings)
    collected, journal, file = (
        run.folder / n for n in ("calibration.safetensors", "analysis.jsonl", "model.onnx")
    )
    run.stage("float")
    logits, example, subset = (
        {"float": qdq.predict(net.module, images)},
        calib.images[:2],
        calib.subset(32),
    )
    run.stage("fold, swap, rewire")
    folded = qdq.fold_batchnorm(net.module, example)
    swapped = qdq.swap_modules(net.module, example, exclude=exclude)
    rewired = qdq.rewire_operations(net.module, example, exclude=exclude)
    run.stage("calibrate")
    solved = qdq.calibrate_model(net.module, calib, method=calib_method, statistics=collected)
    logits["calibrated"] = qdq.predict(net.module, images)
    run.stage("analyze")
    analysis = qdq.analyze_layers(
        net.module, subset, pinned=pinned, max_float_layers=max_float_layers, path=journal
    )
    qdq.save_plan(analysis.plan, run.folder / "plan.yaml")
    run.stage("fine-tune")
    tuned = qdq.finetune(
        net.module,
        training,
        loss=None if loss == "distill" else qdq.cross_entropy,
        ranges=ranges,
        seed=seed,
        distillation=None if loss == "labels" else qdq.Distillation(),
        layers=layers,
        schedule=schedule,
        amp=amp,
        held=subset if loss == "distill" else None,
        folder=run.folder / "tuning",
        tensorboard=tensorboard,
    )
    if not run.is_first:
        return 0  # torchrun: only the first process goes on
    logits["fine-tuned"] = qdq.predict(net.module, images)
    run.stage("export and check")
    onnx = qdq.export_onnx(
        net.module, example, file, calibration=solved, plan=swapped, rewired=rewired
    )
    logits["ONNX"], floor = (
        qdq.predict(onnx.path, images),
        qdq.measure_tie_floor(net.module, images.subset(128)),
    )
    by_default = qdq.predict(onnx.path, images, session="default")
    check = qdq.check_onnx(
        onnx.path,
        expected=logits["fine-tuned"],
        found=logits["ONNX"],
        found_default=by_default,
        tie_floor_db=floor,
    )
    run.stage("build")
    engine = qdq.build_engine(onnx.path, backend=backend.name, sm=sm)
    table = qdq.evaluate_outputs(
        logits, images.labels, files={"float": net.module, "ONNX": onnx.path}
    )
    stages = (folded, swapped, rewired, solved, analysis, onnx, check, engine, table)
    return qdq.write_report(run, net, calib, images, *stages, tuning=tuned).exit_code


if __name__ == "__main__":
    run_command(qat_classifier)
