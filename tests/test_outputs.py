"""Outputs by name, parts and masks, from the model to the file and its parity."""

import math
from collections import OrderedDict, namedtuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from two_heads import Detections, TwoHeads, db

from qdq import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    calibrate_model,
    check_onnx,
    evaluate_outputs,
    export_onnx,
    measure_tie_floor,
    predict,
    swap_modules,
)
from qdq.check import measure_parity
from qdq.metrics import decide_db
from qdq.outputs import OutputView, name_other_outputs, name_outputs, select_outputs


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return [torch.randn(4, 3, 8, 8), torch.randn(3, 3, 8, 8)]


@pytest.fixture
def heads(batches):
    torch.manual_seed(1)
    model = TwoHeads().eval()
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    return model


Pair = namedtuple("Pair", "boxes scores")
A, B = torch.zeros(2, 4), torch.ones(2, 10)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (A, ["output"]),
        ((A, B), ["output_0", "output_1"]),
        ([A, None, B], ["output_0", "output_2"]),
        ({"boxes": A, "scores": B}, ["boxes", "scores"]),
        (OrderedDict(scores=B, boxes=A), ["scores", "boxes"]),
        (Detections(A, B), ["boxes", "scores"]),
        (Pair(A, B), ["boxes", "scores"]),
        ({"heads": [A, {"small": B}], "count": 3}, ["heads.0", "heads.1.small"]),
        (({"a": A}, B), ["output_0.a", "output_1"]),
        ({1: A, "1": B}, ["1", "1_"]),
        (torch.max(B, 1), ["output_0", "output_1"]),
        ("text", []),
    ],
)
def test_names(outputs, names):
    assert list(name_outputs(outputs)) == names


def test_what_is_left_out():
    assert name_other_outputs({"a": A, "n": 3, "none": None, "b": [B, "x"]}) == {
        "n": "int",
        "b.1": "str",
    }


def test_parts():
    joined = torch.cat([A, B], 1)
    parts = select_outputs(
        joined,
        {"boxes": lambda outputs: outputs["output"][:, :4], "all": "output"},
    )
    assert torch.equal(parts["boxes"], A)
    assert parts["all"] is joined
    with pytest.raises(ArgumentError, match="outputs names logits; the outputs are output"):
        select_outputs(joined, {"scores": "logits"})
    with pytest.raises(ArgumentTypeError, match="'both' returns a tuple"):
        select_outputs(joined, {"both": lambda outputs: (A, B)})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"outputs": {}}, ArgumentError),
        ({"outputs": ["scores"]}, ArgumentTypeError),
        ({"outputs": {"scores": 3}}, ArgumentTypeError),
        ({"mask": 3}, ArgumentTypeError),
        ({"weights": ["scores"]}, ArgumentTypeError),
        ({"weights": {"scores": -1}}, ArgumentError),
        ({"weights": {"scores": math.nan}}, ArgumentError),
        ({"weights": {"scores": True}}, ArgumentError),
        ({"weights": {"scores": 0}}, ArgumentError),
    ],
)
def test_views_that_say_nothing(options, error):
    with pytest.raises(error):
        OutputView(**options)


def test_one_figure_from_several():
    decibels = {"boxes": 40.0, "scores": 20.0}
    assert decide_db(decibels) == 20
    assert decide_db(decibels, [1, 0]) == 40
    weighted = -10 * math.log10((3 * 1e-4 + 1e-2) / 4)
    assert decide_db(decibels, [3, 1]) == pytest.approx(weighted)
    assert decide_db({"a": math.inf, "b": math.inf}, [1, 1]) == math.inf
    assert decide_db({"zeros": -math.inf, "b": 20.0}) == 20
    assert decide_db({"zeros": -math.inf}) == -math.inf
    assert math.isnan(decide_db({"a": math.nan, "b": 20.0}))


