from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from backforward_suite.errors import BadInput
from backforward_suite.report.claims import claims_of, published_runs, read_claims

SOUND = {
    "id": "np_speed.quick",
    "experiment": "np_speed",
    "statement": "It is quick.",
    "source": "NormProp, 5.6",
    "rule": "value",
    "published": {"ratio": 0.875},
    "tolerance": 0.1,
    "tolerance_why": "Another device.",
}


ARMS = {"SGD": "sgd", "published loop": "bfp_poster"}


def read(tmp_path: Path, *entries: object) -> object:
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return read_claims(path)


def test_every_claim_is_sound_and_every_experiment_has_one() -> None:
    claims = read_claims()
    assert len({claim.id for claim in claims}) == len(claims)
    assert {claim.experiment for claim in read_claims()} >= {
        *("bfp_one_step", "bfp_learning_rates", "bfp_weight_norm", "bfp_batch_size", "bfp_max_lr", "bfp_schedule"),
        *("bfp_depth", "bfp_warmup", "bfp_finetune", "bfp_norm"),
        *("bfp_parts", "bfp_rates", "bfp_to_loss", "bfp_witnesses", "np_witnesses"),
        *("np_moments", "np_jacobian", "np_recipe", "np_activations", "np_data_norm", "np_shift", "np_stability"),
        *("np_batch_size", "np_table", "np_speed"),
    }
    for claim in claims:
        papers = ("BFP", "NormProp", "Published logs")
        assert claim.kind == "question" or claim.source.startswith(papers), claim.id
        assert claim.statement.endswith("?" if claim.kind == "question" else "."), claim.id


def test_the_questions_are_those_that_no_paper_answers() -> None:
    questions = {claim.id.partition(".")[2] for claim in read_claims() if claim.kind == "question"}
    assert {"fewer_macs", "less_time", "replaces_norm", "norm_adds_nothing", "enough", "better"} <= questions
    assert questions.isdisjoint({"fewer_epochs", "larger", "similar", "mitigated", "greater_impact", "higher_early"})


def test_every_claim_names_page_or_section() -> None:
    place = re.compile(r"p\. [12]|abstract|Fig\. \d|Table 1|\b[345]\.\d|Future Work|logs|footnote|batch size")
    for claim in read_claims():
        assert claim.kind == "question" or place.search(claim.source), claim.id


def test_claims_about_training_normprop_ask_for_one_of_the_papers_epochs() -> None:
    """45,000 images: what is shorter ends before the first point of the paper's curves."""
    for claim in read_claims():
        paper = claim.kind == "claim" and claim.experiment.startswith("np_")
        if paper and claim.rule == "direction" and not claim.arguments.get("protocol"):
            assert claim.least_images == 45_000, claim.id


@pytest.mark.parametrize(("data", "images"), [("cifar10", 10_000), ("cifar100", 10_000), ("svhn", 26_032)])
def test_the_tolerance_of_an_error_is_two_standard_errors(data: str, images: int) -> None:
    claim = claims_of("np_table")[f"errors_{data}"]
    for label in claim.published:
        error = claim.number(label) / 100
        assert claim.tolerance == pytest.approx(200 * math.sqrt(error * (1 - error) / images), rel=0.1)


def test_only_mathematics_is_judged_on_any_data() -> None:
    """A claim that names no data set would be judged on stand-ins as on the paper's own."""
    words = {"remark_1", "remark_2", "jacobian", "isometry", "keeps_normal", "keeps_normal_factor", "proposition_1"}
    assert {claim.id for claim in read_claims() if not claim.data} == {f"np_moments.{word}" for word in words}


def test_claims_are_had_by_experiment() -> None:
    assert list(claims_of("np_speed")) == ["epoch_time"]
    assert claims_of("np_speed")["epoch_time"].published == {"NormProp / BatchNorm": 0.875}
    assert claims_of("nothing") == {}


def test_the_published_epochs_are_those_of_the_published_curves() -> None:
    """The numbers come from the whole logs; the thinned-out curves beside them give the same to their resolution."""
    claim = claims_of("bfp_learning_rates")["epochs_to_loss"]
    level = claim.arguments["loss"]
    curves = published_runs()
    for label, epochs in claim.published.items():
        name, lr = label.split(", lr ")
        arm = ARMS[name]
        curve = curves[(curves.arm == arm) & (curves.lr == float(lr))].set_index("epoch")["train_loss_as_logged"]
        assert curve[curve.index < epochs].min() > level
        assert curve[curve.index >= epochs].iloc[0] <= level


def test_the_published_gain_is_the_ratio_of_these_epochs() -> None:
    epochs = claims_of("bfp_learning_rates")["epochs_to_loss"].published
    for label, ratio in claims_of("bfp_learning_rates")["gain_as_published"].published.items():
        assert epochs[f"published loop, {label}"] / epochs[f"SGD, {label}"] == pytest.approx(ratio, abs=0.0005)


def test_the_published_accuracies_are_the_best_of_the_published_curves() -> None:
    curves = published_runs()
    for label, percent in claims_of("bfp_learning_rates")["best_accuracy"].published.items():
        name, lr = label.split(", lr ")
        arm = ARMS[name]
        found = curves[(curves.arm == arm) & (curves.lr == float(lr))]["test_accuracy"].max()
        assert 100 * found <= percent + 1e-9  # every fifth epoch alone was evaluated
        assert 100 * found > percent - 0.2


