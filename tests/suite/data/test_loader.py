"""Batches out of memory: order, shares of several processes, resuming."""

import io
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import batches as oracle
from torch import Tensor

from backforward_suite.data import EpochLoader, Images

exactly = settings(derandomize=True, deadline=None, max_examples=60)
Batches = list[tuple[Tensor, Tensor]]
ORDER_OF_SEED_7_EPOCH_2 = [9, 1, 8, 3, 4, 5, 2, 7, 6, 0]


def numbered(count: int, shape: tuple[int, int, int] = (2, 3, 4)) -> Images:
    """Return images of random bytes, each labelled with its own number."""
    x = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    return Images(x, torch.arange(count))


def same(one: Batches, other: Batches) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True)
    )


def epoch_of(loader: EpochLoader, epoch: int) -> Batches:
    loader.set_epoch(epoch)
    return list(loader)


@st.composite
def settings_of_loaders(draw: st.DrawFn) -> dict[str, Any]:
    ranks = draw(st.integers(1, 4))
    drop_last = draw(st.booleans())
    batch_size = ranks * draw(st.integers(1, 6)) if drop_last else draw(st.integers(ranks, 24))
    return {
        "count": draw(st.integers(batch_size if drop_last else ranks, 40)),
        "batch_size": batch_size,
        "world_size": ranks,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "epoch": draw(st.integers(0, 1000)),
        "drop_last": drop_last,
        "shuffle": draw(st.booleans()),
        "augment": draw(st.sampled_from(["none", "flip"])),
    }


def loaders(case: dict[str, Any]) -> tuple[Images, list[EpochLoader]]:
    """Return the images and one loader for each rank."""
    options = {key: value for key, value in case.items() if key not in ("count", "epoch")}
    images = numbered(case["count"])
    return images, [EpochLoader(images, rank=rank, **options) for rank in range(case["world_size"])]


@exactly
@given(settings_of_loaders())
def test_one_process_sees_what_the_slow_loader_makes(case: dict[str, Any]) -> None:
    images, (loader,) = loaders(case | {"world_size": 1})
    expected = oracle.epoch(
        images, case["batch_size"], case["seed"], case["epoch"], shuffle=case["shuffle"], augment=case["augment"]
    )
    if case["drop_last"] and len(images) % case["batch_size"]:
        expected.pop()
    assert same(epoch_of(loader, case["epoch"]), expected)
    assert len(loader) == len(expected)


