from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backforward.data_norm import DataNorm


def images(n: int = 700) -> Tensor:
    """Return uint8 images whose features differ in mean and spread; one pixel is constant, one nearly so."""
    generator = torch.Generator().manual_seed(0)
    level = torch.linspace(20, 200, 3 * 5 * 4).view(3, 5, 4)
    x = (level + torch.randn(n, 3, 5, 4, generator=generator) * level / 5).clamp(0, 255).to(torch.uint8)
    x[:, 1, 2, 3] = 9
    x[:, 0, 0, 0] = 0
    x[0, 0, 0, 0] = 1
    return x


@pytest.mark.parametrize(("kind", "dims"), [("global", (0,)), ("channel", (0, 2, 3))])
def test_global_and_channel_use_the_training_set(kind: str, dims: tuple[int, ...]):
    x = images().double() / 255
    std, mean = torch.std_mean(x, dim=dims, correction=0, keepdim=True)
    std[std < 1e-3] = 1
    layer = DataNorm.fit(kind, images())
    torch.testing.assert_close(layer(x.float()), ((x - mean) / std).float(), rtol=1e-4, atol=1e-5)
    assert not list(layer.parameters())
    given = DataNorm(kind, mean.squeeze(), std.squeeze())
    torch.testing.assert_close(given(x.float()), layer(x.float()))


def test_none_is_the_identity():
    x = torch.rand(2, 3, 5, 4)
    assert DataNorm.fit("none", images())(x) is x


def test_data_norm_by_the_batch():
    layer = DataNorm.fit("batch", images())
    batches = (images() / 255).split(100)
    for x in batches:
        var, mean = torch.var_mean(x, dim=0, correction=0)
        std = torch.where(var.sqrt() < 1e-3, 1, var.sqrt())
        torch.testing.assert_close(layer(x), (x - mean) / std, rtol=1e-4, atol=1e-5)
    layer.eval()
    mean = torch.stack([x.mean(0) for x in batches]).mean(0)
    std = torch.stack([x.var(0) for x in batches]).mean(0).sqrt()
    std[std < 1e-3] = 1
    x = batches[3]
    torch.testing.assert_close(layer(x), (x - mean) / std, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_batch_refuses_a_single_image():
    layer = DataNorm("batch", shape=(1, 4, 4))
    with pytest.raises(ValueError, match="at least 2 images"):
        layer(torch.rand(1, 1, 4, 4))
    assert layer.eval()(torch.rand(1, 1, 4, 4)).shape == (1, 1, 4, 4)


def test_fit_makes_no_float_copy_of_the_images():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                self.elements = max(self.elements, out.numel())
            return out

    x = torch.zeros(5000, 1, 2, 2, dtype=torch.uint8)
    with Largest() as largest:
        DataNorm.fit("global", x)
    assert 0 < largest.elements <= 256 * 4


def test_sums_of_a_chunk_are_exact():
    """For 256 white images the sum of squares is just below 2^24."""
    layer = DataNorm.fit("global", torch.full((1000, 1, 1, 1), 255, dtype=torch.uint8))
    assert layer(torch.ones(1, 1, 1, 1)).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DataNorm("pixel"), "unknown data norm 'pixel': there are global, channel, batch, none"),
        (lambda: DataNorm("global"), "data norm 'global' needs mean and std"),
        (lambda: DataNorm("batch"), "data norm 'batch' needs shape="),
    ],
)
def test_refuses_bad_arguments_in_one_line(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match="^" + message) as error:
        call()
    assert "\n" not in str(error.value)


def test_fit_refuses_images_that_are_not_uint8():
    with pytest.raises(TypeError, match="needs uint8 images"):
        DataNorm.fit("global", torch.rand(3, 1, 2, 2))