def test_predict_and_the_file_give_all_outputs_by_name(heads, batches, tmp_path):
    path = export_onnx(heads, batches[0], tmp_path / "model.onnx").path
    session = onnxruntime.InferenceSession(path)
    assert [value.name for value in session.get_outputs()] == ["boxes", "scores"]
    from_torch, from_file = predict(heads, batches), predict(path, batches)
    for found in (from_torch, from_file):
        assert {name: array.shape for name, array in found.items()} == {
            "boxes": (7, 4),
            "scores": (7, 10),
        }
    with torch.no_grad():
        expected = torch.cat([heads(batch)["scores"] for batch in batches])
    np.testing.assert_array_equal(from_torch["scores"], expected.numpy())
    selection = {
        "x": lambda outputs: outputs["boxes"][:, 0],
        "scores": "scores",
    }
    for source, found in ((heads, from_torch), (path, from_file)):
        parts = predict(source, batches, outputs=selection)
        np.testing.assert_array_equal(parts["x"], found["boxes"][:, 0])
        np.testing.assert_array_equal(
            predict(source, batches, outputs={"s": "scores"}), found["scores"]
        )


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda boxes, scores: scores, ["output"]),
        (lambda boxes, scores: (boxes, scores), ["output_0", "output_1"]),
        (Detections, ["boxes", "scores"]),
        (lambda boxes, scores: {"a": scores, "b": scores}, ["a", "b"]),
        (lambda boxes, scores: {"relu": boxes, "conv2d": scores}, ["relu", "conv2d"]),
        (lambda boxes, scores: {"x": scores}, ["x_1"]),  # the name of the input
    ],
)
@pytest.mark.parametrize("opset", [13, 19])
def test_names_in_the_file(wrap, names, batches, tmp_path, opset):
    model = TwoHeads(wrap).eval()
    path = export_onnx(model, batches[0], tmp_path / "model.onnx", opset=opset).path
    session = onnxruntime.InferenceSession(path)
    assert [value.name for value in session.get_outputs()] == names
    parity = measure_parity(predict(model, batches), predict(path, batches))
    assert parity.is_sufficient
    assert parity.sqnr_db > 90


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", torch.ones(2, 3))

    def forward(self, x):
        return {"x": x, "double": 2 * x, "again": x, "anchors": self.anchors}


def test_an_input_that_is_returned(tmp_path):
    x = torch.randn(2, 3)
    path = export_onnx(Returned(), x, tmp_path / "model.onnx").path
    outputs = predict(path, [x])
    assert list(outputs) == ["x_1", "double", "again", "anchors"]
    assert measure_parity(predict(Returned(), [x]), outputs).max_abs == 0


def test_a_broken_second_output_fails_the_parity(heads, batches, tmp_path):
    path = export_onnx(heads, batches[0], tmp_path / "model.onnx").path
    expected, found = predict(heads, batches), predict(path, batches)
    floor = {"boxes": 40.0, "scores": 35.0}
    good = check_onnx(path, expected=expected, found=found, tie_floor_db=floor, select=["QDQ190"])
    assert not good.problems
    broken = found | {"scores": found["scores"][:, ::-1]}
    bad = check_onnx(path, expected=expected, found=broken, tie_floor_db=floor, select=["QDQ190"])
    (finding,) = bad.problems
    scores_db = db(expected["scores"], broken["scores"])
    assert f"SQNR of scores {scores_db:.1f} dB" in finding.message
    assert bad.parity.sqnr_db == pytest.approx(scores_db)  # the worst one's, not that of the boxes
    assert bad.parity.outputs["boxes"].is_sufficient
    text = bad.format_table()
    assert "scores: against torch on 7 rows: SQNR" in text
    assert "boxes: torch against itself" in text


def test_parity_refuses_what_cannot_be_compared():
    both = {"boxes": np.ones((2, 4)), "scores": np.ones((2, 3))}
    with pytest.raises(ArgumentError, match=r"\['boxes', 'scores'\] and \['output'\]"):
        measure_parity(both, np.ones((2, 3)))
    with pytest.raises(ArgumentError, match="no output 'scores'"):
        measure_parity(both, both, {"boxes": 30.0})
    with pytest.raises(ArgumentError, match="one output is compared"):
        measure_parity(np.ones((2, 3)), np.ones((2, 3)), {"boxes": 30.0})


