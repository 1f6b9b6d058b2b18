"""One step on a few images: does it learn them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward.models.init import generator
from backforward.rules import Rule
from backforward_suite.errors import BadInput
from backforward_suite.studies.study import Findings, Row, Setting

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class OneStep:
    """One step of an update rule on a batch of a few images, over many fresh networks.

    Backforward Propagation claims that "one step at lr 1 on 4 images learns the batch" (Stoica & Simionescu, AAAI 2023,
    p. 2). Each draw has its own initial weights and images. Both are the same for every update rule, and the images are
    the same for every width. The loss after the step is computed on the same images, with the network in training mode.

    Rows of `study.csv`: ``width``, ``draw`` (from 0), ``loss_before``, ``loss_after``, ``accuracy_after`` (share of the
    images). In ``final``, for each width W: ``loss_before/q50/W``, ``loss_after/q10/W``, ``q25``, ``q50``, ``q75``,
    ``q90`` (an infinite or undefined loss ranks last) and ``accuracy_after/W`` (the mean). The reader of the rows
    decides which loss counts as learned.

    Args:
        draws: Number of networks of each width.
        images: Images in the batch.
        widths: Units of a hidden layer; replace the model's own.

    Raises:
        ValueError: A number is not an integer >= 1, or there is no width.
    """

    draws: int = 1000
    images: int = 4
    widths: Sequence[int] = (16, 64, 256, 1024)

    def __post_init__(self) -> None:
        for name, value in (("draws", self.draws), ("images", self.images), *(("widths", w) for w in self.widths)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"study.{name}={value!r}: must be an integer >= 1")
        if not self.widths:
            raise ValueError("study.widths: give at least one")

    def __call__(self, setting: Setting) -> Findings:
        """Take all the steps.

        Raises:
            BadInput: There are fewer training images than a batch has, or the network has no hidden width.
        """
        if self.images > len(setting.data.train):
            raise BadInput(f"study.images={self.images}: there are {len(setting.data.train)} training images")
        steps = {width: _Steps(setting, width, self.images) for width in self.widths}
        cases = list(product(self.widths, range(self.draws)))
        rows: list[Row] = [
            {"width": width, "draw": draw, **steps[width].take(draw)}
            for width, draw in setting.track(cases, total=len(cases), what="one step")
        ]
        final: dict[str, float] = {}
        for width in self.widths:
            final |= summary([row for row in rows if row["width"] == width], width)
        return Findings(final, rows)


class _Steps:
    """Steps of networks of one width.

    One network and its rule serve all draws, with new weights and a new optimizer state each time: preparing a rule for
    a network costs more than the step.
    """

    def __init__(self, setting: Setting, width: int, images: int) -> None:
        self._setting, self._width, self._images = setting, width, images
        self._network = self._fresh(0).to(setting.device, setting.dtype)
        self._optimizer = setting.make_optimizer(self._network)
        self._rule: Rule = setting.make_rule(self._network, self._optimizer)

    def _fresh(self, draw: int) -> nn.Module:
        try:
            return self._setting.make_network(draw_seed(self._setting.seed, draw), hidden=self._width)
        except TypeError as error:
            raise BadInput("study=one_step varies model.hidden, and this network has none; give model=mlp") from error

    def take(self, draw: int) -> dict[str, float]:
        """Take the step of one draw."""
        self._network.load_state_dict(self._fresh(draw).state_dict())
        self._optimizer.state.clear()
        chosen = chosen_images(self._setting, draw, self._images)
        x, y = self._setting.batch(self._setting.data.train.take(chosen))
        before = self._rule.step(x, y).loss
        with torch.no_grad():
            logits = self._network(x)
        after = F.cross_entropy(logits, y)
        hits = (logits.argmax(dim=1) == y).to(after.dtype).mean()
        measured: list[float] = torch.stack([before, after, hits]).tolist()
        return dict(zip(("loss_before", "loss_after", "accuracy_after"), measured, strict=True))


def chosen_images(setting: Setting, draw: int, images: int) -> Tensor:
    """The training images of a draw: the same for every method and width."""
    order = torch.randperm(len(setting.data.train), generator=generator(setting.seed, draw, "images"))
    return order[:images]


def draw_seed(seed: int, draw: int) -> int:
    """The seed of a draw's initial weights; no two pairs of seed and draw share one."""
    return (seed << 32) + draw


def summary(rows: Sequence[dict[str, Any]], width: int) -> dict[str, float]:
    """Headline numbers of the draws of one width."""
    before, after = (
        torch.tensor([row[key] for row in rows], dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
        for key in ("loss_before", "loss_after")
    )
    ranks = torch.tensor(QUANTILES, dtype=torch.float64)
    quantiles = after.quantile(ranks, interpolation="nearest").tolist()  # an actual value: infinities have no mean
    return {
        f"loss_before/q50/{width}": before.quantile(0.5, interpolation="nearest").item(),
        **{f"loss_after/q{100 * q:.0f}/{width}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
        f"accuracy_after/{width}": torch.tensor([row["accuracy_after"] for row in rows]).double().mean().item(),
    }
