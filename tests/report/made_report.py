"""Reports of runs that never ran: as many layers as asked for, with names of one's choice."""

import random

from qdq.files import to_jsonable
from qdq.report.load import REPORT_FORMAT
from qdq.report.records import HISTOGRAM_COLUMNS
from qdq.trt.census import LayerCensus

METHODS = (
    "max",
    "percentile",
    "entropy",
    "mse",
    "average_max",
    "mean_std",
    "laplace",
    "gauss",
    "moving_average",
)


TUNING = {
    "losses": [1 / (1 + step) for step in range(120)],
    "best_step": 120,
    "text": "120 steps\n  step  metric",
    "curve": [
        {"step": step, "metric": 20.0 + step / 60, "loss": None, "lr": 1e-4}
        for step in (0, 60, 120)
    ],
}


def make_tensor(name, role, amax, numbers):
    is_weight = role == "weight"
    return {
        "quantizer": f"{name}._{role}_quantizer",
        "role": role,
        "is_on": True,
        "amax": amax,
        "least_amax": amax / 3,
        "ranges": 64 if is_weight else 1,
        "method": "max" if is_weight else "mse",
        "sqnr_db": numbers.uniform(20, 50),
        "clipped": numbers.random() / 100,
        "methods": {}
        if is_weight
        else {
            method: {"amax": amax * numbers.uniform(0.5, 1.1), "clipped": numbers.random() / 50}
            for method in METHODS
        },
        "histogram": []
        if is_weight
        else [numbers.randrange(10**7) for _ in range(HISTOGRAM_COLUMNS)],
        "histogram_end": None if is_weight else 1.1 * amax,
        "shares": [],
        "unknown": {"methods": "of weights", "histogram": "of weights"} if is_weight else {},
    }


def make_layer(name, place, names, *, precision="int8", gain=None, numbers):
    sensitivity = None
    if gain is not None:
        sensitivity = {
            "unit": name,
            "layers": [name],
            "rank": place + 1,
            "units": len(names),
            "gain": gain,
            "low": 0.8 * gain,
            "high": 1.2 * gain,
            "sqnr_db": 40 - gain,
            "is_exact": True,
        }
    return {
        "name": name,
        "kind": "Conv2d",
        "is_call": False,
        "precision": precision,
        "reason": "Conv2d is in the map (R-CONV-2)",
        "rules": ["R-CONV-2"],
        "tensors": [
            make_tensor(name, "input", 2.0 + place, numbers),
            make_tensor(name, "weight", 0.5, numbers),
        ],
        "sensitivity": sensitivity,
        "output_sqnr_db": 33.0,
        "macs": 10**6,
        "macs_share": 1 / len(names),
        "weights": 36864,
        "weight_bytes": 36864,
        "engine": precision,
        "kernels": [f"{name}/Conv_myl0_{place}"],
        "engine_note": "",
        "reads": [names[place - 1]] if place else [],
        "feeds": names[place + 1 : place + 2],
        "reads_input": place == 0,
        "writes_output": place == len(names) - 1,
        "unknown": {} if sensitivity else {"sensitivity": "pinned layers are not measured"},
    }


def make_report(names, *, float_layers=(), seed=0, **changes):
    """A report as `json.load` would give it; `changes` replace sections."""
    numbers = random.Random(seed)  # noqa: S311
    layers = [
        make_layer(
            name,
            place,
            names,
            precision="float" if name in float_layers else "int8",
            gain=3 / (place + 1),
            numbers=numbers,
        )
        for place, name in enumerate(names)
    ]
    census = [
        LayerCensus(
            name,
            f"{name}/Conv",
            "Conv",
            name not in float_layers,
            name not in float_layers,
            "kernel",
            "",
            "Float" if name in float_layers else "Int8",
            "Float" if name in float_layers else "Int8",
        )
        for name in names
    ]
    sizes = [
        {
            "name": f"{name}/Conv",
            "module": name,
            "op_type": "Conv",
            "int8": True,
            "reason": "",
            "macs": 10**6,
            "share": 1 / len(names),
            "promised": "Int8",
            "expected": "Int8",
        }
        for name in names
    ]
    steps = [
        {
            "layer": name,
            "sqnr_db": 20.0 + number,
            "metric": 0.25 + number / 8,
            "layers": [name],
            "cost": None,
        }
        for number, name in enumerate(float_layers)
    ]
    candidates = [
        {
            "name": "float",
            "top1": 0.8,
            "top5": 0.9,
            "agreement": 1.0,
            "sqnr_db": None,
            "megabytes": 40.0,
        },
        {
            "name": "ONNX",
            "top1": 0.79,
            "top5": 0.9,
            "agreement": 0.97,
            "sqnr_db": 21.5,
            "megabytes": 10.0,
        },
    ]
    return to_jsonable(
        {
            "format": REPORT_FORMAT,
            "model": "made, random",
            "data": {"calibration": "8 images", "evaluation": "100 images", "labels": "made up"},
            "summary": {
                "weighted_layers": len(names),
                "weighted_layers_swapped": len(names),
                "missed_modules": [],
                "float_layers": list(float_layers),
                "layers_without_range": [],
                "onnx_megabytes": 10.0,
                "engine_megabytes": 12.0,
                "census_expected_int8": len(names) - len(float_layers),
                "census_missing_int8": [],
                "int8_macs": 1 - len(float_layers) / max(len(names), 1),
                "candidates": {candidate["name"]: candidate for candidate in candidates},
            },
            "findings": [],
            "evaluation": {"images": 100, "candidates": candidates},
            "analysis": {
                "mode": "one-at-a-time",
                "images": 32,
                "sqnr_db": 18.0,
                "metric": None,
                "steps": steps,
                "stopped_by": "enough",
                "metric_name": "sqnr",
                "pinned": {},
                "pareto": [],
                "layers": [],
            },
            "fold": [],
            "swap": {"modules": []},
            "rewire": {"operations": [], "shared": {}},
            "calibration": [],
            "export": {},
            "check": {"path": "runs/made/model.onnx", "findings": []},
            "build": {
                "backend": "rtx",
                "backend_version": "1.7",
                "sm": 89,
                "engine_bytes": 12_000_000,
                "seconds": 1.0,
                "layers": census,
                "coverage": {"layers": sizes},
                "trtexec": {"tensorrt10": "trtexec --onnx=m"},
                "warnings": [],
            },
            "layers": layers,
            "command": "qdq ptq --model made",
            "settings": {"model": "made", "exclude": []},
            "seed": 0,
            "environment": {"qdq": "0.1.0"},
            "seconds": {"calibrate": 1.5},
            **changes,
        }
    )
