"""Fine-tuning in two processes: one start, one decision, one state, and an error in both where one has it."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import processes_on_device
import pytest
import torch
from processes import TORCHRUN, Processes, wait_for
from tuned_run import make_images, make_model, make_switched

import qdq
from qdq.errors import StateError
from qdq.qat.checkpoint import STATE_FORMAT, load_tensors
from qdq.quantizer import named_quantizers

HERE = Path(__file__).parent
TUNED_RUN = HERE / "tuned_run.py"
pytestmark = pytest.mark.xdist_group("processes of fine-tuning")  # they share two runs
BOTH_SAY = "StateError: the processes do not start in the same state: "


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Case -> what each of the two processes made of it."""
    out = tmp_path_factory.mktemp("cases") / "out"
    with Processes() as processes:
        pair = processes.start_pair([[HERE / "process_cases.py", out]] * 2, out.with_name("store"))
        assert [process.wait() for process in pair] == [0, 0]
    first, second = (json.loads(out.with_name(f"out.{rank}").read_text()) for rank in range(2))
    return {name: (first[name], second[name]) for name in first}


@pytest.mark.parametrize(
    ("case", "different"),
    [
        ("other weights", "weights"),
        ("other range", "weights"),
        ("a layer off", "weights"),
        ("other options", "schedule, amp"),
        ("other batches", "data"),
        ("other length", "steps"),
        ("held in one", "held"),
    ],
)
def test_processes_that_begin_differently_are_refused_in_all_of_them(found, case, different):
    assert found[case][0] == found[case][1]
    assert found[case][0].startswith(BOTH_SAY + different)


@pytest.mark.parametrize(
    ("case", "failing", "message"),
    [
        ("no range", 1, "StateError: 1 quantizers have no range: 0._input_quantizer"),
        ("folder", 0, "ArgumentError: cannot write "),
        ("metric fails", 1, "ValueError: not today"),
        ("loader fails", 1, "OSError: the disk is gone"),
        ("loader of the first fails as ranges stop", 0, "OSError: the disk is gone"),
        ("loss fails", 1, "ValueError: not today"),
        ("nan", 1, "StateError: the loss is nan in step 3; no layer returns it for finite inputs"),
        ("nan in a range", 1, "StateError: 0._input_quantizer received NaN or Inf"),
        ("save fails", 0, "ArgumentError: cannot write: the disk is full"),
    ],
)
def test_an_error_in_one_process_ends_the_other(found, case, failing, message):
    assert found[case][failing].startswith(message)
    assert found[case][1 - failing].startswith(f"StateError: process {failing} failed: {message}")


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("no memory in the step", "StateError"),
        ("no memory to say so", "StateError"),
        ("no memory in the metric", "StateError"),
        ("no memory in calibration", "CalibrationError"),
    ],
)
def test_a_process_without_memory_ends_all_with_one_line(found, case, kind):
    cause = (
        "there is not enough memory in process 1: CUDA out of memory. Tried to allocate 20.00 MiB."
    )
    other, failing = found[case]
    assert failing.startswith(f"{kind}: {cause}")
    assert other.startswith(f"{kind}: process 1 failed: {kind}: {cause}")
    for line in found[case]:
        assert "\n" not in line
        assert "give smaller batches, or free memory." in line


def test_the_metric_of_the_first_process_decides_for_both(found):
    first, second = found["metric of rank"]
    assert first == second
    assert first["metrics"] == [1, 3, 2, 2.5, 0]
    assert (first["best"], first["stopped"]) == (
        1,
        "stopped: 3 measurements in a row were not better",
    )


@pytest.mark.parametrize(
    "case", ["alike", "live batchnorm", "ranges that follow", "learned ranges", "switched"]
)
def test_the_models_stay_the_same_to_the_last_bit(found, case):
    assert found[case][0] == found[case][1]


def test_ranges_follow_what_all_processes_see(found):
    model, batches = make_model(8), [(1 + n) * make_images(8, n) for n in range(5)]
    qdq.finetune(model, batches, ranges="ema", schedule=qdq.Schedule(steps=10, lr=1e-3))
    state = found["ranges that follow"][0]["state"]
    for name, quantizer in named_quantizers(model):
        if quantizer.amax is not None:
            assert torch.allclose(
                torch.tensor(state[f"{name}._amax"]), quantizer.amax, rtol=1e-4
            ), name


