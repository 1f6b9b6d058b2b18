"""Configs as the command line composes them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tests.helpers.commands import CONF

from backforward_suite.config import Request
from backforward_suite.runs import names


def composed(*overrides: str) -> DictConfig:
    """The config that these overrides give."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def requested(*overrides: str) -> Request:
    """The same, checked."""
    return Request.of(composed(*overrides))


def with_hydra(*overrides: str) -> DictConfig:
    """The same with Hydra's node."""
    names.register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True)
