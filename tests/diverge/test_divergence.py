"""`find_divergence` on files with faults; the truth is which node was changed."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from small_model import make_batches
from torch import nn

import qdq
from qdq.diverge.causes import compare_constants, compare_graphs, explain_values
from qdq.diverge.compare import _measure_noise, _view_alike
from qdq.diverge.distances import grid_of_values, make_grid, measure_lsb
from qdq.diverge.record import Site
from qdq.errors import ArgumentError, DataError
from qdq.formats import Format


class Network(nn.Module):
    """A residual addition, two quantizers of one tensor, and a reshape before the last layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 36, 16)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.left(x) + self.right(x)).relu()
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, batches = Network().eval(), make_batches(2)
    qdq.swap_modules(model, batches[0], include="*")
    qdq.rewire_operations(model, batches[0])
    qdq.calibrate_model(model, batches, method="max")
    path = tmp_path_factory.mktemp("diverge") / "model.onnx"
    return model, batches, qdq.export_onnx(model, batches[0], path).path


def find_node(graph, name):
    return next(node for node in graph if node.name == name)


def set_constant(graph, node, position, array):
    name = f"fault.{node.name}.{position}"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    node.replace_input_with(position, value)


def scale_pair(graph):
    for node in list(graph):
        if str(node.name).startswith("head._input_quantizer/"):
            set_constant(graph, node, 1, 2 * node.inputs[1].const_value.numpy())


def scale_dequantize(graph):
    node = find_node(graph, "head._input_quantizer/DequantizeLinear")
    set_constant(graph, node, 1, np.float32(0.5) * node.inputs[1].const_value.numpy())


def remove_relu(graph):
    node = find_node(graph, "/Relu")
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    graph.remove(node, safe=True)


def turn_weight(graph):
    node = find_node(graph, "left._weight_quantizer/DequantizeLinear")
    set_constant(graph, node, 0, node.inputs[0].const_value.numpy().swapaxes(0, 1).copy())


def shift_pads(graph):
    find_node(graph, "stem/Conv").attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 2, 2])


# Fault -> tensor kind and name that must be first, and what a cause must say.
FAULTS = {
    scale_pair: ("quantizer", "head._input_quantizer", "(2 times)"),
    scale_dequantize: ("quantizer", "head._input_quantizer", "(0.5 times)"),
    remove_relu: ("quantizer", "left._input_quantizer", "as without a ReLU"),
    turn_weight: ("layer", "left", "is transposed"),
    shift_pads: ("layer", "stem", "has pads [0, 0, 2, 2], a fresh export has [1, 1, 1, 1]"),
}


def write_faulty(onnx, fault, folder):
    graph = ir.load(onnx)
    fault(graph.graph)
    ir.save(graph, folder / "faulty.onnx")
    return folder / "faulty.onnx"


def test_a_clean_file_has_no_tensor_beyond_its_tie_floor(exported):
    model, batches, onnx = exported
    result = qdq.find_divergence(model, onnx, batches)
    assert result.first is None
    assert {tensor.name for tensor in result.tensors} >= {"stem", "left._input_quantizer", "output"}
    assert "none of" in result.format_table()
    for tensor in result.tensors:
        assert tensor.excess_lsb < 0.1 * tensor.limit_lsb


def test_a_file_in_float16_is_clean(exported, tmp_path):
    model, batches, _ = exported
    path = qdq.export_onnx(model, batches[0], tmp_path / "half.onnx", precision="fp16").path
    result = qdq.find_divergence(model, path, batches[:1])
    assert result.first is None
    assert max(tensor.excess_lsb for tensor in result.tensors) > 0.0127  # the limit of float32


@pytest.mark.parametrize("fault", [scale_dequantize, turn_weight])
def test_a_fault_is_the_first(exported, fault, tmp_path):
    model, batches, onnx = exported
    result = qdq.find_divergence(model, write_faulty(onnx, fault, tmp_path), batches[:1])
    kind, name, cause = FAULTS[fault]
    assert (result.first.kind, result.first.name) == (kind, name)
    assert any(cause in text for text in result.causes), result.causes
    assert f"cause: {result.causes[0]}" in result.format_table()


