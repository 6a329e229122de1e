"""Every state of the quantizers, replayed: the very bits of a full forward."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq import (
    analyze_layers,
    calibrate_model,
    disable_quantization,
    rewire_operations,
    swap_modules,
)
from qdq.analyze import replay as replay_module
from qdq.analyze.replay import Replay
from qdq.forward import call_model, evaluating
from qdq.quantizer import named_quantizers, toggling
from qdq.units import find_units


class Branches(nn.Module):
    """A stem with everything behind it that data can do: residual, concat, a shared layer, in place, several inputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.right = nn.Conv2d(16, 16, 1)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.mix = nn.Conv2d(32, 16, 1)
        self.act = nn.ReLU(inplace=True)
        self.cap = nn.ReLU6(inplace=True)
        self.head = nn.Linear(16, 16)

    def forward(self, images, bias=None):
        x = self.act(self.stem(images))
        a = self.cap(self.left(x))
        a += x
        b = F.relu(self.right(x), inplace=True)
        x = torch.cat([a, self.shared(b)], 1)
        x = self.shared(self.mix(x))
        first, second = x.chunk(2, 1)
        x = torch.cat([first * second.sigmoid(), second], 1)
        mean = x.mean((2, 3))
        mean.mul_(2)
        if bias is not None:
            mean = mean + bias
        rows = [row * 1.5 for row in mean]
        return {"scores": self.head(torch.stack(rows)), "size": mean.shape[0]}


