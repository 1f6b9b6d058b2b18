from __future__ import annotations

import pytest
from tests.helpers.configs import with_hydra

from backforward_suite.errors import BadInput
from backforward_suite.runs.names import run_name


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "sgd"),
        (["method=bfp", "lr=0.05", "seed=3"], "bfp-lr0.05-seed3"),
        (["seed=3", "lr=5e-2", "method=bfp"], "bfp-lr0.05-seed3"),  # order and spelling do not matter
        (["model.depth=8", "norm=batch", "data=digits"], "sgd-depth8-batch-digits"),
        (["data.augment=flip", "optimizer=adam"], "sgd-augment_flip-adam"),
        (
            ["name=other", "timeout_min=3", "trainer.progress_bar=false", "data.root=/x"],
            "sgd",
        ),  # of no effect
        (["experiment=quickstart", "lr=0.1"], "sgd-lr0.1"),  # names the sweep's folder
        (["lr=0.30000000000000004", "weight_decay=1e-4"], "sgd-lr0.3-weight_decay0.0001"),  # a step of range()
        (["lr=0.012345678901234567"], "sgd-lr0.0123457"),  # a draw of a search
        (["model.dropout=0.5", "+model.extra=1"], "sgd-dropout0.5-extra1"),
    ],
    ids=str,
)
def test_a_run_is_named_after_its_overrides(overrides: list[str], name: str) -> None:
    assert run_name(with_hydra(*overrides)) == name


def test_similar_lists_have_different_names() -> None:
    names = {run_name(with_hydra("method=bfp", f"method.groups={groups}")) for groups in ("[[a,b],[c]]", "[[a],[b,c]]")}
    assert len(names) == 2
    assert all(name.startswith("bfp-groups__a_b_c-") for name in names)


def test_keys_with_the_same_leaf_are_written_in_full() -> None:
    assert run_name(with_hydra("+model.size=3", "data=digits", "data.size=16")) == "sgd-model.size3-digits-data.size16"


def test_a_long_name_fits_a_file_system() -> None:
    keys = [f"+model.a_rather_long_key_number_{n}={n}" for n in range(30)]
    assert len(run_name(with_hydra(*keys))) < 200


def test_an_invalid_setting_gives_no_name() -> None:
    with pytest.raises(BadInput, match="lr=-1"):
        run_name(with_hydra("lr=-1"))


def test_hydra_finds_the_folder() -> None:
    cfg = with_hydra("method=bfp", "lr=0.05", "name=study")
    assert cfg.hydra.run.dir == "outputs/study/bfp-lr0.05"
    assert f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}" == "outputs/study/bfp-lr0.05"