def test_the_published_norms_are_those_of_the_published_curves() -> None:
    curves = published_runs().set_index(["arm", "epoch", "lr"])["weight_norm"]
    for label, ratio in claims_of("bfp_weight_norm")["larger"].published.items():
        lr = float(label.removeprefix("lr "))
        assert curves["bfp_poster", 10, lr] / curves["sgd", 10, lr] == pytest.approx(ratio, abs=6e-5)


def test_what_is_published_of_moments_is_what_the_formulas_give() -> None:
    """NormProp, Remarks 1 and 2, section 3.4."""
    of = {word: claim.published for word, claim in claims_of("np_moments").items()}
    mean, variance = 1 / math.sqrt(2 * math.pi), (1 - 1 / math.pi) / 2
    assert of["remark_1"] == pytest.approx({"mean": mean, "standard deviation": math.sqrt(variance)}, abs=5e-7)
    a = 0.25
    std = math.sqrt(((1 + a**2) - (1 - a) ** 2 / math.pi) / 2)
    assert of["remark_2"] == pytest.approx(
        {"mean, a = 0.25": (1 - a) * mean, "standard deviation, a = 0.25": std}, abs=5e-7
    )
    eigenvalue = (1 / 2) / variance  # half of the units of a ReLU pass the gradient on
    printed = {"mean eigenvalue": eigenvalue, "its root": math.sqrt(eigenvalue)}
    assert of["jacobian"] == pytest.approx(printed, abs=0.005)


def test_moments_are_held_to_the_decimals_that_are_given() -> None:
    """They are compared with quadrature, not with a sample."""
    for word in ("remark_1", "remark_2"):
        claim = claims_of("np_moments")[word]
        assert claim.tolerance == 1e-6
        assert all(round(number, 6) == number for number in claim.published.values())


def test_the_published_ratio_of_times_is_that_of_the_published_times() -> None:
    claim = claims_of("np_speed")["epoch_time"]
    assert "takes 84 s, with BatchNorm 96 s" in claim.statement
    assert claim.published["NormProp / BatchNorm"] == 84 / 96
    assert claim.tolerance == pytest.approx(2 / 5 * (1 - 84 / 96))
    assert "two fifths" in claim.tolerance_why


def test_the_published_differences_are_those_of_the_published_errors() -> None:
    claims = claims_of("np_table")
    errors = {
        label: error for claim in claims.values() if claim.rule == "value" for label, error in claim.published.items()
    }
    for row, difference in claims["below_batchnorm"].published.items():
        assert difference == pytest.approx(errors[f"{row}, NormProp"] - errors[f"{row}, BatchNorm"], abs=1e-9)


@pytest.mark.parametrize(
    ("experiment", "word"),
    [
        ("bfp_learning_rates", "fewer_epochs"),
        ("bfp_learning_rates", "gain_as_published"),
        ("bfp_learning_rates", "tracks_published"),
        ("bfp_one_step", "learns_batch"),
        ("bfp_one_step", "below_sgd"),
    ],
)
def test_what_was_set_after_a_first_look_says_so(experiment: str, word: str) -> None:
    assert claims_of(experiment)[word].post_hoc


def test_the_tolerance_of_the_norm_is_the_share_of_the_least_published_gain_that_it_says() -> None:
    claim = claims_of("bfp_weight_norm")["larger"]
    assert claim.tolerance is not None
    assert 1 / 8 < claim.tolerance / (min(claim.published.values()) - 1) < 1 / 7
    assert "less than a seventh of the smallest" in claim.tolerance_why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"toleranze": 1}, "toleranze"),
        ({"tolerance": -1.0}, "greater than or equal to 0"),
        ({"tolerance": None}, "needs a tolerance"),
        ({"tolerance_why": ""}, "give the reason for the tolerance"),
        ({"experiment": "np_table"}, "is filed under"),
        ({"rule": "feeling"}, "rule"),
        ({"rule": "share"}, "at_least"),
        ({"rule": "direction"}, "sign"),
        ({"published": {}}, "needs published numbers"),
        ({"published": {"ratio": "many"}}, "ratio"),
        ({"arguments": {"over": "some"}}, "over is"),
        ({"kind": "question"}, "ends with a question mark"),
        ({"kind": "opinion"}, "kind"),
        ({"least_images": -1}, "greater than or equal to 0"),
        ({"source": ""}, "source"),
    ],
)
def test_an_unsound_claim_is_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path, SOUND | change)
    assert "\n" not in str(caught.value)


def test_two_claims_of_one_id_and_no_list_at_all_are_refused(tmp_path: Path) -> None:
    assert read(tmp_path, SOUND)
    with pytest.raises(BadInput, match=r"two claims are called np_speed\.quick"):
        read(tmp_path, SOUND, SOUND)
    (tmp_path / "claims.yaml").write_text("- [unclosed")
    with pytest.raises(BadInput, match=r"claims\.yaml"):
        read_claims(tmp_path / "claims.yaml")
    with pytest.raises(BadInput, match="No such file"):
        read_claims(tmp_path / "none.yaml")
