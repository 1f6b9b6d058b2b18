"""Labelled images as bytes."""

import pytest
import torch
from torch import Tensor

from backforward_suite.data import Images


def images(x: Tensor) -> Images:
    return Images(x, torch.arange(len(x)))


def test_taking_by_index_copies_and_by_slice_shares() -> None:
    all_ = images(torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2))
    some = all_.take(torch.tensor([4, 1]))
    assert len(some) == 2
    assert some.y.tolist() == [4, 1]
    assert torch.equal(some.x, all_.x[[4, 1]])
    assert all_.take(slice(2, 4)).x.data_ptr() == all_.x[2].data_ptr()
    assert all_.to("cpu").x.data_ptr() == all_.x.data_ptr()


def test_doubling_interpolates_between_the_centres_of_pixels() -> None:
    """Each new pixel is a quarter of a pixel from the nearest centre; beyond the outer centres nothing changes."""
    x = torch.tensor([[[[0, 40], [80, 120]]]], dtype=torch.uint8)
    row = torch.tensor([0, 10, 30, 40])
    expected = row[None] + 2 * row[:, None]
    assert torch.equal(images(x).resize(4).x[0, 0], expected.to(torch.uint8))


def test_halving_averages_over_what_a_pixel_covers() -> None:
    x = torch.tensor([[[[100, 200, 0, 0], [100, 200, 0, 0], [50, 50, 9, 9], [50, 50, 9, 9]]]], dtype=torch.uint8)
    small = images(x).resize(2).x
    # A triangle of two new pixels' width: 3/7, 3/7 of the own ones and 1/7 of the next one.
    halve = torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    assert torch.allclose(small[0, 0].float(), halve @ x[0, 0].float() @ halve.T, atol=0.5)


def test_resizing_goes_through_all_blocks_and_the_same_size_is_no_copy() -> None:
    many = images(torch.randint(0, 256, (2500, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    big = many.resize(3)
    for index in (0, 1023, 1024, 2499):
        assert torch.equal(big.x[index], images(many.x[index : index + 1]).resize(3).x[0])
    assert big.x.shape == (2500, 1, 3, 3)
    assert torch.equal(big.y, many.y)
    assert many.resize(2) is many


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 1, 1, 1), torch.arange(2), "images are uint8 with int64 labels, got torch.float32 with"),
        (torch.zeros(2, 1, 1, dtype=torch.uint8), torch.arange(2), r"images are \[N, C, H, W\] with labels \[N\], got"),
        (torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.arange(3), r"got \[2, 1, 1, 1\] with \[3\]"),
    ],
)
def test_other_tensors_are_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Images(x, y)
