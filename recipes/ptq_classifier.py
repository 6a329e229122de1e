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
    device: str | None = None,
    sm: int | None = None,
    seed: UInt32 = 0,
) -> int:
    """Quantize a classifier, leave its most sensitive layers in float, then export, check and build it.

    Args:
        model: efficientnet_lite0, whose weights are packaged, or the name of a torchvision classifier.
        weights: DEFAULT, another torchvision name, random, or the path of a checkpoint.
        data_dir: A folder with one folder per class, with or without train and val above them; packaged photographs
            if left out.
        output: Run folder. Files of an earlier run in it are removed first; a folder with other files is refused.
        exclude: Layers to keep in float: dotted names, globs or re:EXPRESSION.
        plan: The plan.yaml of an earlier run, which you may edit. The layers that it names run as it says.
        calib_method: How the range of an activation is computed; best selects, for each layer, the method with the
            smallest error of its output.
        calib_batches: Batches to calibrate on.
        eval_images: Images to evaluate on.
        analysis_images: Calibration images for the sensitivity analysis.
        analysis: Options of the sensitivity analysis.
        precision: Type of the float layers in the exported file.
        batch_size: Images per batch.
        device: Where the model runs: cpu, cuda or cuda:N. By default a GPU if there is one.
        sm: Compute capability to build for: 75, 80, 86, 89, 120 or 121. By default that of the device, on a CPU 89.
        seed: Seed of random weights, crops and the choice of images.
    """
    settings = dict(locals())

    # Invalid options are refused here, before any work.
    qdq.check_run_folder(output, settings)
    run_device = qdq.choose_device(device)
    backend = qdq.find_backend("auto", sm, gpu_sm=qdq.find_sm(run_device))
    analysis_options = analysis.as_arguments()
    pinned = None
    if plan is not None:
        pinned = qdq.load_plan(plan)
    net = qdq.load_model(model, weights, seed)
    check_layers(
        net,
        exclude=exclude,
        plan=pinned,
        groups=analysis_options["groups"],
        profile=analysis_options["profile"],
    )
    calibration, images = qdq.load_images(
        data_dir, net, calib_batches * batch_size, eval_images, batch_size, seed
    )
    analysis.check_labels(calibration.labels)
    run = qdq.start_run(
        output, seed=seed, settings=settings, device=qdq.describe_device(run_device)
    )

    run.stage("float")
    net.module.to(run_device)
    logits = {}
    logits["float"] = qdq.predict(net.module, images)

    run.stage("fold, swap, rewire")
    example = calibration.images[:2]
    folded = qdq.fold_batchnorm(net.module, example)
    swap_plan = qdq.swap_modules(net.module, example, exclude=exclude)
    rewired = qdq.rewire_operations(net.module, example, exclude=exclude)

    run.stage("calibrate")
    ranges = qdq.calibrate_model(
        net.module, calibration, method=calib_method, statistics=run.statistics_file
    )
    logits["all int8"] = qdq.predict(net.module, images)

    run.stage("analyze")
    analysis_result = qdq.analyze_layers(
        net.module,
        calibration.subset(analysis_images),
        pinned=pinned,
        path=run.journal_file,
        **analysis_options,
    )
    qdq.save_plan(analysis_result.plan, run.plan_file)
    logits["mixed"] = qdq.predict(net.module, images)

    run.stage("export and check")
    exported = qdq.export_onnx(
        net.module,
        example,
        run.model_file,
        precision=precision,
        calibration=ranges,
        plan=swap_plan,
        rewired=rewired,
    )
    logits["ONNX"] = qdq.predict(exported.path, images)
    default_logits = qdq.predict(exported.path, images, session="default")
    tie_floor_db = qdq.measure_tie_floor(net.module, images, expected=logits["mixed"])
    check = qdq.check_onnx(
        exported.path,
        expected=logits["mixed"],
        found=logits["ONNX"],
        found_default=default_logits,
        tie_floor_db=tie_floor_db,
    )

    run.stage("build")
    build = qdq.build_engine(exported.path, backend=backend.name, sm=backend.sm)
    evaluation = qdq.evaluate_outputs(
        logits, images.labels, files={"float": net.module, "ONNX": exported.path}
    )

    report = qdq.write_report(
        run,
        model=net,
        calibration=calibration,
        images=images,
        folded=folded,
        plan=swap_plan,
        rewired=rewired,
        ranges=ranges,
        analysis=analysis_result,
        exported=exported,
        check=check,
        build=build,
        evaluation=evaluation,
    )
    return report.exit_code


if __name__ == "__main__":
    run_command(ptq_classifier)
