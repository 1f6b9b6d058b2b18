from __future__ import annotations

import pytest
import torch
from torch import nn

from backforward.models import NIN
from backforward.normprop import NormPropConv2d

SIDES = {"conv1": 0, "pool1": 1, "conv4": 1, "pool2": 2, "conv7": 3, "conv8": 4, "pool3": 5}


@pytest.mark.parametrize("norm", ["none", "batch", "prop"])
@pytest.mark.parametrize(
    ("shape", "sides"),
    [((3, 32, 32), (32, 16, 8, 4, 8, 1)), ((1, 28, 28), (28, 14, 7, 3, 7, 1))],
    ids=["cifar", "mnist"],
)
def test_layer_shapes_of_the_paper(norm: str, shape: tuple[int, ...], sides: tuple[int, ...]):
    model = NIN(shape, 10, width=0.1, norm=norm)
    seen: dict[str, torch.Size] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.shape}))
    assert model(torch.rand(2, *shape)).shape == (2, 10)
    for name, i in SIDES.items():
        assert seen[name][2:] == (sides[i], sides[i])


def test_parameters_of_the_paper():
    model = NIN((3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == 1_556_810
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    expected = [(192, 5, 2), (160, 1, 0), (96, 1, 0), (192, 5, 2), (192, 1, 0), (192, 1, 0), (192, 5, 0), (192, 1, 2)]
    assert [(c.out_channels, c.kernel_size[0], c.padding[0]) for c in convs] == [*expected, (10, 1, 0)]


def test_width_scales_the_filters():
    model = NIN((1, 28, 28), 7, width=0.25)
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [48, 40, 24, 48, 48, 48, 48, 48, 7]


def test_last_layer_of_normprop_is_plain_and_not_projected():
    model = NIN((1, 17, 17), 3, width=0.1, norm="prop")
    *hidden, last = (m for m in model.modules() if isinstance(m, NormPropConv2d))
    assert all(layer.project and layer.form == "relu" and layer.jacobian_factor == "exact" for layer in hidden)
    assert not last.project
    x = torch.randn(2, last.in_channels, 4, 4)
    direction = last.weight / last.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(last(x), nn.functional.conv2d(x, direction))


def test_layout_is_channels_last_throughout():
    model = NIN((3, 17, 17), 10, width=0.1, norm="prop")
    layouts = []
    for module in model.modules():
        module.register_forward_hook(
            lambda module, args, out: (
                layouts.append(out.is_contiguous(memory_format=torch.channels_last)) if out.ndim == 4 else None
            )
        )
    model(torch.rand(2, 3, 17, 17))
    assert layouts
    assert all(layouts)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((1, 8, 8), {}, "NIN needs at least 17 x 17 pixels, got 8 x 8: enlarge them"),
        ((3, 32, 16), {}, "NIN needs at least 17 x 17 pixels, got 32 x 16: enlarge them"),
        ((784,), {}, r"NIN needs images of shape \(channels, height, width\), got \(784,\)"),
        ((3, 32, 32), {"width": 0}, "width must be more than 0, got 0"),
        ((3, 32, 32), {"norm": "layer"}, "unknown norm 'layer': there are none, batch, prop"),
        ((3, 32, 32), {"dropout": -0.1}, "dropout must be at least 0 and less than 1, got -0.1"),
        ((3, 32, 32), {"jacobian_factor": "big"}, "unknown jacobian_factor 'big': there are none, paper, exact, or a"),
        ((3, 32, 32), {"classes": 0}, "classes must be at least 1, got 0"),
    ],
)
def test_refuses_bad_settings_in_one_line(shape: tuple[int, ...], settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match="^" + message) as error:
        NIN(shape, **{"classes": 10, **settings})
    assert "\n" not in str(error.value)


def test_smallest_image():
    assert NIN((1, 17, 17), 10, width=0.1, dropout=0.5)(torch.rand(2, 1, 17, 17)).shape == (2, 10)
