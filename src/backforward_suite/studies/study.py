"""The input and output of a study."""

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
    """Builds the network of the settings, with its data norm first, on the host."""

    def __call__(self, seed: int, **changes: object) -> nn.Module:
        """Build it with the initial weights of a seed; `changes` replace arguments of the model in the settings."""


class Track(Protocol):
    """Shows the progress of a study."""

    def __call__(self, items: Iterable[Item], *, total: int, what: str) -> Iterable[Item]:
        """Yield the items; `total` is their number."""


def silently(items: Iterable[Item], *, total: int, what: str) -> Iterable[Item]:  # noqa: ARG001
    """Show nothing."""
    return items


@dataclass(frozen=True)
class Setting:
    """The input of a study.

    Attributes:
        seed: The seed of all random numbers.
        batch_size: Images in a mini-batch.
        data: The data set, split.
        make_network: Builds a network.
        make_optimizer: Makes the settings' optimizer for a network.
        make_rule: Makes the settings' update rule for a network and its optimizer, with the projection if it needs one.
        device: The device.
        dtype: The precision.
        track: Wraps long loops.
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
    """The output of a study.

    Attributes:
        final: Headline numbers by name.
        rows: One for each measurement; the keys are the columns of `study.csv`.
    """

    final: dict[str, float]
    rows: Sequence[Row]


class Study(Protocol):
    """A study."""

    def __call__(self, setting: Setting) -> Findings:
        """Run the study.

        Raises:
            BadInput: The settings make no sense for it.
        """
