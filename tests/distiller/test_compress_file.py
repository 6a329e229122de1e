"""The YAML file of a training: what it may say, and what is refused."""

import re

import pytest
import torch
from compress_run import TEXT

from qdq.distiller import read_compress_file
from qdq.distiller.training.learning_rates import LR_SCHEDULERS
from qdq.errors import ArgumentError, ArgumentTypeError, DataError, QdqError

GOOD = TEXT.format(name="DorefaQuantizer", bits=4, start=1)


def write(tmp_path, text):
    path = tmp_path / "compress.yaml"
    path.write_text(text)
    return path


def write_rates(tmp_path, scheduler, start=0, end=100, frequency=1):
    return write(
        tmp_path,
        f"lr_schedulers: {{decay: {scheduler}}}\n"
        "policies:\n"
        f"  - {{lr_scheduler: {{instance_name: decay}}, starting_epoch: {start}, ending_epoch: {end},"
        f" frequency: {frequency}}}\n",
    )


def test_a_file_has_a_quantizer_and_rates(tmp_path):
    plan = read_compress_file(write(tmp_path, GOOD))
    assert plan.quantizer.class_name == "DorefaQuantizer"
    assert plan.quantizer.arguments["bits_weights"] == 4
    assert plan.find_start(100) == 1
    assert plan.find_rates(0.1, 4) == pytest.approx([1, 1, 0.1, 0.1])


ARGUMENTS = {
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "CosineAnnealingLR": {"T_max": 8, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"start_factor": 0.1, "total_iters": 5},
    "MultiStepLR": {"milestones": [2, 5], "gamma": 0.2},
    "PolynomialLR": {"total_iters": 8, "power": 2.0},
    "StepLR": {"step_size": 3, "gamma": 0.5},
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_rates_are_those_of_torch(name, tmp_path):
    entry = {"class": name} | ARGUMENTS[name]
    plan = read_compress_file(write_rates(tmp_path, entry))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **ARGUMENTS[name])
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"] / 0.2)
        optimizer.step()
        scheduler.step()
    assert plan.find_rates(0.2, 8) == pytest.approx(expected)


@pytest.mark.parametrize(
    "entry",
    ["{class: ExponentialLR, gamma: 9e-1}", "{class: CosineAnnealingLR, T_max: 4, eta_min: 1e-3}"],
)
def test_numbers_without_a_point_are_numbers(entry, tmp_path):
    """YAML 1.1 has them as text."""
    pointed = entry.replace("9e-1", "0.9").replace("1e-3", "0.001")
    plans = [read_compress_file(write_rates(tmp_path, text)) for text in (entry, pointed)]
    assert plans[0].find_rates(0.2, 8) == plans[1].find_rates(0.2, 8)


def test_a_scheduler_acts_in_the_epochs_of_its_policy(tmp_path):
    halving = {"class": "ExponentialLR", "gamma": 0.5}
    plan = read_compress_file(write_rates(tmp_path, halving, start=2, end=7, frequency=2))
    # After the epochs 2, 4 and 6.
    assert plan.find_rates(1.0, 9) == (1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125)


def test_a_scheduler_that_lowers_the_first_rate_does_so_when_it_starts(tmp_path):
    entry = {"class": "ConstantLR", "factor": 0.5, "total_iters": 2}
    plan = read_compress_file(write_rates(tmp_path, entry, start=2))
    assert plan.find_rates(1.0, 6) == (1, 1, 0.5, 0.5, 1, 1)


@pytest.mark.parametrize("milestones", [3, ["a"], [1.5], [0], [True], {"a": 1}])
def test_milestones_that_are_no_epochs_are_refused(milestones, tmp_path):
    entry = {"class": "MultiStepLR", "milestones": milestones}
    with pytest.raises(ArgumentError, match=r"milestones is .*; expected a list of epochs"):
        read_compress_file(write_rates(tmp_path, entry))


