"""The answer in five sentences, made from the verdicts: numbers and verdicts are read, only the frame is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from backforward_suite.report.finding import Estimate, Finding, Kind, Verdict

BFP, NORM = "bfp_learning_rates.", "bfp_weight_norm."


def sentences(findings: Iterable[Finding]) -> tuple[str, ...]:
    """One each on the shift, on speed, on the published gain, on weights and rates, on NormProp.

    Each says what was measured and how the papers' claims about it stand. Where a verdict is not the one that a
    sentence begins with, it begins with its subject alone.
    """
    of = _Verdicts({verdict.claim.id: verdict for finding in findings for verdict in finding.verdicts})
    shift = of.opening({"bfp_norm.stale": "reproduced", "bfp_norm.removes_shift": "reproduced"},
                       "The shift is there, and Backforward removes it", "The shift")  # fmt: skip
    speed = of.opening({BFP + "fewer_epochs": "reproduced", BFP + "gain_as_published": "contradicted"},
                       "Removing it speeds up training only slightly", "The speed of training without it")  # fmt: skip
    loop = of.opening({BFP + "published_loop": "reproduced", BFP + "beyond_updates": "contradicted"},
                      "The published gain comes from a loop that updates each weight twice a batch",
                      "The published loop updates each weight twice a batch")  # fmt: skip
    weights = of.opening({NORM + "larger": "reproduced", NORM + "its_cause": "contradicted"},
                         "Weights are larger without the shift, but not because of its absence",
                         "Weights without the shift")  # fmt: skip
    moments = of.opening({"np_moments.keeps_normal": "reproduced", "np_moments.keeps_normal_factor": "contradicted"},
                         "A NormProp layer keeps zero mean and unit variance, but only without its Jacobian factor",
                         "The moments of NormProp's layer")  # fmt: skip
    return (
        f"{shift}: once the layers below have moved, a layer's step differs from the gradient that it then faces by "
        f"{of.numbers('bfp_norm.stale')} of that gradient's norm under SGD, and by "
        f"{of.numbers('bfp_norm.removes_shift')} under exact Backforward "
        f"({of.stand(shift_under_SGD='bfp_norm.stale', none_under_BFP='bfp_norm.removes_shift')}).",
        f"{speed}: exact Backforward needs {of.numbers(BFP + 'fewer_epochs')} times SGD's epochs to the same training "
        f"loss, and {of.numbers(BFP + 'fewer_macs')} times its arithmetic ("
        + of.stand(fewer_epochs=BFP + "fewer_epochs", a_gain_as_large_as_published=BFP + "gain_as_published",
                   better_accuracy=BFP + "better") + ").",
        f"{loop}: rebuilt, it needs {of.numbers(BFP + 'published_loop')} times SGD's epochs and "
        f"{of.numbers(BFP + 'beyond_updates')} times its updates "
        f"({of.stand(more_than_its_updates_explain=BFP + 'beyond_updates')}).",
        f"{weights}: their norm is {of.numbers(NORM + 'larger')} times SGD's, and {of.numbers(NORM + 'its_cause')} "
        "times that of SGD with two steps a batch at equal loss; the largest learning rate that trains is "
        f"{of.numbers('bfp_max_lr.larger')} times SGD's ("
        + of.stand(larger_norm=NORM + "larger", because_of_the_shift=NORM + "its_cause",
                   regularisation=NORM + "regularising", larger_rates="bfp_max_lr.larger") + ").",
        f"{moments} ({of.stand(without='np_moments.keeps_normal', with_it='np_moments.keeps_normal_factor')}); a step "
        f"takes {of.numbers('np_speed.epoch_time')} times BatchNorm's time "
        f"({of.stand(speed='np_speed.epoch_time')}), and {of.undecided('np_')}.",
    )  # fmt: skip


class _Verdicts:
    """Verdicts by the id of their claim."""

    def __init__(self, of: Mapping[str, Verdict]) -> None:
        self._of = of

    def opening(self, asked: Mapping[str, Kind], told: str, otherwise: str) -> str:
        """A statement where verdicts bear it out, else its subject."""
        return (
            told if all(name in self._of and self._of[name].kind == kind for name, kind in asked.items()) else otherwise
        )

    def stand(self, **claims: str) -> str:
        """How claims stand: `fewer epochs: reproduced; better accuracy: inconclusive`."""
        verdicts = ((words.replace("_", " "), self._of.get(name)) for words, name in claims.items())
        return "; ".join(f"{words}: {'not run' if verdict is None else verdict.word}" for words, verdict in verdicts)

    def numbers(self, name: str) -> str:
        """The judged numbers of a claim, each with its row: `0.989 (lr 0.01) and 0.951 (lr 0.05)`."""
        verdict = self._of.get(name)
        rows = [row for row in verdict.rows if row.judged and row.estimate.value is not None] if verdict else []
        if not rows:
            return "an amount not measured yet"
        told = [_short(row.estimate) + (f" ({row.label})" if len(rows) > 1 else "") for row in rows]
        return ", ".join(told[:-1]) + f" and {told[-1]}" if len(told) > 1 else told[0]

    def undecided(self, start: str) -> str:
        """How many claims, of those whose ids start so, are not decided."""
        claims = [
            verdict for name, verdict in self._of.items() if name.startswith(start) and verdict.claim.kind == "claim"
        ]
        still = sum(verdict.kind not in ("reproduced", "contradicted") for verdict in claims)
        return f"{still} of the {len(claims)} claims about it are not decided by these runs"


def _short(estimate: Estimate) -> str:
    value = estimate.value or 0.0
    return f"{value:.4f}" if 0.99 < value < 1.02 else f"{value:.3g}"
