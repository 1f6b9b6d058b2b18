"""The data configs: one for each data set, all with the same keys, as the loader takes them."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.helpers.commands import REPOSITORY

from backforward_suite.data import AUGMENTATIONS, KNOWN, PROTOCOLS, load_data

CONF = REPOSITORY / "conf" / "data"


def test_there_is_one_for_each_data_set_and_one_for_ones_own() -> None:
    assert {path.stem for path in CONF.iterdir()} == {*KNOWN, "npz"}


@pytest.mark.parametrize("path", sorted(CONF.iterdir()), ids=lambda path: path.stem)
def test_defaults(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.load(path)
    assert [key for key in config if key != "layout"] == [
        "name",
        "protocol",
        "size",
        "train_images",
        "evaluation_images",
        "augment",
        "shuffle",
        "root",
    ]
    assert config.get("layout") == ("auto" if path.stem == "npz" else None)
    assert (config.protocol, config.size, config.train_images, config.augment) == ("holdout", None, None, "none")
    assert OmegaConf.is_missing(config, "name") if path.stem == "npz" else config.name == path.stem
    monkeypatch.delenv("BACKFORWARD_DATA", raising=False)
    assert config.root == "data"
    monkeypatch.setenv("BACKFORWARD_DATA", "/elsewhere")
    assert config.root == "/elsewhere"


@pytest.mark.parametrize("path", sorted(CONF.iterdir()), ids=lambda path: path.stem)
def test_every_line_says_what_it_sets_and_which_values_there_are(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert all("#" in line for line in lines if not line.startswith("name: "))
    text = path.read_text()
    assert all(word in text for word in (*PROTOCOLS, *AUGMENTATIONS))


def test_the_quick_start_set_loads_as_configured() -> None:
    config = OmegaConf.load(CONF / "digits.yaml")
    data = load_data(
        config.name, Path(config.root), protocol=config.protocol, size=config.size, train_images=config.train_images
    )
    assert len(data.train) == 1297
