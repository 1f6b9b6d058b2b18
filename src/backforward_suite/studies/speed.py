"""The time that normalisation costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backforward.models.blocks import NORMS
from backforward_suite.errors import BadInput
from backforward_suite.studies.study import Findings, Row, Setting
from backforward_suite.timing import interleaved

RATIOS = (("prop", "batch"), ("prop", "none"))


@dataclass(frozen=True)
class Speed:
    """Time of a training step without norm, with BatchNorm and with NormProp, interleaved over many rounds.

    The paper reports 84 s an epoch against BatchNorm's 96 s, a ratio of .875, on a Titan X (Arpit et al., 5.6). The
    step is the one that training takes on the same batch of training images: data norm, update rule, optimizer and,
    for NormProp, the projection to unit norm.

    Rows of `study.csv`: ``norm``, ``round`` (from 1), ``time/step_ms``.

    In ``final``: ``steps_per_epoch``; for each norm ``time/median_ms/NORM``, ``time/spread_ms/NORM`` (distance between
    the quartiles of the rounds) and ``time/extrapolated_epoch_seconds/NORM``, which is the median step times the steps
    of an epoch on this training set: no epoch was run. ``time/ratio/prop_batch`` and ``time/ratio/prop_none`` are
    medians over rounds of the ratio within a round; its quartiles are ``time/ratio_low/...``, ``time/ratio_high/...``.

    Args:
        rounds: Turns of each norm.
        seconds_a_turn: Length of a turn; at least one step.

    Raises:
        ValueError: There is less than one round, or a turn of negative length.
    """

    rounds: int = 15
    seconds_a_turn: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"study.rounds={self.rounds!r}: must be an integer >= 1")
        if not self.seconds_a_turn >= 0:
            raise ValueError(f"study.seconds_a_turn={self.seconds_a_turn!r}: must be a number >= 0")

    def __call__(self, setting: Setting) -> Findings:
        """Time the steps.

        Raises:
            BadInput: There are fewer training images than a batch has.
        """
        steps_per_epoch, rest = divmod(len(setting.data.train), setting.batch_size)
        if not steps_per_epoch:
            raise BadInput(f"batch_size={setting.batch_size}: must be <= {rest}, the number of training images")
        arms = {norm: _step(setting, norm) for norm in NORMS}
        times = interleaved(arms, self.rounds, self.seconds_a_turn, setting.device)
        rows: list[Row] = [
            {"norm": norm, "round": number, "time/step_ms": milliseconds}
            for norm, timing in times.items()
            for number, milliseconds in enumerate(timing.rounds, start=1)
        ]
        final: dict[str, float] = {"steps_per_epoch": steps_per_epoch}
        for norm, timing in times.items():
            final[f"time/median_ms/{norm}"] = timing.median
            final[f"time/spread_ms/{norm}"] = timing.spread
            final[f"time/extrapolated_epoch_seconds/{norm}"] = timing.median * steps_per_epoch / 1000
        for ours, theirs in RATIOS:
            low, middle, high = times[ours].ratio_quartiles(times[theirs])
            final[f"time/ratio/{ours}_{theirs}"] = middle
            final[f"time/ratio_low/{ours}_{theirs}"] = low
            final[f"time/ratio_high/{ours}_{theirs}"] = high
        return Findings(final, rows)


def _step(setting: Setting, norm: str) -> Callable[[], object]:
    """A training step under one norm, as a call; every norm has the same initial weights and images."""
    network = setting.network(setting.seed, norm=norm)
    rule = setting.make_rule(network, setting.make_optimizer(network))
    x, y = setting.batch(setting.data.train.take(slice(setting.batch_size)))
    return lambda: rule.step(x, y)