FLAWS = [
    (
        "class: MultiStepLR",
        "class: MultiStepMultiGammaLR",
        ArgumentError,
        r"write a MultiStepLR, with a policy, for each gamma",
    ),
    ("class: DorefaQuantizer", "class: PruneQuantizer", ArgumentError, r"expected PostTrain.*WRPN"),
    (
        "class: DorefaQuantizer",
        "class: PostTrainLinearQuantizer",
        QdqError,
        r"bits_weights.* is un",
    ),
    (
        "bits_weights: 4",
        "bits_wts: 4",
        ArgumentTypeError,
        r"bits_wts.* is unknown; expected bits_a",
    ),
    (
        "class: MultiStepLR",
        "class: ReduceLROnPlateau",
        ArgumentError,
        r"expected ConstantLR, .*StepLR",
    ),
    (
        "gamma: 0.1",
        "gama: 0.1",
        ArgumentTypeError,
        r"gama.* is unknown; expected milestones, gamma",
    ),
    ("instance_name: few_bits", "instance_name: fewer", DataError, r"fewer.*the file has few_bits"),
    ("quantizer: {i", "pruner: {i", DataError, r"expected one of quantizer, lr_scheduler"),
    ("starting_epoch: 1", "starting_epoch: -1", DataError, r"starting_epoch -1"),
    (
        "starting_epoch: 1",
        "starting_epoch: 100",
        DataError,
        r"starting_epoch 100, ending_epoch 100",
    ),
    ("starting_epoch: 1", "epochs: [1]", DataError, r"expected one of quantizer"),
    (
        "instance_name: few_bits",
        "instance_name: [few_bits]",
        DataError,
        r"is a list of 1; the file",
    ),
    (
        "instance_name: few_bits",
        "instance_name: {a: 1}",
        DataError,
        r"instance_name is .*; the file",
    ),
    ("frequency: 1", "frequency: 2", DataError, r"the first with frequency 2"),
    ("frequency: 1", "frequency: 0", DataError, r"frequency 0"),
    ("frequency: 1\n", "\n", DataError, r"frequency null"),
    ("policies:", "policies: {}\nversions:", DataError, r"versions.* is unknown"),
    ("version: 1", "pruners: {}", DataError, r"pruners.* is unknown; expected version"),
]


@pytest.mark.parametrize(("good", "bad", "error", "reason"), FLAWS)
def test_flaws_are_refused_with_what_is_expected(good, bad, error, reason, tmp_path):
    assert good in GOOD
    path = write(tmp_path, GOOD.replace(good, bad, 1))
    with pytest.raises(error) as caught:
        read_compress_file(path)
    message = str(caught.value)
    assert re.search(reason, message), message
    assert "compress.yaml" in message


def test_post_training_has_another_option(tmp_path):
    text = GOOD.replace("DorefaQuantizer", "PostTrainLinearQuantizer")
    text = text.replace("bits_weights: 4", "bits_parameters: 4")
    with pytest.raises(ArgumentError, match="--qe-config-file"):
        read_compress_file(write(tmp_path, text))


def test_instances_without_a_policy_are_refused(tmp_path):
    text = GOOD[: GOOD.index("policies:")]
    with pytest.raises(DataError, match="no policy names few_bits, decay"):
        read_compress_file(write(tmp_path, text))


def test_a_network_has_one_quantizer(tmp_path):
    text = GOOD + GOOD[GOOD.index("  - quantizer") : GOOD.index("  - lr_sch")]
    with pytest.raises(DataError, match="2 policies of quantizers"):
        read_compress_file(write(tmp_path, text))


@pytest.mark.parametrize(
    "entry",
    [
        {"class": "StepLR"},
        {"class": "StepLR", "step_size": 0},
        {"class": "ExponentialLR", "gamma": "many"},
        {"class": "ExponentialLR", "gamma": -1.0},
        {"class": "ExponentialLR", "gamma": 1e300},
        {"class": "CosineAnnealingWarmRestarts", "T_0": -2},
    ],
)
def test_arguments_that_give_no_rates_are_refused(entry, tmp_path):
    plan = read_compress_file(write_rates(tmp_path, entry))
    with pytest.raises(ArgumentError):
        plan.find_rates(0.1, 8)