def test_two_processes_on_a_device_give_what_one_gives(tmp_path, processes, gpu, device_folder):
    """The gradients are averaged on the device, by a backend that copies over gloo where the device is pretended."""
    script = [HERE / "processes_on_device.py", tmp_path / "out", device_folder]
    pair = processes.start_pair([script] * 2, tmp_path / "store")
    assert [process.wait() for process in pair] == [0, 0]
    shared = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
    assert shared[0] == shared[1]
    for ranges, alone in processes_on_device.tune(gpu).items():
        assert shared[0][ranges]["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        for name, values in alone["state"].items():
            state = torch.tensor(shared[0][ranges]["state"][name])
            assert torch.allclose(state, torch.tensor(values), rtol=1e-2, atol=1e-3), name


def assert_is_that_of_one_process(model, tuning, case):
    assert case["losses"] == pytest.approx(tuning.losses, rel=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(torch.tensor(case["state"][name]), tensor, atol=1e-5, rtol=1e-4), name


def test_learned_ranges_are_those_of_one_process_however_samples_are_shared(found):
    """Clipping the gradient mixes ranges and weights: that of a range must have the size that it has in one process."""
    model = make_model(8)
    schedule = qdq.Schedule(steps=10, lr=1e-3, range_lr=1e-2, max_norm=1e-3)
    tuning = qdq.finetune(
        model, [make_images(size, size) for size in (8, 7, 3)], ranges="lsq", schedule=schedule
    )
    assert_is_that_of_one_process(model, tuning, found["learned ranges"][0])


def test_what_a_batch_does_not_reach_is_not_moved(found):
    """Adam moves a parameter whose gradient is 0, as its averages have it, but not one that has none."""
    model, batches = make_switched()
    tuning = qdq.finetune(
        model,
        batches,
        loss=lambda outputs, _: outputs.square().mean(),
        distillation=None,
        schedule=qdq.Schedule(steps=10, lr=1e-3),
    )
    assert_is_that_of_one_process(model, tuning, found["switched"][0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What `tuned_run.py` gives in two processes that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    with Processes() as processes:
        pair = processes.start_pair(
            [[TUNED_RUN, folder / "run", folder / "out.json"]] * 2, folder / "store"
        )
        assert [process.wait() for process in pair] == [0, 0]
    return json.loads((folder / "out.json").read_text())


def test_killed_in_two_processes_and_resumed_they_have_the_same_losses(tmp_path, processes, whole):
    """The folder of the second process is another one, and empty: what the first one has counts."""

    def run(folders, out, *die_at):
        arguments = [[TUNED_RUN, folder, out, *die_at] for folder in folders]
        pair = processes.start_pair(arguments, tmp_path / f"store {out.name} {die_at}")
        return [process.wait() for process in pair]

    killed = [tmp_path / "killed", tmp_path / "other"]
    assert run(killed, tmp_path / "none", 7) == [-signal.SIGKILL, -signal.SIGKILL]
    assert load_tensors(killed[0] / "state.safetensors", STATE_FORMAT)[1]["step"] == 7
    assert run(killed, tmp_path / "resumed.json") == [0, 0]
    assert json.loads((tmp_path / "resumed.json").read_text()) == whole
    assert not killed[1].exists()


@pytest.mark.slow
def test_torchrun_that_is_stopped_leaves_whole_files_to_go_on_from(tmp_path, processes, whole):
    """No group is made outside: `finetune` joins the one that torchrun announces."""
    folder = tmp_path / "run"

    def start(out, die_at):
        return processes.start(
            *TORCHRUN, TUNED_RUN, folder, tmp_path / out, die_at, stderr=subprocess.DEVNULL
        )

    for number, steps, done in ((signal.SIGTERM, 5, 5), (signal.SIGINT, 7, 12)):
        process = start(number.name, -steps)
        wait_for([tmp_path / f"{number.name}.waiting.{rank}" for rank in range(2)], [process])
        process.send_signal(number)
        assert process.wait() != 0
        assert {path.name for path in folder.iterdir()} <= {
            "state.safetensors",
            "best.safetensors",
            "last.safetensors",
        }
        assert load_tensors(folder / "state.safetensors", STATE_FORMAT)[1]["step"] == done
    assert start("resumed.json", 99).wait() == 0
    assert json.loads((tmp_path / "resumed.json").read_text()) == whole


LATE = """
import os, time
import torch
from qdq.distributed import gather_bytes, joining_processes

for number in range(3):
    time.sleep(float(os.environ["RANK"]) if number else 0)
    with joining_processes(torch.device("cpu")):
        assert gather_bytes(bytes([number, int(os.environ["RANK"])])) == [bytes([number, 0]), bytes([number, 1])]
"""


def test_a_group_that_was_left_can_be_joined_again(tmp_path, processes):
    """The second process comes a second late, when the first has looked for it."""
    (tmp_path / "late.py").write_text(LATE)
    assert processes.start(*TORCHRUN, tmp_path / "late.py").wait() == 0


LEFT_ALONE = """
import os, sys
from pathlib import Path
import torch
from qdq.distributed import joining_processes, max_over_ranks
from qdq.errors import StateError

try:
    with joining_processes(torch.device("cpu")):
        max_over_ranks(torch.ones(1))
        if os.environ["RANK"] == "1":
            os._exit(3)
        max_over_ranks(torch.ones(1))
except StateError as error:
    held = error
tasks = Path("/proc/self/task").iterdir()
Path(sys.argv[1]).write_text(" ".join((task / "comm").read_text().strip() for task in tasks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are listed in /proc")
def test_a_group_whose_other_process_has_gone_leaves_no_thread(tmp_path, processes):
    """Threads of gloo that are still there when the interpreter ends may abort the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    pair = [
        processes.start(
            "-c",
            LEFT_ALONE,
            tmp_path / "threads",
            environment={**address, "WORLD_SIZE": "2", "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in pair] == [0, 3]
    assert "gloo" not in (tmp_path / "threads").read_text()


def test_processes_that_cannot_be_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        StateError, match="WORLD_SIZE announces 2 processes, but they cannot be joined"
    ) as error:
        qdq.finetune(make_model(), [make_images(8, 6)])
    assert "torchrun" in error.value.fix
