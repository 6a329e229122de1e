"""What two processes do with runs that differ or fail in one of them: python process_cases.py OUT."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from tuned_run import joined_group, make_images, make_model, make_switched

import qdq
import qdq.qat.record
from qdq.distributed import gather_bytes

RANK = int(os.environ["RANK"])
BATCHES = [make_images(8, seed) for seed in range(5)]
UNEVEN = [make_images(size, size) for size in (8, 7, 3)]
LEARNING = qdq.Schedule(steps=10, lr=1e-3, range_lr=1e-2, max_norm=1e-3)
FOLDER = Path(sys.argv[1]).parent


def tune(model=None, batches=BATCHES, **options):
    model = make_model(8) if model is None else model
    options = {"schedule": qdq.Schedule(steps=10, lr=1e-3)} | options
    tuning = qdq.finetune(model, batches, **options)
    return {
        "losses": tuning.losses,
        "metrics": [m.metric for m in tuning.curve],
        "best": tuning.best_step,
        "stopped": tuning.stopped,
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
    }


def only_second(value, otherwise=None):
    return value if RANK == 1 else otherwise


def changed(change):
    """A model that the second process has changed."""
    model = make_model(8)
    if RANK == 1:
        with torch.no_grad():
            change(model)
    return model


class Breaking:
    """Batches of which one cannot be read."""

    def __init__(self, at, rank=1):
        self.at, self.rank = at, rank

    def __len__(self):
        return len(BATCHES)

    def __iter__(self):
        for number, batch in enumerate(BATCHES * 4):
            if number == self.at and self.rank == RANK:
                raise OSError("the disk is gone")
            yield batch


def mean_square(outputs, _):
    return outputs.square().mean()


def broken_share():
    """NaN in the last sample of the third batch, which is in the share of the second process."""
    batches = [batch.clone() for batch in BATCHES]
    batches[2][-1] = math.nan
    return batches


def metric_of_rank():
    """The second process would have other thoughts about what is best."""
    count = iter(range(100))
    return lambda model: [1, 3, 2, 2.5, 0, 0, 0][next(count)] if RANK == 0 else next(count)


def raises():
    raise ValueError("not today")


def raises_in_second(*_):
    return raises() if RANK == 1 else torch.zeros((), requires_grad=True)


NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."


def run_out_of_memory(*_):
    """In the second process, as torch says it on a GPU."""
    if RANK == 1:
        raise torch.OutOfMemoryError(NO_MEMORY + "\nAnd more lines.")
    return torch.zeros((), requires_grad=True)


def run_out_for_good(*_):
    """In the second process, which then gets no memory for what it sends."""
    if RANK == 1:
        for name in ("cat", "zeros_like", "stack"):
            patch.object(torch, name, run_out_of_memory).start()
    return run_out_of_memory()


def tune_without_memory(loss):
    try:
        return tune(loss=loss, distillation=None)
    finally:
        patch.stopall()


class Large(nn.Module):
    """A layer that needs more memory than there is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, inputs):
        run_out_of_memory()
        return self.layer(inputs)


def calibrate_without_memory():
    model = Large()
    qdq.swap_modules(model)
    qdq.calibrate_model(model, [torch.randn(3, 16)] * 4)


def save_in_first(*_):
    if RANK == 0:
        raise qdq.ArgumentError("cannot write: the disk is full.", "make room.")


def live_batchnorm(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)
    ).eval()
    qdq.swap_modules(model)
    qdq.calibrate_model(model, BATCHES[:1])
    return tune(model, schedule=qdq.Schedule(steps=4), **options)


def cases():
    yield "alike", lambda: tune(held=BATCHES[:1])
    yield "other weights", lambda: tune(changed(lambda model: model[0].weight.mul_(2)))
    yield "other range", lambda: tune(changed(lambda model: model[0].input_quantizer.amax.mul_(2)))
    yield "a layer off", lambda: tune(changed(lambda model: model[0]._input_quantizer.disable()))
    yield (
        "other options",
        lambda: tune(schedule=qdq.Schedule(steps=10, lr=only_second(1e-4, 1e-3)), amp=RANK == 1),
    )
    yield "other batches", lambda: tune(batches=BATCHES[RANK:])
    yield "other length", lambda: tune(batches=BATCHES[: 5 - RANK], schedule=qdq.Schedule())
    yield "held in one", lambda: tune(held=only_second(BATCHES[:1]))
    yield (
        "no range",
        lambda: tune(changed(lambda model: model[0]._input_quantizer._buffers.pop("_amax"))),
    )
    yield "folder", lambda: tune(folder=only_second(FOLDER / "run", Path("/dev/null/run")))
    yield (
        "metric of rank",
        lambda: tune(
            metric=metric_of_rank(),
            measure_every=1,
            schedule=qdq.Schedule(steps=10, lr=1e-3, patience=3),
        ),
    )
    yield "metric fails", lambda: tune(metric=raises_in_second)
    yield "loader fails", lambda: tune(batches=Breaking(3))
    yield (
        "loader of the first fails as ranges stop",
        lambda: tune(
            batches=Breaking(8, rank=0), ranges="lsq", schedule=qdq.Schedule(steps=10, lr=1e-3)
        ),
    )
    yield "loss fails", lambda: tune(loss=raises_in_second)
    yield "no memory in the step", lambda: tune_without_memory(run_out_of_memory)
    yield "no memory to say so", lambda: tune_without_memory(run_out_for_good)
    yield "no memory in the metric", lambda: tune(metric=run_out_of_memory)
    yield "no memory in calibration", calibrate_without_memory
    yield "nan", lambda: tune(batches=broken_share())
    finite = {"loss": lambda outputs, _: outputs.nan_to_num().square().mean(), "distillation": None}
    yield "nan in a range", lambda: tune(batches=broken_share(), ranges="ema", **finite)
    yield "save fails", lambda: tune(folder=FOLDER / "full")
    yield "live batchnorm", live_batchnorm
    yield "learned ranges", lambda: tune(batches=UNEVEN, ranges="lsq", schedule=LEARNING)
    yield "switched", lambda: tune(*make_switched(), loss=mean_square, distillation=None)
    yield (
        "ranges that follow",
        lambda: tune(batches=[(1 + n) * batch for n, batch in enumerate(BATCHES)], ranges="ema"),
    )


def main():
    torch.set_num_threads(1)
    found = {}
    with joined_group():
        for name, case in cases():
            found[name] = run_case(name, case)
            # Both are at the same place, and can still speak.
            assert len(set(gather_bytes(name.encode()))) == 1
    Path(f"{sys.argv[1]}.{RANK}").write_text(json.dumps(found))


def run_case(name, case):
    """What it gives, or the error that it ends with."""
    with contextlib.ExitStack() as exits:
        if name == "save fails":
            exits.enter_context(patch.object(qdq.qat.record, "_SAVE_SECONDS", -1.0))
            exits.enter_context(patch.object(qdq.qat.record.Record, "save", save_in_first))
        try:
            return case()
        except Exception as error:
            return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
