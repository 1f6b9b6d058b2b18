from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from backforward.models import Residual
from backforward.models.blocks import Blocks
from backforward.models.residual import ResidualBlock


def test_resnet20_has_the_published_size():
    """He et al. print 0.27 M; option A gives exactly this number."""
    model = Residual((3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert sum(p.ndim >= 2 for p in model.parameters()) == 20


@pytest.mark.parametrize("norm", ["none", "batch", "prop"])
def test_block_against_plain_operations(norm: str):
    torch.manual_seed(0)
    block = ResidualBlock(Blocks(norm), 4, 8, stride=2).eval()
    x = torch.randn(3, 4, 7, 7)
    before = x.clone()
    shortcut = torch.zeros(3, 8, 4, 4)
    shortcut[:, :4] = x[:, :, ::2, ::2]
    total = block.conv2(block.conv1(x)) + shortcut
    if norm == "prop":
        total[:, :4] /= 2**0.5
        expected = (F.relu(total) - 0.39894) / 0.58382
    else:
        expected = F.relu(total)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("c_out", "stride"), [(32, 1), (64, 2)])
def test_normprop_block_keeps_the_variance(c_out: int, stride: int):
    """With J = 1 and input N(0, 1), away from the padding."""
    torch.manual_seed(0)
    block = ResidualBlock(Blocks("prop", jacobian_factor="none"), 32, c_out, stride)
    out = block(torch.randn(32, 32, 20, 20))[:, :, 2:-2, 2:-2]
    assert abs(out.mean()) < 0.02
    assert abs(out.std() - 1) < 0.02


@pytest.mark.parametrize("depth", [7, 9, 2, 0])
def test_refuses_a_bad_depth_in_one_line(depth: int):
    with pytest.raises(ValueError, match=rf"^depth must be 8, 14, 20, .* got {depth}$"):
        Residual((3, 32, 32), 10, depth=depth)


def test_any_size_and_width():
    model = Residual((1, 8, 8), 5, depth=8, width=0.25, norm="none", dropout=0.1, activation="elu")
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 5)
