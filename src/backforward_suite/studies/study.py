"""What a study is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from backforward.rules import Rule
from backforward_suite.data import DataSplits, Images

Item = TypeVar("Item")
Row: TypeAlias = dict[str, float | int | str | None]


class MakeNetwork(Protocol):
    """Builds the network that the settings name, its data norm first, on the host."""

    def __call__(self, seed: int, **changes: object) -> nn.Module:
        """With these initial weights; `changes` replace arguments of the model in the settings."""


class Track(Protocol):
    """Shows how far a study is."""

    def __call__(self, items: Iterable[Item], *, total: int, what: str) -> Iterable[Item]:
        """The items, one by one; `total` is their number."""


def silently(items: Iterable[Item], *, total: int, what: str) -> Iterable[Item]:  # noqa: ARG001
    """Show nothing."""
    return items


@dataclass(frozen=True)
class Setting:
    """What a study has to work with.

    Attributes:
        seed: Of all that is drawn.
        batch_size: Images in a mini-batch.
        data: The data set, split.
        make_network: Builds a network.
        make_optimizer: Puts the settings' optimizer to a network.
        make_rule: Puts the settings' update rule to a network and its optimizer, and the projection if it needs one.
        device: Where to compute.
        dtype: In what precision.
        track: Wraps a loop that may take a while.
    """

    seed: int
    batch_size: int
    data: DataSplits
    make_network: MakeNetwork
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    make_rule: Callable[[nn.Module, torch.optim.Optimizer], Rule]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    track: Track = silently

    def network(self, seed: int, **changes: object) -> nn.Module:
        """A network on the device, in this precision."""
        return self.make_network(seed, **changes).to(self.device, self.dtype)

    def batch(self, images: Images) -> tuple[Tensor, Tensor]:
        """Inputs in [0, 1] ``[N, C, H, W]`` and labels ``[N]`` on the device."""
        return images.x.to(self.device, self.dtype) / 255, images.y.to(self.device)


class Findings(NamedTuple):
    """What a study found.

    Attributes:
        final: Headline numbers by name.
        rows: One a measurement; their keys are the columns of `study.csv`.
    """

    final: dict[str, float]
    rows: Sequence[Row]


class Study(Protocol):
    """Something to find out."""

    def __call__(self, setting: Setting) -> Findings:
        """Find out.

        Raises:
            BadInput: The settings make no sense for it.
        """
