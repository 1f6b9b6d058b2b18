"""The experiments on Backforward Propagation, on synthetic runs with known effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.helpers import study_runs
from tests.helpers.synthetic import curve, write_run, write_sweep

from backforward_suite.report import experiments, statistics, style
from backforward_suite.report.claims import claims_of, published_runs
from backforward_suite.report.experiments import _measures as measures
from backforward_suite.report.experiments.bfp_learning_rates import LOGGED, STOPS, best_accuracy
from backforward_suite.report.finding import Finding, Verdict
from backforward_suite.report.reading import Run, read_runs

NAMES = [name for name in experiments.ORDER if name.startswith("bfp_")]


def examine(name: str, runs: Sequence[Run], scale: str = "small") -> Finding:
    found = experiments.load(name).examine(runs, list(claims_of(name).values()), scale)
    assert [verdict.claim for verdict in found.verdicts] != []
    assert {verdict.claim.word for verdict in found.verdicts} == set(claims_of(name))
    return found


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {str(method): members for (method,), members in statistics.grouped(runs, "method").items()}


def verdict(found: Finding, word: str) -> Verdict:
    return next(verdict for verdict in found.verdicts if verdict.claim.word == word)


def drawn(found: Finding) -> None:
    """Draw every figure, and find an axis that shows something in each."""
    with style.applied():
        for figure in found.figures:
            axes = figure.draw().axes
            assert any(axis.has_data() for axis in axes), figure.name


def write_all(root: Path, name: str) -> None:
    """A small sweep of each experiment, in the shape of its config."""
    WRITERS[name](root, name)


def write_rates(root: Path, name: str) -> None:
    speeds = {"sgd": 1.0, "bfp": 1.0, "bfp_poster": 2.0, "sgd_repeat": 2.0}
    write_sweep(root, name, speeds, lrs=(0.05, 0.1), seeds=3)
    write_sweep(root, name, {"sgd": 1.9}, lrs=(0.2,), seeds=3)


def write_steps(root: Path, name: str) -> None:
    for method in ("sgd", "bfp"):
        for init in ("default", "he"):
            settings = {"model.init": init, "data_norm": "channel"}
            write_run(root, name, method=method, settings=settings, study=one_step(method), name=f"{method}-{init}")


def write_batches(root: Path, name: str) -> None:
    for batch in (32, 128):
        for method in ("sgd", "bfp"):
            for seed in range(3):
                losses, settings = curve(1.0, seed=seed + batch), {"batch_size": batch}
                run = f"{method}-{batch}-{seed}"
                write_run(root, name, method=method, seed=seed, losses=losses, settings=settings, name=run)


def write_schedules(root: Path, name: str) -> None:
    for schedule in ("constant", "halve", "cosine"):
        for method in ("sgd", "bfp"):
            for seed in range(3):
                losses, choices = curve(1.0 if schedule == "constant" else 1.3, seed=seed), {"schedule": schedule}
                run = f"{method}-{schedule}-{seed}"
                write_run(root, name, method=method, seed=seed, losses=losses, choices=choices, name=run)


def write_switches(root: Path, name: str) -> None:
    write_sweep(root, name, {"sgd": 1.0, "bfp": 1.2}, seeds=3)
    for epoch in (1, 5):
        for seed in range(3):
            run, settings = f"{name}-{epoch}-{seed}", {"method.at_epoch": epoch}
            losses = curve(1 + 0.02 * epoch, seed=seed)
            write_run(root, name, method=name, seed=seed, losses=losses, settings=settings, name=run)


def one_step(method: str, draws: int = 60) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    rows = []
    for width in (16, 256):
        for k in range(draws):
            bad = draw.random() < 0.2
            loss = (math.inf if bad else 1e-4) if method == "bfp" else 1.0
            rows.append({"width": width, "draw": k, "loss_before": 2.3, "loss_after": loss, "accuracy_after": 1.0})
    return pd.DataFrame(rows)


def write_largest(root: Path, largest: dict[str, float], seeds: int = 4) -> None:
    for method, most in largest.items():
        for lr in (0.5, 1.0, 2.0, 4.0):
            for seed in range(seeds):
                works = lr <= most
                losses = [0.5, 0.3] if works else [5.0, math.nan]
                status = "finished" if works else "diverged"
                write_run(root, "bfp_max_lr", method=method, lr=lr, seed=seed, losses=losses, status=status)


def write_depths(root: Path, gain: float, seeds: int = 4) -> None:
    """The ratio of losses falls by `gain` in the logarithm with each doubling of the depth."""
    for depth in (1, 2, 4):
        for seed in range(seeds):
            for method in ("sgd", "bfp"):
                noise = 0.01 * np.random.default_rng((seed, depth)).standard_normal()
                factor = math.exp(noise - gain * math.log2(depth)) if method == "bfp" else 1.0
                losses = [factor * loss for loss in curve(1.0, seed=seed)]
                run = f"{method}-{depth}-{seed}"
                settings = {"model.depth": depth}
                write_run(root, "bfp_depth", method=method, seed=seed, losses=losses, settings=settings, name=run)


def write_norms(root: Path, accuracy: dict[str, float] | None = None) -> None:
    for model, data in (("mlp", "mnist"), ("nin", "cifar10")):
        for method in ("sgd", "bfp"):
            for norm in ("none", "batch", "prop"):
                for seed in range(3):
                    for lr in (0.01, 0.1):
                        noise = 0.0005 * np.random.default_rng((seed, len(norm))).standard_normal()
                        given, arm = accuracy or {}, f"{method} + {norm}"
                        level = given.get(f"{model}: {arm}", given.get(arm, 0.9)) + noise - (0.05 if lr < 0.1 else 0)
                        rows = [
                            (1, 10, f"shift/{kind}_relative", layer, 1, value)
                            for layer, induced in (("one", 0.0), ("two", 0.2))
                            for kind, value in (
                                ("induced", induced),
                                ("applied", induced if method == "sgd" else 1e-7),
                            )
                        ]
                        frame = pd.DataFrame(rows, columns=["epoch", "step", "measure", "layer", "update", "value"])
                        write_run(
                            root,
                            "bfp_norm",
                            method=method,
                            lr=lr,
                            seed=seed,
                            data=data,
                            accuracy=level,
                            choices={"model": model, "norm": norm},
                            diagnostics=frame,
                            name=f"{model}-{method}-{norm}-{lr}-{seed}",
                        )


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "bfp_one_step": write_steps,
    "bfp_learning_rates": write_rates,
    "bfp_weight_norm": write_rates,
    "bfp_batch_size": write_batches,
    "bfp_max_lr": lambda root, _: write_largest(root, {"sgd": 1.0, "bfp": 2.0}),
    "bfp_schedule": write_schedules,
    "bfp_depth": lambda root, _: write_depths(root, 0.1),
    "bfp_warmup": write_switches,
    "bfp_finetune": write_switches,
    "bfp_norm": lambda root, _: write_norms(root),
    "bfp_parts": lambda root, _: study_runs.write_parts(root),
    "bfp_rates": lambda root, _: study_runs.write_rates(root),
    "bfp_to_loss": lambda root, _: study_runs.write_to_loss(root),
    "bfp_witnesses": study_runs.write_witnesses,
}


# --- each of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_without_runs_every_claim_is_not_run_and_says_what_to_do(name: str) -> None:
    found = examine(name, [])
    assert {verdict.kind for verdict in found.verdicts} == {"not run"}
    (note,) = found.notes
    assert note.startswith(f"Nothing has been run. `make reproduce ONLY={name} SCALE=small` runs it.")
    assert (found.tables, found.figures, found.stand_in) == ((), (), False)


@pytest.mark.parametrize("name", NAMES)
def test_with_runs_every_claim_has_a_verdict_and_every_figure_shows_something(name: str, tmp_path: Path) -> None:
    write_all(tmp_path, name)
    found = examine(name, read_runs(tmp_path))
    not_run = {verdict.claim.word for verdict in found.verdicts if verdict.kind == "not run"}
    assert not_run <= {"single_layer", "deepest"}, not_run
    assert found.tables
    assert found.hardware == "a synthetic machine"
    assert all(isinstance(cell, str) for table in found.tables for cell in table.frame.to_numpy().ravel())
    drawn(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", ["first", "sgd", "bfp", "one seed"])
def test_with_some_runs_missing_or_failed_nothing_breaks(name: str, kept: str, tmp_path: Path) -> None:
    write_all(tmp_path, name)
    runs = read_runs(tmp_path)
    if kept == "first":
        runs = runs[:1]
    elif kept == "one seed":
        runs = [run for run in runs if run.seed == 0]
    else:
        runs = [run for run in runs if run.choice("method") == kept]
    if runs:  # not every experiment has runs of each rule
        runs[-1].result["status"] = "failed" if len(runs) > 1 else "finished"
    found = examine(name, runs)
    # Few claims need neither a second arm nor a second seed.
    decided = [verdict.claim for verdict in found.verdicts if verdict.kind in ("reproduced", "contradicted")]
    rest = {claim.word for claim in decided if claim.rule not in ("identity", "share", "curve", "value")}
    alone = {"bfp": {"norm_adds_nothing"}, "sgd": {"stale"}, "one seed": {"stale"}}
    if name == "bfp_witnesses":  # all of its arms are SGD's
        alone["sgd"] = set(claims_of(name))
    assert rest <= alone.get(kept, set())
    with style.applied():
        for figure in found.figures:
            figure.draw()


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_other_data_are_stand_ins(name: str, tmp_path: Path) -> None:
    write_all(tmp_path, name)
    runs = read_runs(tmp_path)
    for run in runs:
        run.result["data"]["name"] = "digits"
    found = examine(name, runs)
    assert found.stand_in
    assert {verdict.kind for verdict in found.verdicts} == {"stand-in data"}


# --- what they find --------------------------------------------------------------------------------------------------


def published_losses(arm: str, epochs: int = 10) -> list[float]:
    rows = published_runs()
    rows = rows[(rows.arm == arm) & (rows.lr == 0.05) & (rows.epoch <= epochs)]
    return rows.train_loss_as_logged.tolist()


def write_central(root: Path, exact: float = 1.0) -> None:
    """SGD as published; the loop on SGD's path at twice the pace; exact Backforward at `exact` times SGD's."""
    sgd = np.log(published_losses("sgd"))
    epochs = np.arange(10) + 0.5

    def at_pace(pace: float, seed: int) -> list[float]:
        noise = 0.004 * np.random.default_rng((seed, round(100 * pace))).standard_normal()
        slope = sgd[-1] - sgd[-2]
        beyond = np.arange(10, 22) + 0.5
        path = np.concatenate([sgd, sgd[-1] + slope * (beyond - 9.5)])
        return np.exp(np.interp(epochs * pace, np.concatenate([epochs, beyond]), path) + noise).tolist()

    for seed in range(5):
        write_run(root, "bfp_learning_rates", method="sgd", lr=0.05, seed=seed, losses=at_pace(1.0, seed))
        write_run(root, "bfp_learning_rates", method="bfp", lr=0.05, seed=seed, losses=at_pace(exact, seed))
        joint = {"loss/train_joint": published_losses("bfp_poster")}
        losses = at_pace(2.0, seed)
        write_run(root, "bfp_learning_rates", method="bfp_poster", lr=0.05, seed=seed, losses=losses, metrics=joint)


def central(root: Path) -> Finding:
    runs = read_runs(root)
    for run in runs:
        run.result["data"]["train"] = 60_000
    return examine("bfp_learning_rates", runs)


def test_a_gain_of_the_joint_pass_is_distinguished_from_a_gain_of_the_rule(tmp_path: Path) -> None:
    write_central(tmp_path)
    found = central(tmp_path)

    def row(word: str) -> str:
        """The claims are about three learning rates: what the one that there is says."""
        return verdict(found, word).why

    assert verdict(found, "fewer_epochs").kind != "reproduced"
    assert "no effect" in row("gain_as_published")
    assert "the opposite direction" in row("fewer_macs")
    assert "as claimed" in row("published_loop")
    assert "no effect" in row("beyond_updates")
    assert verdict(found, "gain_as_published").kind == "contradicted"
    assert verdict(found, "beyond_updates").kind == "contradicted"
    assert verdict(found, "published_loop").kind == "inconclusive"  # two learning rates are missing
    assert "missing: lr 0.01, lr 0.1" in row("published_loop")
    for word in ("tracks_published", "tracks_published_sgd"):
        assert row(word).startswith("follows it")
    (cost,) = [table for table in found.tables if table.title == "What a training loss costs"]
    assert cost.frame["multiply-accumulates to the loss, BFP / SGD"][0].startswith("1.5")


def test_a_gain_of_the_rule_is_seen(tmp_path: Path) -> None:
    write_central(tmp_path, exact=1.9)
    found = central(tmp_path)
    for word in ("fewer_epochs", "gain_as_published", "fewer_macs"):
        assert "as claimed" in verdict(found, word).why


def test_the_best_accuracy_is_taken_over_the_epochs_at_which_the_published_run_was_evaluated(tmp_path: Path) -> None:
    accuracies = [0.99 if epoch % 5 else 0.9 + 0.0001 * epoch for epoch in range(1, 281)]
    write_run(tmp_path, "x", losses=[0.1] * 280, metrics={"accuracy/validation": accuracies})
    (run,) = read_runs(tmp_path)
    assert published_runs().query("arm == 'sgd' and lr == 0.5").epoch.max() == 275
    assert best_accuracy(run, stop=275) == pytest.approx(92.75)


def test_the_published_runs_stop_where_their_curves_end_but_for_one() -> None:
    """The curves beside the package end SGD at lr 0.005 early; its run went on to epoch 1,000."""
    ends = published_runs().groupby(["lr", "arm"]).epoch.max()
    for (lr, arm), last in ends.items():
        assert dict(zip(LOGGED, STOPS[lr], strict=True))[arm] == (1000 if (lr, arm) == (0.005, "sgd") else last)


def test_runs_on_fewer_images_are_not_compared_with_the_published_curves(tmp_path: Path) -> None:
    write_central(tmp_path)
    found = examine("bfp_learning_rates", read_runs(tmp_path))
    assert verdict(found, "tracks_published").kind == "inconclusive"
    assert "trained on 55,000 images, the published runs on 60,000" in verdict(found, "tracks_published").why


def test_if_an_arm_never_reaches_the_level_a_sign_test_compares_who_was_first(tmp_path: Path) -> None:
    for seed in range(6):
        write_run(tmp_path, "x", method="sgd", seed=seed, losses=[0.9, 0.45, 0.25])
        write_run(tmp_path, "x", method="bfp", seed=seed, losses=[0.9, 0.95, 0.97])
    arms = by_method(read_runs(tmp_path))
    found = measures.cost_effect(arms["bfp"], arms["sgd"], "lr 1")
    assert found.values == ()
    assert found.lost == 6
    assert found.note == "no level that all runs reach; at 0.3 first in 0 of 6 pairs, sign test p = 0.031"


def test_times_are_compared_only_between_runs_timed_under_equal_conditions(tmp_path: Path) -> None:
    arms = by_method(write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.0}))
    assert len(measures.cost_effect(arms["bfp"], arms["sgd"], "", "seconds").values) == 5
    for run, key, other in zip(arms["bfp"], ("threads", "stacked", ""), (2, 30, ""), strict=False):
        run.result["timing" if key else "hardware"][key or "device"] = other
    found = measures.cost_effect(arms["bfp"], arms["sgd"], "", "seconds")
    assert (len(found.values), found.lost) == (2, 3)
    assert found.note == "3 pairs differ in hardware, threads or runs in a stack"
    assert len(measures.cost_effect(arms["bfp"], arms["sgd"], "", "epochs").values) == 5


def test_norms_at_equal_loss_do_not_depend_on_progress(tmp_path: Path) -> None:
    """An arm that is only faster has the same norm at the same loss, and a larger one at the same epoch."""
    for seed in range(4):
        for method, pace in (("sgd", 1.0), ("bfp", 1.5)):
            epochs = np.arange(1, 9)
            losses = np.exp(-0.5 * pace * (epochs - 0.5)).tolist()
            norms = (20 + 0.3 * pace * epochs + 0.001 * seed).tolist()
            write_run(
                tmp_path, "bfp_weight_norm", method=method, seed=seed, losses=losses, metrics={"weight_norm/sum": norms}
            )
    found = examine("bfp_weight_norm", read_runs(tmp_path))
    assert "as claimed" in verdict(found, "larger").why
    assert "no effect" in verdict(found, "at_equal_loss").why


@pytest.mark.parametrize(("extra", "state"), [(0.0, "against"), (0.5, "for")])
def test_a_norm_that_is_as_large_in_a_control_with_shift_is_not_caused_by_its_absence(
    tmp_path: Path, extra: float, state: str
) -> None:
    """Two steps a batch give the same path at twice the pace; Backforward alone may add to it."""
    for seed in range(4):
        for method, own in (("sgd", -0.5), ("bfp", extra), ("sgd_repeat", 0.0)):
            losses = np.exp(-0.5 * (np.arange(1, 9) - 0.5)).tolist()
            norms = (20 + own + 0.3 * np.arange(1, 9) + 0.001 * seed).tolist()
            further = {"weight_norm/sum": norms}
            write_run(tmp_path, "bfp_weight_norm", method=method, seed=seed, losses=losses, metrics=further)
    found = examine("bfp_weight_norm", read_runs(tmp_path))
    assert verdict(found, "at_equal_loss").rows[0].state == "for"
    assert verdict(found, "its_cause").rows[0].state == state


def test_the_norm_of_a_diverged_run_is_left_out_and_reported(tmp_path: Path) -> None:
    for seed in range(4):
        for method, size in (("sgd", 20.0), ("bfp", 21.0)):
            diverged = (method, seed) == ("bfp", 3)
            norms = [(900.0 if diverged else size) + 0.001 * seed * len(method)] * 3
            status = "diverged" if diverged else "finished"
            further = {"weight_norm/sum": norms}
            write_run(tmp_path, "bfp_weight_norm", method=method, seed=seed, status=status, metrics=further)
    found = verdict(examine("bfp_weight_norm", read_runs(tmp_path)), "larger")
    assert found.rows[0].estimate.value == pytest.approx(1.05, abs=1e-3)
    assert "3 of 4 pairs; the others gave no value" in found.why


def test_one_step_counts_infinite_losses_as_not_learnt(tmp_path: Path) -> None:
    write_all(tmp_path, "bfp_one_step")
    found = examine("bfp_one_step", read_runs(tmp_path))
    assert verdict(found, "learns_batch").kind == "contradicted"  # four in five, asked were 19 in 20
    assert verdict(found, "below_sgd").kind == "reproduced"
    assert "90th percentile infinite" in found.notes[-1]


@pytest.mark.parametrize(
    ("largest", "kind", "ratio"),
    [
        (4.0, "reproduced", 4.0),  # between 4 and 8 against between 1 and 2
        (2.0, "reproduced", 2.0),  # one step, in all seeds
        (1.0, "inconclusive", 1.0),  # the same step, which may hide a difference of up to two
        (0.25, "contradicted", 0.25),  # not even at the smallest, 0.5
    ],
)
def test_limits_in_the_same_step_of_the_grid_are_not_equal_limits(
    tmp_path: Path, largest: float, kind: str, ratio: float
) -> None:
    write_largest(tmp_path, {"sgd": 1.0, "bfp": largest})
    found = verdict(examine("bfp_max_lr", read_runs(tmp_path)), "larger")
    assert found.kind == kind
    assert found.rows[0].estimate.value == pytest.approx(ratio)
    assert "the grid leaves a factor of 2.00 open" in found.why


def test_what_was_not_run_does_not_count_as_not_training(tmp_path: Path) -> None:
    write_largest(tmp_path, {"sgd": 4.0, "bfp": 4.0})
    runs = [run for run in read_runs(tmp_path) if run.choice("method") == "sgd" or run.setting("lr") <= 1]
    found = verdict(examine("bfp_max_lr", runs), "larger")
    assert found.kind == "inconclusive"
    assert "both train at the largest of the grid, 1; learning rates that only one of the arms has run" in found.why


def test_a_loss_that_was_not_measured_is_not_the_best(tmp_path: Path) -> None:
    write_largest(tmp_path, {"sgd": 4.0, "bfp": 1.0})
    runs = read_runs(tmp_path)
    for run in runs:
        if run.setting("lr") == 2.0:
            run.result["final"].pop("loss/train", None)
            run.result["status"] = "finished"
    (limits,) = [table for table in examine("bfp_max_lr", runs).tables if table.title == "Where training ends"]
    sgd = limits.frame.set_index("arm").loc["SGD", "largest learning rate that trains, by seed"]
    assert sgd == "1, 1, 1, 1"


def test_pairs_that_train_everywhere_say_nothing(tmp_path: Path) -> None:
    write_largest(tmp_path, {"sgd": 4.0, "bfp": 4.0})
    found = verdict(examine("bfp_max_lr", read_runs(tmp_path)), "larger")
    assert found.kind == "inconclusive"
    assert "both train at the largest of the grid, 4" in found.why


@pytest.mark.parametrize(("gain", "kind"), [(0.1, "reproduced"), (0.0, "contradicted"), (-0.1, "contradicted")])
def test_a_gain_that_grows_with_depth_is_found(tmp_path: Path, gain: float, kind: str) -> None:
    write_depths(tmp_path, gain)
    assert verdict(examine("bfp_depth", read_runs(tmp_path)), "greater_impact").kind == kind


def test_growth_up_to_four_layers_and_a_reversal_at_eight_are_judged_separately(tmp_path: Path) -> None:
    write_depths(tmp_path, 0.1)
    for seed in range(4):
        for method, factor in (("sgd", 1.0), ("bfp", 1.3)):
            losses = [factor * (1 + 0.001 * seed * len(method)) * loss for loss in curve(1.0, seed=seed)]
            settings, run = {"model.depth": 8}, f"{method}-8-{seed}"
            write_run(tmp_path, "bfp_depth", method=method, seed=seed, losses=losses, settings=settings, name=run)
    found = examine("bfp_depth", read_runs(tmp_path))
    assert verdict(found, "greater_impact").kind == "reproduced"
    assert (verdict(found, "deepest").kind, verdict(found, "deepest").word) == ("contradicted", "no")


def write_leads(root: Path, leads: dict[str, float], wane: float = 0.0) -> None:
    """Backforward below SGD by so much in the logarithm, by schedule; at the constant rate it wanes."""
    for schedule, lead in leads.items():
        for method in ("sgd", "bfp"):
            for seed in range(4):
                base = curve(1.0, seed=seed)
                fall = [lead - (wane * k / len(base) if schedule == "constant" else 0) for k in range(len(base))]
                noise = 0.001 * seed * len(method)
                losses = [x * math.exp(noise - f * (method == "bfp")) for x, f in zip(base, fall, strict=True)]
                choices, run = {"schedule": schedule}, f"{method}-{schedule}-{seed}"
                write_run(root, "bfp_schedule", method=method, seed=seed, losses=losses, choices=choices, name=run)


def test_similar_at_a_constant_rate_and_mitigated_by_decay(tmp_path: Path) -> None:
    write_leads(tmp_path, {"constant": 0.09, "halve": 0.12, "cosine": 0.13}, wane=0.08)
    found = examine("bfp_schedule", read_runs(tmp_path))
    assert {word: verdict(found, word).kind for word in ("similar", "plateau", "mitigated")} == {
        "similar": "reproduced",
        "plateau": "reproduced",
        "mitigated": "reproduced",
    }


def test_an_equally_large_lead_everywhere_is_neither_similar_nor_mitigated(tmp_path: Path) -> None:
    write_leads(tmp_path, {"constant": 0.4, "halve": 0.4, "cosine": 0.4})
    found = examine("bfp_schedule", read_runs(tmp_path))
    for word in ("similar", "plateau", "mitigated"):
        assert verdict(found, word).kind == "contradicted", word


def test_lost_pairs_are_reported_in_verdict_and_table(tmp_path: Path) -> None:
    write_schedules(tmp_path, "bfp_schedule")
    runs = [run for run in read_runs(tmp_path) if run.name != "bfp-constant-2"]
    found = examine("bfp_schedule", runs)
    assert "2 of 3 pairs; the others gave no value" in verdict(found, "similar").why
    assert found.tables[0].frame["training loss after the last epoch, BFP / SGD"][0].endswith("(2 of 3 pairs)")


def test_normalisation_is_judged_at_each_arm_s_own_learning_rate(tmp_path: Path) -> None:
    write_norms(tmp_path, {"sgd + batch": 0.95, "bfp + batch": 0.95})
    found = examine("bfp_norm", read_runs(tmp_path))
    assert verdict(found, "removes_shift").kind == "reproduced"
    assert verdict(found, "replaces_norm").kind == "contradicted"  # five points behind
    assert verdict(found, "norm_adds_nothing").kind == "contradicted"  # the claim is that it adds nothing
    assert verdict(found, "stale").kind == "reproduced"
    (arms,) = [table for table in found.tables if table.title == "What each arm reached"]
    assert set(arms.frame["lr, chosen on validation data"]) == {"0.1 of 2"}
    (shift,) = [table for table in found.tables if table.title == "Applied shift of each layer, MLP"]
    assert shift.frame["BFP, no norm"].tolist() == ["1e-07", "1e-07"]
    assert shift.frame["SGD, no norm"].tolist() == ["0", "0.2"]


def test_an_effect_in_one_network_decides_against_there_being_none(tmp_path: Path) -> None:
    """As well on the MLP, and far worse on NIN: normalisation is not replaced. Of use to one is not of no use."""
    write_norms(tmp_path, {"nin: sgd + batch": 0.95, "nin: bfp + none": 0.75})
    found = examine("bfp_norm", read_runs(tmp_path))
    for word in ("replaces_norm", "norm_adds_nothing"):
        assert verdict(found, word).kind == "contradicted"
        assert "NIN: the effect is there, contrary to the claim" in verdict(found, word).why
        assert "MLP: the effect is absent" in verdict(found, word).why


def test_nin_that_saw_too_few_images_answers_nothing(tmp_path: Path) -> None:
    write_norms(tmp_path, {"nin: sgd + batch": 0.95, "nin: bfp + none": 0.75})
    runs = read_runs(tmp_path)
    for run in runs:
        if run.data == "cifar10":
            run.result["data"]["train"] = 2_000
    found = verdict(examine("bfp_norm", runs), "replaces_norm")
    assert (found.kind, found.word) == ("inconclusive", "open")
    assert "NIN: its runs saw 6,000 images" in found.why


def test_a_remaining_shift_contradicts_the_claim(tmp_path: Path) -> None:
    write_norms(tmp_path)
    runs = [run for run in read_runs(tmp_path) if run.choice("norm") == "none"]
    for run in runs:
        run.result["choices"]["method"] = "bfp"
    found = examine("bfp_norm", [run for run in runs if "-sgd-" in run.name])
    assert verdict(found, "removes_shift").kind == "contradicted"


@pytest.mark.parametrize(("far", "panels"), [(1.0, 1), (20.0, 2)])
def test_an_outlying_ratio_gets_a_panel_of_its_own(tmp_path: Path, far: float, panels: int) -> None:
    write_depths(tmp_path, 0.05)
    for seed in range(4):
        for method, factor in (("sgd", 1.0), ("bfp", far)):
            losses, settings = [factor * x for x in curve(1.0, seed=seed)], {"model.depth": 8}
            status = "diverged" if factor > 2 else "finished"
            run = f"{method}-8-{seed}"
            further = {"losses": losses, "settings": settings, "status": status}
            write_run(tmp_path, "bfp_depth", method=method, seed=seed, name=run, **further)
    (figure,) = examine("bfp_depth", read_runs(tmp_path)).figures
    with style.applied():
        axes = figure.draw().axes
    assert len(axes) == panels
    assert axes[-1].get_yscale() == "linear"
    labels = {text for panel in axes for text in panel.get_legend_handles_labels()[1]}
    assert ("with diverged runs, imputed" in labels) == (panels == 2)
