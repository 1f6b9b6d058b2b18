"""Names of runs, and the resolvers that configs use."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from backforward_suite.config import NAME, Request, Settings, has_effect
from backforward_suite.errors import BadInput
from backforward_suite.hardware import gpu_count

ELSEWHERE = ("slurm", "ray")  # launchers whose runs do not use this machine's GPUs and cores
NAME_LIMIT = 150  # characters; most file systems end at 255 bytes


def run_name(cfg: DictConfig) -> str:
    """Name a run by its method and each override that can change the result, in the order of `conf/train.yaml`.

    Args:
        cfg: The composed config with Hydra's node.

    Returns:
        For example `bfp-lr0.05-seed3`; the order of the overrides does not matter.

    Raises:
        BadInput: A setting has the wrong type or range; raised here, before Hydra makes the run's folder.
    """
    elsewhere = cfg.hydra.mode == RunMode.MULTIRUN and cfg.hydra.runtime.choices.get("hydra/launcher") in ELSEWHERE
    Request.of(cfg, here=not elsewhere)
    choices = cfg.hydra.runtime.choices
    overrides = OverridesParser.create().parse_overrides(list(cfg.hydra.overrides.task))
    keys = {override.key_or_group for override in overrides} - {"method", "experiment"}
    keys = {key for key in keys if has_effect(key) and not key.startswith("hydra.")}
    order = {key: place for place, key in enumerate(Settings.model_fields)}
    keys_in_order = sorted(keys, key=lambda key: (order.get(key.split(".")[0], len(order)), key))
    leaves = [key.rpartition(".")[2] for key in keys_in_order]

    parts = [str(choices.get("method"))]
    for key, leaf in zip(keys_in_order, leaves, strict=True):
        if key in choices:
            parts.append(str(choices[key]))
            continue
        label = leaf if leaves.count(leaf) == 1 else key
        value = OmegaConf.select(cfg, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        parts.append(f"{label}{rounded(str(value))}" if number else f"{label}_{value}")
    return _as_file_name("-".join(parts))


def rounded(text: str) -> str:
    """Round a fraction of more than 12 characters, as from a range or a search, to six digits; keep other text."""
    try:
        return text if len(text) <= 12 or text.isdecimal() else f"{float(text):.6g}"
    except ValueError:
        return text


def _as_file_name(text: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")
    if safe == text and len(safe) <= NAME_LIMIT:
        return safe
    # Different texts must not share a folder.
    return f"{safe[:NAME_LIMIT]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def request_of(cfg: DictConfig) -> Request:
    """The checked request of the current Hydra run; raises BadInput if a setting is wrong."""
    return Request.of(cfg, cast(DictConfig, HydraConfig.get()) if HydraConfig.initialized() else None)


def register_resolvers() -> None:
    """Register the resolvers of the configs.

    `${run_name:}`; `${sweep_name:}`: the checked `name`, as Hydra makes the sweep's folder before composing any run;
    `${by_scale:smoke,small,paper}`: one of three values; `${scale_of_machine:}`.
    """
    register = partial(OmegaConf.register_new_resolver, replace=True)
    register("run_name", lambda *, _root_: run_name(_root_))
    register("sweep_name", lambda *, _root_: _checked_name(_root_.name))
    register("by_scale", _by_scale)
    register("scale_of_machine", lambda: "paper" if gpu_count() else "small")


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise BadInput(f"name={name}: give letters, digits and . _ - in each part of the path, a letter or digit first")
    return name


def _by_scale(smoke: Any, small: Any, paper: Any, *, _root_: DictConfig) -> Any:
    scale = _root_.scale or "small"
    return {"smoke": smoke, "small": small, "medium": small, "paper": paper}.get(scale)
