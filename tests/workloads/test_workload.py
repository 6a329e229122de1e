"""Which calibration samples are held out of fine-tuning: many of plentiful data, few of little."""

import pytest
import torch
from torch import nn

from qdq import SampleBatches, Workload, WorkloadOptions, load_workload
from qdq.workloads.sample_batches import ShuffledBatches


@pytest.mark.parametrize(
    ("num_training", "num_calibration", "num_held_out"),
    [(2000, 320, 128), (400, 256, 100), (2000, 128, 64), (128, 128, 32), (40, 40, 20)],
    ids=["128", "a quarter", "half of what calibrates", "32 at least", "a half if few"],
)
def test_samples_are_held_out_of_training(num_training, num_calibration, num_held_out):
    numbers = torch.arange(num_training)
    evaluation = SampleBatches([-numbers], "others")
    calibration = SampleBatches(list(numbers[:num_calibration].split(16)), "the first ones")
    training = ShuffledBatches(list(numbers.split(16)), "all")
    workload = Workload("none", "none", nn.Identity(), calibration, evaluation, lambda: training)
    trained, fitted, held_out = workload.split_training()
    assert torch.cat(list(held_out)).tolist() == list(range(num_held_out))
    assert torch.cat(list(fitted)).tolist() == list(range(num_held_out, num_calibration))
    trained_numbers = torch.cat(list(trained)).tolist()
    assert sorted(trained_numbers) == list(range(num_held_out, num_training))
    assert trained.num_samples == num_training - num_held_out
    _, judged = workload.hold_out()
    assert judged.num_samples == workload.num_held_out == min(32, num_calibration // 2)


def test_no_crop_of_a_photograph_that_judges_is_trained_on():
    pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    workload = load_workload(WorkloadOptions("squeezenet1_1", "random", eval_samples=2))
    trained, fitted, held_out = workload.split_training()
    assert sorted(set(held_out.photographs)) == [0, 1]
    assert sorted(set(fitted.photographs)) == [2, 3, 4, 5, 6, 7]
    assert held_out.num_samples == 32
    assert trained.files == workload.load_training().files[2:]
    assert trained.num_samples == len(set(trained.files)) == 6
    assert trained.num_images == 1024
    images, _ = next(iter(trained))
    assert images.shape[1:] == (3, 224, 224)