class Plain(nn.Module):
    """Two convolutions; the second output is of integers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.second(self.first(x).relu())
        return x, x.argmax(1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    model, batches = Plain().eval(), [torch.randn(1, 3, 6, 6)]
    qdq.swap_modules(model, batches[0], include="*")
    qdq.calibrate_model(model, batches, method="max")
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    return model, batches, qdq.export_onnx(model, batches[0], path).path


def pad(graph, pads):
    for name, size in pads.items():
        node = find_node(graph, f"{name}/Conv")
        node.attributes["pads"] = ir.AttrInt64s("pads", [size] * 4)
    for node in graph:
        for value in node.outputs:
            value.shape = None


@pytest.mark.parametrize(
    ("pads", "name", "size"),
    [({"second": 2}, "output_0", 8), ({"first": 2, "second": 0}, "first", 8)],
)
def test_another_shape_is_a_divergence(plain, pads, name, size, tmp_path):
    model, batches, onnx = plain
    faulty = write_faulty(onnx, lambda graph: pad(graph, pads), tmp_path)
    result = qdq.find_divergence(model, faulty, batches)
    assert result.first.name == name
    channels = 4 if name == "output_0" else 8
    misfit = f"has shape [1, {channels}, {size}, {size}], torch has [1, {channels}, 6, 6]"
    assert result.causes[0] == f"it {misfit}"
    assert any("has pads" in cause for cause in result.causes)
    assert result.outputs_not_compared == ("output_1: its type is int64",)
    assert "not compared: output output_1: its type is int64" in result.format_table()


def test_outputs_that_only_one_side_has_are_named(plain, tmp_path):
    model, batches, onnx = plain
    fewer = write_faulty(onnx, lambda graph: graph.outputs.pop(), tmp_path)
    result = qdq.find_divergence(model, fewer, batches)
    assert result.outputs_not_compared == ("output_1: the file has no such output",)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_values_that_are_not_finite(plain, value, tmp_path):
    model, batches, onnx = plain

    def spoil(graph):
        bias = np.zeros(8, np.float32)
        bias[3] = value
        set_constant(graph, find_node(graph, "first/Conv"), 2, bias)

    result = qdq.find_divergence(model, write_faulty(onnx, spoil, tmp_path), batches)
    assert (result.first.kind, result.first.name) == ("layer", "first")
    assert result.first.sqnr_db == -np.inf
    assert result.causes[0] == "it has NaN or infinite values, torch has none"
    assert _measure_noise(np.ones(3), np.array([1, value, 1])) == np.inf
    assert (
        measure_lsb(
            grid_of_values(np.array([1.0, -1])), np.array([1.0, -1]), np.full(2, value)
        ).min()
        == 254
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_the_cause_is_the_node_that_was_changed(exported, fault, tmp_path):
    _, _, onnx = exported
    kind, name, cause = FAULTS[fault]
    found = ir.load(write_faulty(onnx, fault, tmp_path))
    causes = compare_graphs(ir.load(onnx), found, Site(name, kind=kind))
    if fault is remove_relu:
        cause = "/Relu of a fresh export is missing"
    assert any(cause in text for text in causes), causes
    clean = compare_graphs(ir.load(onnx), ir.load(onnx), Site(name, kind=kind))
    assert len(clean) == 1
    assert "are those of a fresh export" in clean[0]


def test_figures_against_a_plain_session(exported, tmp_path):
    """The distances of the tensor behind the missing ReLU, computed here from the quantizer's scale."""
    model, batches, onnx = exported
    faulty = write_faulty(onnx, remove_relu, tmp_path)
    graph = ir.load(faulty)
    relu_input = find_node(graph.graph, "left._input_quantizer/QuantizeLinear").inputs[0]
    graph.graph.outputs.append(relu_input)
    ir.save(graph, tmp_path / "outputs.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "outputs.onnx")
    name = session.get_inputs()[0].name
    tensor = session.run([relu_input.name], {name: batches[0].numpy()})[0]
    with torch.no_grad():
        expected = model.stem(batches[0]).relu().numpy()
    scale = float(model.left._input_quantizer.amax) / 127
    steps = np.abs(np.clip(tensor / scale, -128, 127) - np.clip(expected / scale, -128, 127))
    first = qdq.find_divergence(model, faulty, batches[:1]).first
    assert first.module == "stem"
    assert first.max_lsb == pytest.approx(steps.max(), rel=1e-3)
    assert first.p99_lsb == pytest.approx(np.percentile(steps, 99), rel=1e-3)
    noise = np.sum((expected - tensor) ** 2)
    assert first.sqnr_db == pytest.approx(10 * np.log10(np.sum(expected**2) / noise), abs=1e-3)
    assert first.tie_floor_db == np.inf
    codes = [np.rint(values / scale).clip(-128, 127) for values in (tensor, expected)]
    assert first.codes_differ == pytest.approx(np.mean(codes[0] != codes[1]), abs=1e-3)


def dump(onnx, names, batch, folder, change=None):
    """Write tensors of the file as trtexec does, float tensors in float16."""
    graph = ir.load(onnx)
    graph.graph.outputs.extend(
        value for node in graph.graph for value in node.outputs if value.name in names
    )
    ir.save(graph, folder / "dumped.onnx")
    session = onnxruntime.InferenceSession(folder / "dumped.onnx")
    arrays = session.run(names, {session.get_inputs()[0].name: batch.numpy()})
    place = folder / "dumps"
    place.mkdir()
    for index, (name, array) in enumerate(zip(names, arrays, strict=True)):
        if array.dtype == np.float32:
            array = array.astype(np.float16)
        if name == change:
            array = array[:, ::-1]
        safe = name.replace("/", "_")
        np.save(place / f"{index:04d}_{safe}.npy", array)
    return place


def list_codes(onnx):
    """Names of what the Q of activations read and write."""
    pairs = []
    for node in ir.load(onnx).graph:
        if node.op_type == "QuantizeLinear" and node.inputs[0].producer() is not None:
            pairs.append((node.inputs[0].name, node.outputs[0].name))
    return pairs


@pytest.mark.parametrize("positions", [(0,), (0, 1)], ids=["inputs of Q", "both"])
def test_dumps_of_an_engine(exported, positions, tmp_path):
    model, batches, onnx = exported
    names = [pair[position] for position in positions for pair in list_codes(onnx)]
    folder = dump(onnx, names, batches[0], tmp_path)
    (folder / "0099_strange.npy").write_bytes(b"")
    result = qdq.find_divergence(model, onnx, batches, dumps=folder)
    assert result.first is None
    assert result.samples == 1
    quantized = [tensor for tensor in result.tensors if tensor.kind == "quantizer"]
    assert len(quantized) == len(list_codes(onnx))
    assert result.ignored == ("0099_strange.npy: no tensor of the file has this name",)


def test_a_wrong_layout_in_an_engine(exported, tmp_path):
    model, batches, onnx = exported
    names = [pair[0] for pair in list_codes(onnx)]
    folder = dump(onnx, names, batches[0], tmp_path, change=names[0])
    result = qdq.find_divergence(model, onnx, batches, dumps=folder)
    assert result.first.tensor == names[0]
    assert any("the runtime computes them differently" in cause for cause in result.causes)


def test_dumps_of_another_batch_size_are_refused(exported, tmp_path):
    model, batches, onnx = exported
    folder = dump(onnx, [pair[0] for pair in list_codes(onnx)], batches[0], tmp_path)
    with pytest.raises(DataError, match=r"its shape is \[2, .*, for the first sample it is \[1, "):
        qdq.find_divergence(model, onnx, [batches[0][:1]], dumps=folder)


def test_bad_input(exported, tmp_path):
    model, batches, onnx = exported
    with pytest.raises(DataError, match="there is no folder"):
        qdq.find_divergence(model, onnx, batches, dumps=tmp_path / "none")
    with pytest.raises(DataError, match="holds no dump of a tensor of the file: it is empty"):
        qdq.find_divergence(model, onnx, batches, dumps=tmp_path)
    np.save(tmp_path / f"0000_{list_codes(onnx)[0][0]}.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"its shape is \[3\]"):
        qdq.find_divergence(model, onnx, batches, dumps=tmp_path)
    np.save(tmp_path / f"0000_{list_codes(onnx)[0][0]}.npy", np.array(["a"]))
    with pytest.raises(DataError, match="is <U1, expected numbers"):
        qdq.find_divergence(model, onnx, batches, dumps=tmp_path)
    other = qdq.swap_modules(wrapped := nn.Sequential(nn.Conv2d(3, 4, 1)).eval())
    assert other is not None
    with pytest.raises(ArgumentError, match="no quantizer of the model has its name"):
        qdq.find_divergence(wrapped, onnx, batches)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.T, "is transposed"),
        (lambda w: w[::-1], "has the same values in another order"),
        (lambda w: 2 * w, "is 2 times that of a fresh export"),
        (lambda w: 0 * w, "is all zero"),
        (
            lambda w: w * np.array([[1], [2], [4]]),
            "is 1 to 4 times that of a fresh export in 2 of 3",
        ),
        (lambda w: w[:2], "has shape [2, 3], a fresh export has [3, 3]"),
        (lambda w: w + np.eye(3), "differs in 3 of 9 values, by at most 1"),
        (lambda w: w * np.array([[1], [2], [np.nan]]), "has NaN or infinite values"),
        (lambda w: w * np.array([[1], [np.inf], [1]]), "has NaN or infinite values"),
        (lambda w: w, ""),
    ],
)
def test_differences_of_constants(change, text):
    weight = np.random.default_rng(0).normal(size=(3, 3))
    assert compare_constants(weight, change(weight)).startswith(text)
    assert bool(text) == bool(compare_constants(weight, change(weight)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "are those of a fresh export"), (2, "value of fill is 2, a fresh export has 0")],
)
def test_tensor_attributes_are_compared_by_value(value, text):
    graphs = []
    for content in (0, value):
        shape = ir.val("shape", ir.DataType.INT64, [1])
        tensor = ir.tensor(np.array([content], np.float32))
        fill = ir.node("ConstantOfShape", [shape], {"value": tensor}, name="fill")
        fill.outputs[0].name = "filled"
        graph = ir.Graph([shape], fill.outputs, nodes=[fill], opset_imports={"": 17})
        graphs.append(ir.Model(graph, ir_version=8))
    causes = compare_graphs(*graphs, Site("filled", kind="output"))
    assert len(causes) == 1
    assert text in causes[0]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.view(2, -1),
        lambda x: x.transpose(1, 3),
        lambda x: x[:, 1:, ::2],
        lambda x: x.to(memory_format=torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_view_of_a_tensor_gets_its_codes(look, form):
    """As when a quantizer reads a tensor that another one with the same range has read before."""
    tensor = torch.randn(2, 4, 6, 5).to(memory_format=form)
    codes = tensor.round()
    if look(torch.zeros(1, 4, 6, 5)).dim() == 2 and form is torch.channels_last:
        return  # torch has no such view
    view = look(tensor)
    copied = _view_alike(tensor, view, codes.contiguous())
    if view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        assert torch.equal(copied, look(codes))
    else:
        assert copied is None


def test_a_tensor_beside_a_slice_is_no_view_of_it():
    halves = torch.randn(2, 4, 6).chunk(2, dim=1)
    assert _view_alike(halves[0], halves[1], halves[0].round()) is None


def test_codes_of_fp8_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, generator=generator) * 2.0 ** torch.arange(-12, 8).repeat(200)
    values = spread.clamp(-448, 448).double()
    grid = make_grid(np.ones(1), Format((4, 3)), None, 1)
    expected = values.to(torch.float8_e4m3fn).double()
    np.testing.assert_array_equal(grid.round(values.numpy()), expected.numpy())


def test_differences_of_values():
    values = np.random.default_rng(0).random((1, 4, 5, 5)) + 0.1
    one_channel, border = values.copy(), values.copy()
    one_channel[:, 2] += 1
    border[..., 0] = -1
    assert explain_values(values, one_channel) == ["1 of 4 channels differ"]
    assert "borders only" in explain_values(values, border)[-1]
    assert "as without a ReLU" in explain_values(values, border)[0]
    assert explain_values(values, 0 * values) == ["it is all zero"]
    assert explain_values(values, np.full_like(values, np.nan))[0].startswith("it has NaN")