def test_files_with_other_names_are_paired_by_position():
    ours = {"boxes": np.ones((2, 4)), "scores": np.ones((2, 3))}
    theirs = {"cat_18": np.ones((2, 4)), "silu_34": 2 * np.ones((2, 3))}
    parity = measure_parity(ours, theirs)
    assert parity.outputs["boxes"].sqnr_db == math.inf
    assert parity.sqnr_db == 0


def test_nan_in_one_output_fails():
    good = {"a": np.ones((2, 4)), "b": np.ones((2, 3))}
    bad = good | {"b": np.full((2, 3), np.nan)}
    parity = measure_parity(good, bad)
    assert not parity.is_sufficient
    assert list(parity.failures) == ["b"]


def test_classes_beside_scores_have_no_sqnr():
    first = {"classes": np.array([1, 2]), "scores": np.ones((2, 3))}
    second = {"classes": np.array([1, 900]), "scores": np.ones((2, 3))}
    assert list(measure_parity(first, second).outputs) == ["scores"]


def test_tie_floor_of_each_output(heads, batches):
    floor = measure_tie_floor(heads, batches)
    assert list(floor) == ["boxes", "scores"]
    scores = measure_tie_floor(heads, batches, outputs={"scores": "scores"})
    assert scores == floor["scores"]
    with pytest.raises(ArgumentError, match="different shapes"):
        measure_tie_floor(heads, batches, expected=predict(heads, batches[:1]))


