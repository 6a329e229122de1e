"""Post-training quantization of an image classifier: from trained weights to a checked int8 engine.

python recipes/ptq_classifier.py
python recipes/ptq_classifier.py --model resnet50 --weights my.pth --data-dir /data/imagenet --exclude fc
"""

from pathlib import Path
from typing import Literal

import qdq
from qdq.cli.analyze import AnalysisOptions
from qdq.cli.calibrate import CalibMethod
from qdq.cli.main import PositiveInt, UInt32, run_command
from qdq.cli.refusals import check_layers


def ptq_classifier(
    *,
    model: str = "efficientnet_lite0",
    weights: str = "DEFAULT",
    data_dir: Path | None = None,
    output: Path = Path("runs/ptq"),
    exclude: tuple[str, ...] = (),
    plan: Path | None = None,
    calib_method: CalibMethod = "mse",
    calib_batches: PositiveInt = 8,
    eval_images: PositiveInt = 500,
    analysis_images: PositiveInt = 32,
    analysis: AnalysisOptions = AnalysisOptions(),
    precision: Literal["fp32", "fp16"] = "fp32",
    batch_size: PositiveInt = 16,
    sm: int = 89,
    seed: UInt32 = 0,
) -> int:
    """Quantize a classifier, leave its most sensitive layers in float, export, check and build it.

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
        analysis_images: Calibration images to measure the sensitivity on.
        analysis: How the analysis ranks and chooses.
        precision: What is not int8 is exported in this type.
        batch_size: Images a batch.
        sm: Compute capability to build for: 75, 80, 86, 89, 120 or 121.
        seed: Of weights, crops and the choice of images.
    """
    settings = dict(locals())
    qdq.check_run_folder(output, settings)
    backend = qdq.find_backend("auto", sm)
    options = analysis.as_arguments()
    pinned = qdq.load_plan(plan) if plan else None
    net = qdq.load_model(model, weights, seed)
    check_layers(
        net, exclude=exclude, plan=pinned, groups=options["groups"], profile=options["profile"]
    )
    calib, images = qdq.load_images(
        data_dir, net, calib_batches * batch_size, eval_images, batch_size, seed
    )
    analysis.check_labels(calib.labels)
    run = qdq.start_run(output, seed=seed, settings=settings)
    run.stage("float")
    logits, example = {"float": qdq.predict(net.module, images)}, calib.images[:2]
    run.stage("fold, swap, rewire")
    folded = qdq.fold_batchnorm(net.module, example)
    swapped = qdq.swap_modules(net.module, example, exclude=exclude)
    rewired = qdq.rewire_operations(net.module, example, exclude=exclude)
    run.stage("calibrate")
    ranges = qdq.calibrate_model(
        net.module, calib, method=calib_method, statistics=run.folder / "calibration.safetensors"
    )
    logits["all int8"] = qdq.predict(net.module, images)
    run.stage("analyze")
    subset = calib.subset(analysis_images)
    journal = run.folder / "analysis.jsonl"
    found = qdq.analyze_layers(net.module, subset, pinned=pinned, path=journal, **options)
    qdq.save_plan(found.plan, run.folder / "plan.yaml")
    logits["mixed"] = qdq.predict(net.module, images)
    run.stage("export and check")
    file = run.folder / "model.onnx"
    onnx = qdq.export_onnx(
        net.module,
        example,
        file,
        precision=precision,
        calibration=ranges,
        plan=swapped,
        rewired=rewired,
    )
    logits["ONNX"], floor = (
        qdq.predict(onnx.path, images),
        qdq.measure_tie_floor(net.module, images.subset(128)),
    )
    by_default = qdq.predict(onnx.path, images, session="default")
    check = qdq.check_onnx(
        onnx.path,
        expected=logits["mixed"],
        found=logits["ONNX"],
        found_default=by_default,
        tie_floor_db=floor,
    )
    run.stage("build")
    engine = qdq.build_engine(onnx.path, backend=backend.name, sm=sm)
    table = qdq.evaluate_outputs(
        logits, images.labels, files={"float": net.module, "ONNX": onnx.path}
    )
    stages = (folded, swapped, rewired, ranges, found, onnx, check, engine, table)
    return qdq.write_report(run, net, calib, images, *stages).exit_code


if __name__ == "__main__":
    run_command(ptq_classifier)
