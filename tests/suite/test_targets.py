"""Keys that act through a group's config: refused where that config does not read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.helpers.commands import Command, assert_one_line
from tests.helpers.configs import composed

from backforward_suite.config import plain
from backforward_suite.errors import BadInput
from backforward_suite.targets import refuse_unread

DIGITS = ("data=digits", "max_epochs=1")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Configs of one's own that read none of the keys."""
    for group, text in {
        "model": "_target_: backforward.models.MLP\nhidden: 8\n",
        "optimizer": "_target_: torch.optim.SGD\nmomentum: 0.5\n",
    }.items():
        (tmp_path / "mine" / group).mkdir(parents=True)
        (tmp_path / "mine" / group / "own.yaml").write_text(text)
    return tmp_path / "mine"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["model=own", "norm=batch"], "norm=batch does not reach the model: backforward.models.MLP"),
        (["model=own", "norm=prop"], "norm=prop does not reach the model"),
        (["model=own", "+norm.groups=3"], "norm.groups=3 does not reach the model"),
        (["+norm.groups=3"], "norm.groups=3 does not reach the model"),
        (["optimizer=own", "lr=0.2"], "lr=0.2 does not reach the optimizer torch.optim.SGD"),
        (["optimizer=own", "weight_decay=0.1"], "weight_decay=0.1 does not reach the optimizer"),
        (["norm=batch", "model.jacobian_factor=paper"], "model.jacobian_factor belongs to norm=prop; with norm=batch"),
        (["+norm.jacobian_factor=none"], "norm.jacobian_factor belongs to norm=prop; with norm=none"),
        (["+schedule.step_size=3"], "schedule.step_size changes nothing with a constant learning rate"),
        (["schedule=constant", "+schedule.interval=step"], "schedule.interval changes nothing"),
        (["-m", "model=own", "norm=none,batch,prop"], "norm=batch does not reach the model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_key_that_reaches_nothing_is_refused(
    train: Command, own: Path, tmp_path: Path, given: list[str], line: str
) -> None:
    flags = [text for text in given if text == "-m"]
    settings = [text for text in given if text != "-m"]
    assert_one_line(train(*flags, "--config-dir", str(own), *settings, *DIGITS), line)
    assert not list(tmp_path.rglob("result.json"))


def test_where_they_are_read_they_are_taken(train: Command, own: Path) -> None:
    assert train("--config-dir", str(own), "model=own", "optimizer=own", *DIGITS).code == 0
    for given in (["norm=prop", "norm.jacobian_factor=paper"], ["norm=batch", "weight_decay=0.1"], ["schedule=halve"]):
        assert train(*given, *DIGITS).code == 0


def test_a_group_may_be_taken_whole() -> None:
    cfg = composed("+norm.groups=3")
    OmegaConf.set_struct(cfg, False)
    cfg.model = {"_target_": "x.Y", "norm": "${norm}"}
    refuse_unread(cfg, plain(cfg), set())
    cfg.model, cfg.normal = {"_target_": "x.Y", "norm": "${normal.groups}"}, {"groups": 3}
    with pytest.raises(BadInput, match=r"norm\.groups=3 does not reach the model x\.Y"):
        refuse_unread(cfg, plain(cfg), set())