class Tie(nn.Module):
    """One quantizer: the input just above or just below a tie."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("side", [-1, 1])
def test_the_nudge_goes_both_ways(side):
    model = Tie().eval()
    nn.init.ones_(model.layer.weight)
    swap_modules(model, torch.ones(2, 1), include=["*"])
    calibrate_model(model, [torch.full((1, 1), 127.0)], method="max")
    on_tie = torch.full((1, 1), 10.5 * (1 + side * 2**-23))
    assert measure_tie_floor(model, [on_tie]) == pytest.approx(20.4, abs=0.5)  # one step of 10.5


def test_table_of_several_outputs():
    boxes = np.full((7, 4), 3.0)
    boxes[0] = 2.0  # constant outputs get a line of their own
    expected = {"boxes": boxes, "scores": np.eye(7, 10)}
    worse = {"boxes": expected["boxes"] + 0.003, "scores": expected["scores"] + 0.1}
    evaluation = evaluate_outputs({"float": expected, "int8": worse}, {"scores": range(7)})
    _, candidate = evaluation.candidates
    boxes, scores = candidate.outputs
    assert boxes.sqnr_db == pytest.approx(db(expected["boxes"], worse["boxes"]))
    worst_db = db(expected["scores"], worse["scores"])
    assert candidate.sqnr_db == scores.sqnr_db == pytest.approx(worst_db)
    assert (scores.agreement, scores.top1) == (1, 1)
    assert candidate.agreement is candidate.top1 is boxes.agreement is boxes.top1 is None
    lines = evaluation.format_table().splitlines()
    names = ["float", "boxes", "scores", "int8", "boxes", "scores"]
    assert [line.split()[0] for line in lines[1:]] == names
    assert len({len(line) for line in lines}) == 1


def test_labels_belong_to_an_output():
    outputs = {"boxes": np.ones((7, 4)), "scores": np.eye(7, 10)}
    (only,) = evaluate_outputs({"float": outputs}).candidates
    assert [entry.agreement for entry in only.outputs] == [None, None]
    with pytest.raises(ArgumentError, match="labels are of 'no output', and the outputs are"):
        evaluate_outputs({"float": outputs}, [0] * 7)
    with pytest.raises(ArgumentError, match="labels are of 'logits', and the outputs are"):
        evaluate_outputs({"float": outputs}, {"logits": [0] * 7})
    with pytest.raises(ArgumentTypeError, match="labels is of type int"):
        evaluate_outputs({"float": outputs}, {"scores": 3})
    with pytest.raises(
        ArgumentError, match=r"labels \(6,\) of the output scores, which is \(7, 10\)"
    ):
        evaluate_outputs({"float": outputs}, {"scores": [0] * 6})
    words = {"tags": [np.ones((2, 5, 8)), np.ones((1, 3, 8))], "ends": np.ones((3, 8))}
    with pytest.raises(
        ArgumentError, match=r"of the output tags, which is \(2, 5, 8\), \(1, 3, 8\)"
    ):
        evaluate_outputs({"float": words}, {"tags": [0] * 3})
    (image,) = evaluate_outputs({"float": np.ones((2, 3, 4, 4))}).candidates
    assert image.agreement is None


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)

    def forward(self, input_ids, attention_mask):
        states = self.embedding(input_ids)
        return {"last_hidden_state": states, "pooler_output": states[:, 0]}


def make_text(rows, length, lengths):
    ids = torch.arange(rows * length).reshape(rows, length) % 20
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def test_padding_is_left_out():
    model = Encoder()
    texts = [make_text(2, 5, [5, 2]), make_text(1, 3, [1])]
    outputs = predict(model, texts, mask="attention_mask")
    states = [model(**text)["last_hidden_state"].detach().numpy() for text in texts]
    tokens = np.concatenate([states[0][0], states[0][1, :2], states[1][0, :1]])
    np.testing.assert_array_equal(outputs["last_hidden_state"], tokens)
    assert outputs["pooler_output"].shape == (3, 8)
    by_function = predict(model, texts, mask=lambda batch: batch["attention_mask"])
    np.testing.assert_array_equal(by_function["last_hidden_state"], tokens)


def test_masks_that_do_not_fit():
    text = make_text(2, 5, [5, 2])
    with pytest.raises(ArgumentError, match="the mask is 'padding', and the batch has input_ids"):
        predict(Encoder(), [text], mask="padding")
    with pytest.raises(DataError, match=r"the mask \[2, 4\] fits no output"):
        predict(Encoder(), [text], mask=lambda batch: torch.ones(2, 4))
    with pytest.raises(ArgumentTypeError, match="the mask is of type list"):
        predict(Encoder(), [text], mask=lambda batch: [1])


def test_batches_of_other_lengths():
    model = Encoder()
    texts = [make_text(2, 5, [5, 2]), make_text(1, 3, [1])]
    outputs = predict(model, texts, outputs={"states": "last_hidden_state"})
    assert [array.shape for array in outputs] == [(2, 5, 8), (1, 3, 8)]
    noisy = [array + 0.01 for array in outputs]
    flat, flat_noisy = (np.concatenate([a.ravel() for a in arrays]) for arrays in (outputs, noisy))
    evaluation = evaluate_outputs({"float": outputs, "int8": noisy})
    assert evaluation.images == 3
    assert evaluation.candidates[1].sqnr_db == pytest.approx(db(flat, flat_noisy))
    parity = measure_parity(outputs, noisy)
    assert (parity.images, parity.exact) == (3, 0)
    assert parity.sqnr_db == pytest.approx(db(flat, flat_noisy))
    with pytest.raises(ArgumentError, match="different shapes"):
        measure_parity(outputs, noisy[:1])


def test_batches_with_other_outputs():
    class Odd(nn.Module):
        def forward(self, x):
            return {"a": x} if len(x) > 1 else {"b": x}

    with pytest.raises(DataError, match=r"returns \['b'\] for a batch, and \['a'\]"):
        predict(Odd(), [torch.ones(2, 1), torch.ones(1, 1)])
    with pytest.raises(ArgumentTypeError, match="returns no tensor, but a str"):
        predict(Texts(), [torch.ones(2, 1)])


class Texts(nn.Module):
    def forward(self, x):
        return "text"
