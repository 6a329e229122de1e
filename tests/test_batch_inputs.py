"""One meaning for tensors, tuples, lists, mappings, dataclasses and what they hold, in every stage."""

from collections import UserDict
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from two_heads import db

from qdq import (
    Labelled,
    Schedule,
    analyze_layers,
    calibrate_model,
    correct_bias,
    equalize_layers,
    evaluate_outputs,
    export_onnx,
    finetune,
    fold_batchnorm,
    measure_tie_floor,
    predict,
    reconstruct_blocks,
    rewire_operations,
    round_weights,
    split_channels,
    swap_modules,
)
from qdq.batch import (
    count_samples,
    find_labels,
    join_batches,
    list_leaves,
    map_tensors,
    split_inputs,
    tensors_of,
)
from qdq.check import measure_parity
from qdq.errors import ArgumentTypeError, ExportError
from qdq.forward import call_model, trace_forward

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


class Encoding(UserDict):
    """Like transformers.BatchEncoding: a UserDict with attributes of its own."""

    def __init__(self, data, source="a text"):
        super().__init__(data)
        self.source = source


@dataclass
class Sample:
    image: torch.Tensor
    name: str = "x"
    boxes: list = field(default_factory=list)


class Residual(nn.Module):
    """A block whose shortcut, pooling and concat get quantizers, and a normalisation that can be folded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(32, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.norm(self.first(input=x)))
        x = F.relu(self.second(y) + x)
        x = torch.cat([x, y], 1).mean((2, 3))
        return self.last(F.relu(self.head(x)))


class FromDataclass(Residual):
    def forward(self, sample):
        return super().forward(sample.image)


class FromNested(Residual):
    def forward(self, x):
        return super().forward(x["images"][0])


FORMS = {
    "tensor": (Residual, lambda x: x),
    "tuple": (Residual, lambda x: (x,)),
    "list": (Residual, lambda x: [x]),
    "pair": (Residual, lambda x: (x, LABELS)),
    "dictionary": (Residual, lambda x: {"x": x}),
    "encoding": (Residual, lambda x: Encoding({"x": x})),
    "labelled tensor": (Residual, lambda x: Labelled(x, LABELS)),
    "labelled tuple": (Residual, lambda x: Labelled((x,), LABELS)),
    "labelled encoding": (Residual, lambda x: Labelled(Encoding({"x": x}))),
    "dataclass": (FromDataclass, Sample),
    "nested": (FromNested, lambda x: Labelled({"x": {"images": [x]}}, LABELS)),
    "nested encoding": (FromNested, lambda x: {"x": Encoding({"images": (x,)})}),
}


def build(form):
    torch.manual_seed(0)
    cls, wrap = FORMS[form]
    return cls().eval(), wrap


def quantize(form):
    """A quantized model and what its plans and ranges say."""
    model, wrap = build(form)
    folded = fold_batchnorm(model, wrap(IMAGES))
    swapped = swap_modules(model, wrap(IMAGES))
    rewired = rewire_operations(model, wrap(IMAGES))
    ranges = calibrate_model(model, [wrap(IMAGES), wrap(2 * IMAGES)], method="max")
    amaxes = {entry.name: str(entry.amax) for entry in ranges}
    return model, wrap, (folded, swapped, rewired, amaxes)


@pytest.fixture(scope="module")
def by_tensor():
    model, _, plans = quantize("tensor")
    return predict(model, [IMAGES]), plans


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_same_plans_and_outputs(form, by_tensor):
    expected, plans_of_tensor = by_tensor
    model, wrap, plans = quantize(form)
    assert plans == plans_of_tensor
    folded, _, rewired, _ = plans
    assert [pair.folded for pair in folded] == [True]
    assert {operation.function for operation in rewired.operations} >= {"add", "cat"}
    assert np.array_equal(predict(model, [wrap(IMAGES)]), expected)


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_is_exported(form, tmp_path, by_tensor):
    expected, _ = by_tensor
    model, wrap, _ = quantize(form)
    report = export_onnx(model, wrap(IMAGES), tmp_path / "model.onnx")
    (shape,) = report.inputs.values()
    assert shape == ["batch", 3, 16, 16]
    found = predict(report.path, [wrap(IMAGES)])
    np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_goes_through_the_stages_of_accuracy(form):
    model, wrap = build(form)
    fold_batchnorm(model, wrap(IMAGES))
    equalize_layers(model, [wrap(IMAGES)])
    split_channels(model, [wrap(IMAGES)])
    swap_modules(model, wrap(IMAGES))
    calibrate_model(model, [wrap(IMAGES)])
    correct_bias(model, [wrap(IMAGES), wrap(IMAGES[:2])])
    round_weights(model, [wrap(IMAGES)])
    reconstruct_blocks(model, [wrap(IMAGES)], steps=2)
    analysis = analyze_layers(model, [wrap(IMAGES)])
    assert analysis.images == 4


def train(form):
    model, wrap, _ = quantize(form)
    teacher, _ = build(form)
    finetune(model, [wrap(IMAGES)], teacher=teacher, schedule=Schedule(epochs=1))
    return model.last.weight


@pytest.fixture(scope="module")
def trained_by_tensor():
    return train("tensor")


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_trains_alike_by_distillation(form, trained_by_tensor):
    assert torch.equal(train(form), trained_by_tensor)


def test_labels_are_those_of_the_batch():
    assert find_labels(Labelled(IMAGES, LABELS)) is LABELS
    assert find_labels((IMAGES, LABELS)) is LABELS
    assert find_labels({"x": IMAGES}) is None
    assert find_labels((IMAGES,)) is None
    assert find_labels(Labelled(IMAGES)) is None


def test_labelled_labels_rank_by_accuracy():
    model, _, _ = quantize("tensor")
    by_pair = analyze_layers(model, [(IMAGES, LABELS)], metric="top1")
    model, _, _ = quantize("tensor")
    by_name = analyze_layers(model, [Labelled(IMAGES, LABELS)], metric="top1")
    assert by_pair.format_table() == by_name.format_table()


# A list of images is the input of a detector


class Detector(nn.Module):
    def forward(self, images, targets=None):
        assert isinstance(images, list)
        losses = [image.mean() for image in images]
        if targets is not None:
            losses.append(targets[0]["labels"].float().sum())
        return losses


PICTURES = [torch.ones(3, 32, 40), torch.ones(3, 24, 32)]
TARGETS = [{"labels": torch.tensor([1, 2])}, {"labels": torch.tensor([3])}]


@pytest.mark.parametrize(
    "batch",
    [PICTURES, PICTURES[:1], (PICTURES, TARGETS), Labelled(PICTURES, TARGETS), [PICTURES, TARGETS]],
    ids=["list", "one", "pair", "labelled", "list of both"],
)
def test_a_list_of_images_is_one_input(batch):
    (images,), _ = split_inputs(batch)
    assert all(image is picture for image, picture in zip(images, PICTURES, strict=False))
    assert count_samples(batch) == len(images)
    assert len(call_model(Detector(), batch)) == len(images)


def test_a_list_of_images_has_no_labels():
    assert find_labels(PICTURES) is None
    assert find_labels(Labelled(PICTURES, TARGETS)) is TARGETS


@pytest.mark.parametrize(
    "batch",
    [
        [torch.ones(3, 7, 8), torch.ones(3, 7, 1)],  # sequences and targets of a batch of 3
        [torch.ones(4, 32, 32), torch.ones(4, 32, 32)],
        [torch.ones(3, 32, 32), torch.ones(3, 32, 32, dtype=torch.int64)],
        (torch.ones(3, 32, 32), torch.ones(3, 32, 32)),
        [IMAGES, LABELS],
    ],
    ids=["sequences", "four", "classes", "tuple", "images"],
)
def test_other_pairs_stay_inputs_and_labels(batch):
    args, kwargs = split_inputs(batch)
    assert len(args) == 1
    assert args[0] is batch[0]
    assert not kwargs
    assert find_labels(batch) is batch[1]


# The parts of inputs


def test_tensors_of_mappings_and_dataclasses():
    boxes = torch.zeros(2, 4)
    tree = [Sample(IMAGES, boxes=[boxes]), Encoding({"ids": LABELS, "text": "a"})]
    assert [
        tensor is part
        for tensor, part in zip(tensors_of(tree), (IMAGES, boxes, LABELS), strict=True)
    ]
    assert list_leaves(tree)[1] == "x"


def test_containers_are_rebuilt_with_what_else_they_hold():
    tree = {"sample": Sample(IMAGES, name="cat"), "text": Encoding({"ids": LABELS}, source="b")}
    doubled = map_tensors(lambda tensor: 2 * tensor, tree)
    assert isinstance(doubled["sample"], Sample)
    assert doubled["sample"].name == "cat"
    assert torch.equal(doubled["sample"].image, 2 * IMAGES)
    assert isinstance(doubled["text"], Encoding)
    assert doubled["text"].source == "b"
    assert torch.equal(doubled["text"]["ids"], 2 * LABELS)
    assert tree["text"]["ids"] is LABELS


def test_other_objects_are_left_alone():
    thing = SimpleNamespace(image=IMAGES)
    assert map_tensors(lambda tensor: tensor + 1, [thing]) == [thing]
    assert split_inputs(thing) == ((thing,), {})


def test_positional_inputs_are_joined_and_moved_as_positional():
    first = Labelled((IMAGES, LABELS[:, None]))
    joined = join_batches([first, first])
    assert isinstance(joined, Labelled)
    assert [len(tensor) for tensor in joined.inputs] == [8, 8]
    assert isinstance(join_batches([Sample(IMAGES), Sample(IMAGES)])[0], Sample)


# What the trace sees


class Reader(nn.Module):
    """Changes its keyword argument in place after it has read it."""

    def forward(self, x, *, other):
        y = x + other
        other.mul_(2)
        return y + other


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.reader = Reader()

    def forward(self, x, other):
        return self.reader(x, other=other.clone())


def test_the_trace_sees_keyword_arguments_as_they_came_in():
    inputs = {"x": torch.ones(2, 3), "other": torch.ones(2, 3)}
    trace = trace_forward(Outer(), inputs)
    assert len(trace.inputs) == 2
    (_, inner) = trace.runs
    clone, first_add = trace.operations[:2]
    assert inner.inputs == (trace.inputs[0], clone.outputs[0])
    assert first_add.inputs == inner.inputs


def test_wrong_arguments_are_explained():
    with pytest.raises(
        ArgumentTypeError, match=r"takes \(x, other\).*gives it 1 positional"
    ) as caught:
        call_model(Outer(), (torch.ones(2, 3), torch.ones(2, 3)))
    assert "qdq.Labelled((first, second)" in caught.value.fix
    assert call_model(Outer(), Labelled((torch.ones(2, 3), torch.ones(2, 3)))).shape == (2, 3)


def test_type_errors_of_the_model_stay():
    class Broken(nn.Module):
        def forward(self, x):
            return len(3)

    with pytest.raises(TypeError, match="has no len"):
        call_model(Broken(), torch.ones(1))


# Batches of different sizes, caches, scripted models


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def test_batches_of_different_lengths_are_calibrated_and_analyzed():
    batches = [{"x": torch.randn(4, length, 16)} for length in (5, 9, 12)]
    model = Tagger().eval()
    swap_modules(model, batches[0])
    rewire_operations(model, batches[0])
    ranges = calibrate_model(model, batches, method="max")
    largest = max(batch["x"].abs().max() for batch in batches)
    (amax,) = [entry.amax for entry in ranges if entry.name == "first._input_quantizer"]
    assert amax == pytest.approx(float(largest))
    assert analyze_layers(model, batches).images == 12


def test_batches_of_different_lengths_go_through_the_file(tmp_path):
    batches = [Labelled({"x": torch.randn(4, length, 16)}) for length in (5, 9, 12)]
    model = Tagger().eval()
    expected = predict(model, batches)
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    int8 = predict(model, batches)
    assert [array.shape for array in int8] == [(4, length, 16) for length in (5, 9, 12)]
    export_onnx(
        model, batches[0], tmp_path / "model.onnx", dynamic={"x": {0: "batch", 1: "length"}}
    )
    ort = predict(tmp_path / "model.onnx", batches)
    for array, reference in zip(ort, int8, strict=True):
        np.testing.assert_allclose(array, reference, atol=1e-5)
    evaluation = evaluate_outputs({"float": expected, "int8": int8, "ONNX": ort})
    quantized, exported = evaluation.candidates[1:]
    assert evaluation.images == 12
    assert quantized.sqnr_db == pytest.approx(db_of(expected, int8))
    assert exported.sqnr_db == pytest.approx(quantized.sqnr_db, abs=0.1)
    parity = measure_parity(int8, ort, measure_tie_floor(model, batches, expected=int8))
    assert (parity.images, parity.is_sufficient) == (12, True)


def db_of(reference, outputs):
    """SQNR of lists of arrays, by numpy."""
    return db(*(np.concatenate([array.ravel() for array in each]) for each in (reference, outputs)))


class KeysAndValues:
    """Like the caches of transformers."""

    def get_seq_length(self):
        return 3


def test_a_cache_of_transformers_is_refused_with_the_way_out():
    inputs = {"x": torch.ones(2, 3), "other": KeysAndValues()}
    with pytest.raises(ArgumentTypeError, match="other is a KeysAndValues") as caught:
        trace_forward(Outer(), inputs)
    assert "use_cache = False" in caught.value.fix


def test_a_model_that_returns_its_cache_names_the_way_out(tmp_path):
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(use_cache=True)

        def forward(self, x):
            return x if x.sum() > 0 else -x  # torch cannot capture it

    with pytest.raises(ExportError) as caught:
        export_onnx(Caching(), torch.ones(2, 3), tmp_path / "model.onnx")
    assert "model.config.use_cache = False" in caught.value.fix


def test_a_scripted_model_predicts_and_is_not_quantized():
    model = Tagger().eval()
    scripted = torch.jit.script(model)
    batch = torch.randn(2, 16)
    assert np.array_equal(predict(scripted, [batch]), predict(model, [batch]))
    for stage in (fold_batchnorm, swap_modules, rewire_operations):
        with pytest.raises(ArgumentTypeError, match="scripted") as caught:
            stage(scripted, batch)
        assert "Python module" in caught.value.fix