class Statements(nn.Module):
    """Writes in place as statements: the result of the call is not used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x):
        x = self.first(x)
        alias = x
        x.add_(1)
        x[:, 0] = 3.0
        F.relu(x, inplace=True)
        return self.second(x) + alias


class OnAView(Statements):
    """Writes through a view, which identities do not show."""

    def forward(self, x):
        x = self.first(x)
        x[:, :4].mul_(2)
        return self.second(x)


class Noise(Statements):
    def forward(self, x):
        return self.second(self.first(x) + torch.rand(16))


class Choice(Statements):
    """Another path where the numbers say so, and a cache on the module."""

    def forward(self, x):
        x = self.first(x)
        if x.sum().item() > float(self.limit):
            return self.second(x)
        return self.second(x.abs() + 1)


def prepare(model, batch, rewire=True):
    model.eval()
    swap_modules(model, batch, include=["*"])
    if rewire:
        rewire_operations(model, batch)
    calibrate_model(model, [batch], method="max")
    return model


def replayed(model, batch, variants, **options):
    replay = Replay(model, always=True, **options)
    results = {}
    replay.evaluate(batch, variants, results.__setitem__)
    return replay, results


def assert_identical(model, batch, variants, results):
    assert set(results) == {None, *variants}
    for name, outputs in results.items():
        with evaluating(model), toggling(variants[name] if name is not None else ()):
            expected = call_model(model, batch)
        for item, twin in zip(items_of(outputs), items_of(expected), strict=True):
            if isinstance(twin, torch.Tensor):
                assert torch.equal(item, twin), name
            else:
                assert item == twin, name


def items_of(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs.values())


def variants_of(model, batch):
    return {unit.name: unit.quantizers for unit in find_units(model, batch)}


@pytest.mark.parametrize("is_float", [False, True])
def test_branches(is_float):
    batch = torch.randn(4, 3, 12, 12)
    model = prepare(Branches(), batch)
    variants = variants_of(model, batch)
    assert len(variants) >= 6
    if is_float:
        disable_quantization(model)
    replay, results = replayed(model, batch, variants)
    assert replay.reason == ""
    assert_identical(model, batch, variants, results)


def test_several_inputs_by_keyword():
    batch = {"images": torch.randn(2, 3, 8, 8), "bias": torch.randn(16)}
    model = prepare(Branches(), batch)
    variants = variants_of(model, batch)
    replay, results = replayed(model, batch, variants)
    assert replay.reason == ""
    assert_identical(model, batch, variants, results)


def test_statements_in_place():
    batch = torch.randn(4, 16)
    model = prepare(Statements(), batch, rewire=False)
    variants = variants_of(model, batch)
    replay, results = replayed(model, batch, variants)
    assert replay.reason == ""
    assert_identical(model, batch, variants, results)


@pytest.mark.parametrize(
    ("kind", "reason"), [(OnAView, "differs from a plain one"), (Noise, "random numbers")]
)
def test_what_cannot_be_replayed_is_evaluated_in_full(kind, reason):
    batch = torch.randn(4, 16)
    model = prepare(kind(), batch, rewire=False)
    variants = variants_of(model, batch)
    replay, results = replayed(model, batch, variants)
    assert reason in replay.reason
    if kind is OnAView:
        assert_identical(model, batch, variants, results)


def test_another_path_through_the_model():
    batch = torch.randn(4, 16)
    model = Choice()
    model.limit = float("-inf")
    prepare(model, batch, rewire=False)
    variants = {**variants_of(model, batch), "both": [q for _, q in named_quantizers(model)]}
    with evaluating(model):
        sums = {}
        for name in variants:
            with toggling(variants[name]):
                sums[name] = model.first(batch).sum().item()
        base = model.first(batch).sum().item()
    model.limit = (base + sums["first"]) / 2  # the two states of `first` take different paths
    replay, results = replayed(model, batch, variants)
    assert replay.reason == ""
    assert_identical(model, batch, variants, results)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        return x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


def test_a_deep_network_that_leaves_the_recorded_path():
    """Attention in FP8 is computed in steps, in float by one call: each value on the way there is computed once.

    Every block reads its input four times, so the recursion over all readers would take 4^10 steps.
    """
    batch = torch.randn(2, 16, 32)
    model = nn.Sequential(*(Block() for _ in range(10))).eval()
    swap_modules(model, batch, formats=("fp8",))
    rewire_operations(model, batch, formats=("fp8",))
    calibrate_model(model, [batch], method="max")
    variants = variants_of(model, batch)
    attention = [name for name in variants if name.endswith("scaled_dot_product_attention")]
    disable_quantization(model)
    some = {name: variants[name] for name in (attention[0], attention[-1], "9.query")}
    replay, results = replayed(model, batch, some)
    assert replay.reason == ""
    assert_identical(model, batch, some, results)


def test_values_on_disk_are_the_same(monkeypatch):
    mapped = []
    original = replay_module._map_to_file
    monkeypatch.setattr(
        replay_module, "_map_to_file", lambda tensor: mapped.append(1) or original(tensor)
    )
    batch = torch.randn(4, 3, 12, 12)
    model = prepare(Branches(), batch)
    variants = variants_of(model, batch)
    _, results = replayed(model, batch, variants, cache_bytes=1000)
    assert mapped
    assert_identical(model, batch, variants, results)


class Standardized(nn.Linear):
    """A layer that computes its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, weight, self.bias)


@pytest.mark.parametrize("kind", [nn.Linear, Standardized])
@pytest.mark.parametrize(("cache_bytes", "stored_weights"), [(2**30, 6), (2**23, 4), (2**20, 0)])
@pytest.mark.parametrize("is_float", [False, True])
def test_weights_are_kept_once_for_all_batches(
    monkeypatch, kind, cache_bytes, stored_weights, is_float
):
    """Six weights of 1 MiB; half of the cache is theirs, and no file."""
    mapped = []
    original = replay_module._map_to_file
    monkeypatch.setattr(
        replay_module,
        "_map_to_file",
        lambda tensor: mapped.append(tensor.nbytes) or original(tensor),
    )
    layers = [nn.Linear(512, 512), *(kind(512, 512) for _ in range(5))]
    batches = [torch.randn(1, 512) for _ in range(3)]
    model = prepare(nn.Sequential(*layers), batches[0])
    variants = variants_of(model, batches[0])
    if is_float:
        disable_quantization(model)
    replay, peak = Replay(model, cache_bytes=cache_bytes, always=True), 0

    def measure(name, outputs):
        nonlocal peak
        results[name] = outputs
        peak = max(peak, replay._memory.used)

    for batch in batches:
        results = {}
        replay.evaluate(batch, variants, measure)
        assert_identical(model, batch, variants, results)
        assert replay._memory.used == stored_weights * 2**20
    assert replay.reason == ""
    activations = 8 * 2 * 512 * 4  # those of a batch, before and behind their quantizers
    assert peak <= min(stored_weights * 2**20 + activations, cache_bytes)
    assert sum(mapped) <= len(batches) * activations


