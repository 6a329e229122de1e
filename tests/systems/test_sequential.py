"""Which forwards of a Sequential run a quantizer that is put between two children, and change in no other way."""

import functools

import pytest
import torch
from torch import nn

from qdq.systems import duplicate_model_with_quant
from qdq.systems.sequential import runs_children_in_order


class Loop(nn.Sequential):
    def forward(self, x):
        x = x * 2
        for layer in self:
            x = layer(x)
        return x / 2


class OtherNames(nn.Sequential):
    def forward(this, values):  # noqa: N805
        if this.training:
            values = values + 1
        for child in this:
            values = child(values)
        return values


class Twice(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        for layer in self:
            x = layer(x)
        return x


class Scaled(nn.Sequential):
    limit = 3.0

    def __init__(self, *layers):
        super().__init__(*layers)
        self.gain = nn.Parameter(torch.ones(()))
        self.offset = 0.5

    def forward(self, x):
        return super().forward(x * self.gain + self.offset).clamp(max=self.limit)


class Grandchild(Scaled):
    def forward(self, x):
        return super().forward(x) + x


PLAIN = [nn.Sequential, Loop, OtherNames, Twice, Scaled, Grandchild]


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_forwards_take_quantizers_that_change_nothing_but_values(kind):
    model = kind(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    assert runs_children_in_order(model)
    values = torch.randn(5, 4)
    quantized = duplicate_model_with_quant(model, 16, counter=4)
    assert len(quantized) == 5
    assert torch.equal(quantized(values), model(values))  # while they calibrate


class Residual(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = x + layer(x)
        return x


class Collecting(nn.Sequential):
    def forward(self, x):
        outputs = []
        for layer in self:
            x = layer(x)
            outputs.append(x)
        return sum(outputs)


class Counting(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x / len(self)


class Choosing(nn.Sequential):
    def forward(self, x):
        for layer in self:
            if isinstance(layer, nn.Linear):
                x = layer(x)
        return x


class Stopping(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
            break
        return x


class Scaling(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x) * 0.5
        return x


class Keywords(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x, flag=True)
        return x


class Numbered(nn.Sequential):
    def forward(self, x):
        for number, layer in enumerate(self):
            x = layer(x) * number
        return x


class Children(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x + sum(1 for _ in self.children())


class Inner(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x + len(self._modules)


class Method(nn.Sequential):
    def last(self, x):
        return self[-1](x)

    def forward(self, x):
        return self.last(super().forward(x))


class Property(nn.Sequential):
    @property
    def count(self):
        return len(self)

    def forward(self, x):
        return super().forward(x) / self.count


class Alias(nn.Sequential):
    def forward(self, x):
        layers = self
        return layers[1](layers[0](x))


class PicksBelow(Alias):
    def forward(self, x):
        return super().forward(x) * 2


class OtherSuper(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + super().__len__()


class Reversed(nn.Sequential):
    def __iter__(self):
        return iter(list(self._modules.values())[::-1])


class Called(nn.Sequential):
    def __call__(self, x):
        return self[0](x)


def twice(forward):
    @functools.wraps(forward)
    def run(self, x):
        return forward(self, x) + len(self)

    return run


class Decorated(nn.Sequential):
    @twice
    def forward(self, x):
        return super().forward(x)


class Wrapped(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


Wrapped.forward = twice(Wrapped.forward)

OTHERS = [
    Residual,
    Collecting,
    Counting,
    Choosing,
    Stopping,
    Scaling,
    Keywords,
    Numbered,
    Children,
    Inner,
    Method,
    Property,
    Alias,
    PicksBelow,
    OtherSuper,
    Reversed,
    Called,
    Decorated,
    Wrapped,
]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_forwards_take_none_and_are_reported(kind, caplog):
    model = kind(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    assert not runs_children_in_order(model)
    quantized = duplicate_model_with_quant(model, 8)
    assert list(quantized._modules) == ["0", "1"]
    assert f"{kind.__name__} has a forward of its own" in caplog.text


def test_a_function_in_the_object_is_looked_at():
    model = Scaled(nn.Linear(4, 4))
    model.offset = lambda: model[0]
    assert not runs_children_in_order(model)