@exactly
@given(settings_of_loaders())
def test_shares_of_all_ranks_make_up_the_global_batches(case: dict[str, Any]) -> None:
    images, ranks = loaders(case)
    shares = [epoch_of(loader, case["epoch"]) for loader in ranks]
    assert {len(batches) for batches in shares} == {len(ranks[0])}
    joined = [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*shares, strict=True)]
    whole = oracle.epoch(
        images, case["batch_size"], case["seed"], case["epoch"], shuffle=case["shuffle"], augment=case["augment"]
    )
    if case["drop_last"]:
        assert same(joined, whole[: len(joined)])
        assert all(len(y) == case["batch_size"] // case["world_size"] for batches in shares for _, y in batches)
        return
    # Every image once, in the order of one process, and no rank without a share of any batch.
    assert torch.equal(torch.cat([x for x, _ in joined]), torch.cat([x for x, _ in whole]))
    assert torch.equal(torch.cat([y for _, y in joined]), torch.cat([y for _, y in whole]))
    for batch in zip(*shares, strict=True):
        sizes = [len(y) for _, y in batch]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@exactly
@given(settings_of_loaders())
def test_every_epoch_is_a_permutation_of_its_own(case: dict[str, Any]) -> None:
    _, (loader,) = loaders(case | {"world_size": 1, "drop_last": False, "shuffle": True})
    first, again, other = (
        torch.cat([y for _, y in epoch_of(loader, case["epoch"] + step)]).tolist() for step in (0, 0, 1)
    )
    assert sorted(first) == list(range(case["count"]))
    assert first == again
    if case["count"] > 12:  # one in 12! is no accident any more
        assert first != other


@exactly
@given(settings_of_loaders(), st.data())
def test_a_saved_place_goes_on_with_the_next_batch_on_any_rank(case: dict[str, Any], data: st.DataObject) -> None:
    _, ranks = loaders(case)
    done = data.draw(st.integers(0, len(ranks[0])), label="batches before the state is taken")
    saver = ranks[data.draw(st.integers(0, len(ranks) - 1), label="rank that saves")]
    saver.set_epoch(case["epoch"])
    iterator = iter(saver)
    for _ in range(done):
        next(iterator)
    file = io.BytesIO()
    torch.save(saver.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for whole, fresh in zip(ranks, loaders(case)[1], strict=True):
        fresh.load_state_dict(state)
        assert fresh.state_dict() == state  # saved again before anything happened, nothing is lost
        fresh.set_epoch(case["epoch"])  # Lightning does, after it loaded the state
        rest = list(fresh)
        assert same(rest, epoch_of(whole, case["epoch"])[done:])
        assert same(epoch_of(fresh, case["epoch"] + 1), epoch_of(whole, case["epoch"] + 1))


def test_a_state_resumes_once_and_other_epochs_start_at_their_start() -> None:
    loader = EpochLoader(numbered(12), 4)
    state = {"epoch": 3, "batch": 2, "seed": 0, "batch_size": 4, "images": 12}
    loader.load_state_dict(state)
    assert len(list(loader)) == 1
    assert len(list(loader)) == 3  # once
    loader.load_state_dict(state)
    assert len(epoch_of(loader, 4)) == 3
    loader.load_state_dict(state | {"batch": 3})
    assert list(loader) == []
    assert loader.state_dict() == state | {"batch": 3}


def test_iterators_that_are_made_and_never_used_change_nothing() -> None:
    loader = EpochLoader(numbered(12), 4)
    loader.load_state_dict({"epoch": 1, "batch": 2, "seed": 0, "batch_size": 4, "images": 12})
    first = iter(loader)
    iter(loader)
    assert same(list(first), epoch_of(EpochLoader(numbered(12), 4), 1)[2:])


def test_an_iterator_made_before_set_epoch_belongs_to_the_epoch_set() -> None:
    loader = EpochLoader(numbered(12), 4)
    early = iter(loader)
    loader.set_epoch(5)
    assert same(list(early), epoch_of(EpochLoader(numbered(12), 4), 5))


def test_the_order_is_the_same_for_ever_and_moves_no_other_random_numbers() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loader = EpochLoader(numbered(10), 5, seed=7)
    assert torch.cat([y for _, y in epoch_of(loader, 2)]).tolist() == ORDER_OF_SEED_7_EPOCH_2
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.cat([y for _, y in epoch_of(loader, 2)]).tolist() == ORDER_OF_SEED_7_EPOCH_2


def test_every_byte_becomes_the_float_that_division_gives() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    ((x, y),) = EpochLoader(Images(bytes_, torch.tensor([3])), 1)
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == (torch.arange(256) / 255).tolist()
    assert x.min() == 0
    assert x.max() == 1
    assert y.tolist() == [3]


def test_flips_turn_half_of_the_images_left_to_right_and_no_label() -> None:
    images = numbered(2000, (1, 1, 2))
    images.x[:, 0, 0] = torch.tensor([10, 20], dtype=torch.uint8)
    ((x, _),) = EpochLoader(images, 2000, augment="flip")
    left = (x[:, 0, 0, 0] * 255).round()
    assert set(left.tolist()) == {10, 20}
    assert 900 < (left == 20).sum() < 1100  # 4.5 standard deviations of 2000 fair coins
    plain, flipped = (torch.cat([y for _, y in EpochLoader(images, 8, augment=name)]) for name in ("none", "flip"))
    assert torch.equal(plain, flipped)  # augmentation leaves the order alone


def test_images_are_held_once_and_a_batch_is_its_receivers() -> None:
    images = numbered(8)
    original = images.x.clone(), images.y.clone()
    loader = EpochLoader(images, 4, shuffle=False)
    assert loader.images.x.data_ptr() == images.x.data_ptr()
    kept = list(loader)
    copies = [(x.clone(), y.clone()) for x, y in kept]
    list(loader)
    assert same(kept, copies)
    for x, y in kept:
        x.zero_()
        y.zero_()
    assert torch.equal(images.x, original[0])
    assert torch.equal(images.y, original[1])


def test_a_loader_travels_to_another_process() -> None:
    loader = EpochLoader(numbered(9), 3, seed=4)
    assert same(epoch_of(pickle.loads(pickle.dumps(loader)), 1), epoch_of(loader, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be an integer >= 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: must be an integer >= 1"),
        ({"batch_size": 11}, "batch_size=11 is more than the 10 images there are to train on"),
        ({"world_size": 2}, "batch_size=3 does not divide among 2 processes; a multiple would"),
        (
            {"world_size": 4, "drop_last": False},
            "batch_size=3 does not divide among 4 processes; a multiple would",
        ),
        ({"rank": 1}, "rank=1 of world_size=1: ranks run from 0 to world_size - 1"),
        ({"seed": -1}, "seed=-1: must be an integer from 0 to 4294967295"),
        ({"seed": "1"}, "seed='1': must be an integer from 0 to 4294967295"),
        ({"augment": "crop"}, "augment='crop': there are none, flip"),
        (
            {"batch_size": 12, "world_size": 12, "drop_last": False},
            "10 images are too few for 12 processes",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        EpochLoader(numbered(10), **({"batch_size": 3} | options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "the position in the data is of another run: seed was 1 and is 0 now"),
        ({"batch_size": 2}, "the position in the data is of another run: batch_size was 2 and is 4 now"),
        ({"images": None}, "the position in the data is of another run: images was None and is 12 now"),
        ({"batch": 4}, "the position in the data is damaged: batch 4 of 3 in epoch 0"),
        ({"batch": "1"}, "the position in the data is damaged: batch 1 of 3 in epoch 0"),
        ({"epoch": -1}, "the position in the data is damaged: batch 1 of 3 in epoch -1"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    loader = EpochLoader(numbered(12), 4)
    state = {"epoch": 0, "batch": 1, "seed": 0, "batch_size": 4, "images": 12}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loader.load_state_dict(state | change)
    assert loader.state_dict() == state | {"batch": 0}


def test_epochs_are_counted_from_0() -> None:
    with pytest.raises(ValueError, match="epoch=-1: must be >= 0"):
        EpochLoader(numbered(3), 1).set_epoch(-1)