def test_a_weight_that_changes_between_batches_is_quantized_again():
    batches = [torch.randn(4, 16), torch.randn(4, 16)]
    model = prepare(
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)), batches[0]
    )
    variants = variants_of(model, batches[0])
    replay = Replay(model, always=True)
    for batch in batches:
        results = {}
        replay.evaluate(batch, variants, results.__setitem__)
        assert_identical(model, batch, variants, results)
        with torch.no_grad():
            model[0].weight.mul_(-0.5)
        model[1].weight = nn.Parameter(torch.randn(16, 16))


class Parts(Branches):
    """Keeps views, and parts of larger tensors."""

    def forward(self, images):
        x = self.act(self.stem(images))
        first, second = x.split(8, 1)
        x = torch.cat([self.left(x)[:, ::2], second, first], 1)
        return {"scores": self.head(self.shared(self.right(x[:, :16])).mean((2, 3)))}


@pytest.mark.parametrize("limit", [20_000, 60_000, 150_000])
def test_the_cache_holds_no_more_than_it_may(monkeypatch, limit):
    batch = torch.randn(4, 3, 12, 12)
    model = prepare(Parts(), batch)
    variants = variants_of(model, batch)
    stores, results, used = [], {}, []
    begin = replay_module._Values.__init__

    def remember(values, memory):
        stores.append(values)
        begin(values, memory)

    def measure(name, outputs):
        results[name] = outputs
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for store in stores
            for number, tensor in store._tensors.items()
            if number not in store._devices
        }
        used.append(sum(storages.values()) + replay._weights._bytes)

    monkeypatch.setattr(replay_module._Values, "__init__", remember)
    replay = Replay(model, cache_bytes=limit, always=True)
    replay.evaluate(batch, variants, measure)
    assert 0 < max(used) <= limit
    assert_identical(model, batch, variants, results)


def count_calls(monkeypatch, name):
    """A list that gets an entry for each call of a function of the module."""
    calls = []
    original = getattr(replay_module, name)
    monkeypatch.setattr(replay_module, name, lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.mark.parametrize("kind", [Branches, Parts])
def test_values_of_a_gpu_go_to_the_host_and_then_to_files(monkeypatch, gpu, kind):
    batch = torch.randn(4, 3, 12, 12)
    model = prepare(kind(), batch).to(gpu)
    variants = variants_of(model, batch)
    copied = count_calls(monkeypatch, "_copy_to_host")
    mapped = count_calls(monkeypatch, "_map_to_file")
    replay, results = replayed(model, batch, variants)
    assert not copied
    assert_identical(model, batch, variants, results)

    replay, results = replayed(model, batch, variants, cache_bytes=60_000)
    assert len(copied) > 0
    assert len(mapped) > 0
    assert replay.reason == ""
    assert_identical(model, batch, variants, results)
    assert replay._memory.used_on_host == 0

    copied.clear()
    mapped.clear()
    monkeypatch.setattr(replay_module, "_limit_memory", lambda device, limit: 0)
    replay, results = replayed(model, batch, variants)
    assert len(copied) > 0
    assert not mapped
    assert_identical(model, batch, variants, results)


def test_a_value_comes_back_with_its_strides(gpu):
    store = replay_module._Values(replay_module._Memory(0, 2**20))
    memory = torch.randn(4, 6, 8, device=gpu)
    views = [memory, memory[:, 1:4], memory.transpose(0, 2), memory[1].expand(3, 6, 8)]
    for number, view in enumerate(views):
        store[number] = view
    for number, view in enumerate(views):
        copy = store.get(number)
        assert copy.device == gpu
        assert copy.stride() == view.stride()
        assert torch.equal(copy, view)


@pytest.mark.parametrize("is_recording", [True, False])
def test_a_gpu_without_memory_stores_on_the_host(monkeypatch, device, is_recording):
    """Planted: the device takes a few values, and then nothing."""
    batch = torch.randn(4, 3, 12, 12)
    model = prepare(Branches(), batch).to(device)
    variants = variants_of(model, batch)
    replay = Replay(model, always=True)
    refused = []

    def refuse(name):
        run = getattr(replay_module._Recording, name)

        def run_or_refuse(recording, batch):
            outputs = run(recording, batch)
            if any(
                number not in recording._values._devices for number in recording._values._tensors
            ):
                refused.append(name)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return outputs

        monkeypatch.setattr(replay_module._Recording, name, run_or_refuse)

    refuse("record" if is_recording else "replay")
    results = {}
    replay.evaluate(batch, variants, results.__setitem__)
    assert len(refused) == 1
    assert replay.reason == ""
    assert_identical(model, batch, variants, results)
    assert replay._memory.used == replay._weights._bytes


class FreeMemory:
    """The functions of torch.cuda that tell the memory of a GPU with 10,000 bytes for us."""

    def mem_get_info(self, device):
        return 8_000, 80_000

    def memory_reserved(self, device):
        return 5_000

    def memory_allocated(self, device):
        return 3_000


def test_half_of_the_free_memory_at_most(monkeypatch):
    monkeypatch.setattr(torch, "cuda", FreeMemory())
    assert replay_module._limit_memory(torch.device("cuda"), 2**30) == 5_000
    assert replay_module._limit_memory(torch.device("cuda"), 100) == 100
    assert replay_module._limit_memory(torch.device("cpu"), 2**30) == 2**30
    monkeypatch.setattr(
        replay_module.os, "sysconf", {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.get
    )
    assert replay_module._limit_host(torch.device("cuda"), 2**30) == 6_144
    assert replay_module._limit_host(torch.device("cpu"), 2**30) == 0


def test_only_what_changes_is_computed(monkeypatch, device):
    """Also for a model on a GPU with batches on the CPU, which are moved."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(10)))
    batch = torch.randn(4, 16)
    prepare(model, batch, rewire=False).to(device)
    variants = variants_of(model, batch)
    calls = []
    run = replay_module._run

    def count(compute, tensors, in_place):
        calls.append(len(tensors) > 1)
        return run(compute, tensors, in_place)

    monkeypatch.setattr(replay_module, "_run", count)
    replayed(model, batch, variants)
    # Two recordings, then each layer and what follows it.
    assert sum(calls) == 10 + 10 + sum(range(1, 11))


@pytest.mark.parametrize(("slowdown", "is_replayed"), [(1.2, True), (3.0, False)])
def test_full_forwards_where_bookkeeping_costs_more_than_it_saves(
    monkeypatch, slowdown, is_replayed
):
    """The clock says how much longer a recording takes than a plain forward; the results are the same."""
    batches = [torch.randn(4, 16) for _ in range(3)]
    model = prepare(nn.Sequential(*(nn.Linear(16, 16) for _ in range(10))), batches[0])
    variants = variants_of(model, batches[0])
    counts = {"record": 0, "replay": 0}
    for step in counts:
        original = getattr(replay_module._Recording, step)

        def count(recording, batch, step=step, original=original):
            counts[step] += 1
            return original(recording, batch)

        monkeypatch.setattr(replay_module._Recording, step, count)

    def tell_time(run):
        recorded = counts["record"]
        return run(), slowdown if counts["record"] > recorded else 1.0

    monkeypatch.setattr(replay_module, "_time_outputs", tell_time)
    replay = Replay(model)
    for batch in batches:
        results = {}
        replay.evaluate(batch, variants, results.__setitem__)
        assert_identical(model, batch, variants, results)
        assert replay._memory.used == replay._weights._bytes
    assert counts == ({"record": 4, "replay": 30} if is_replayed else {"record": 2, "replay": 0})
    assert replay.reason == ""


def test_few_variants_are_not_worth_a_recording(monkeypatch):
    batch = torch.randn(4, 16)
    model = prepare(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))), batch)
    variants = variants_of(model, batch)
    monkeypatch.setattr(replay_module, "_Recording", None)
    results = {}
    replay = Replay(model)
    replay.evaluate(batch, variants, results.__setitem__)
    assert_identical(model, batch, variants, results)
    assert replay.reason == ""


def test_the_model_is_as_it_was():
    batch = torch.randn(4, 3, 12, 12)
    model = prepare(Branches(), batch).train()
    states = states_of(model)
    replayed(model, batch, variants_of(model, batch))
    assert model.training
    assert states_of(model) == states


def states_of(model):
    """Whether each quantizer is on, and what stands in for its forward."""
    states = {}
    for name, quantizer in named_quantizers(model):
        states[name] = (vars(quantizer).get("forward"), quantizer.is_enabled)
    return states


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet"])
def test_torchvision(name):
    torchvision = pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    options = {"init_weights": False} if name == "googlenet" else {}
    batch = torch.randn(2, 3, 64, 64)
    model = prepare(torchvision.models.get_model(name, weights=None, **options), batch)
    variants = dict(list(variants_of(model, batch).items())[::6])
    replay, results = replayed(model, batch, variants)
    assert replay.reason == ""
    assert_identical(model, batch, variants, results)


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_resnet50(mode):
    """Every tenth unit, against full forwards."""
    torchvision = pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    batch = torch.randn(2, 3, 64, 64)
    model = prepare(torchvision.models.resnet50(weights=None), batch)
    variants = dict(list(variants_of(model, batch).items())[::10])
    if mode == "one-at-a-time":
        disable_quantization(model)
    replay, results = replayed(model, batch, variants)
    assert replay.reason == ""
    assert_identical(model, batch, variants, results)


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_the_screen_takes_what_the_replay_takes(mode):
    batch = torch.randn(4, 3, 12, 12)
    model = prepare(Branches(), batch)
    layers = analyze_layers(model, [batch], mode=mode, confirm=0).layers
    assert {layer.name for layer in layers} == set(variants_of(model, batch))
    assert all(math.isfinite(layer.sqnr_db) for layer in layers)


class Called(nn.Module):
    """A layer, then a function that is quantized, in one forward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.weight = nn.Parameter(torch.randn(32, 64) / 8)
        self.last = nn.Linear(32, 16)

    def forward(self, x):
        return self.last(torch.relu(F.linear(torch.relu(self.first(x)), self.weight)))


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_the_screen_runs_a_layer_before_a_quantized_call(mode):
    batch = torch.randn(64, 32)
    model = prepare(Called(), batch)
    exact = sqnr_of_layers(model, batch, mode=mode)
    screened = sqnr_of_layers(model, batch, mode=mode, confirm=0)
    assert set(screened) == {"first", "linear", "last"}
    assert screened == pytest.approx(exact, abs=1.5)


def sqnr_of_layers(model, batch, **options):
    layers = analyze_layers(model, [batch], **options).layers
    return {layer.name: layer.sqnr_db for layer in layers}


class Attentive(nn.Module):
    """Attention, which calls a quantized layer of its own when the screen runs it again."""

    def __init__(self, needs_weights):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.last = nn.Linear(32, 32)
        self.needs_weights = needs_weights

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + self.attention(x, x, x, need_weights=self.needs_weights)[0])


@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_the_screen_of_attention(mode, needs_weights):
    batch = torch.randn(16, 8, 32)
    model = prepare(Attentive(needs_weights), batch)
    exact = sqnr_of_layers(model, batch, mode=mode)
    screened = sqnr_of_layers(model, batch, mode=mode, confirm=0)
    assert {"attention", "attention.out_proj"} <= set(screened)
    assert screened == pytest.approx(exact, abs=2)
