"""Check a config against the function or class in its `_target_`."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Set
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Union

from omegaconf import DictConfig, OmegaConf

from backforward_suite.errors import BadInput

PLAIN = (bool, int, float, str, NoneType)


def refuse_wrong_types(group: str, settings: Mapping[str, Any]) -> None:
    """Compare the arguments of a target with its annotations, where these name plain types only.

    Args:
        group: The group's name.
        settings: The target, as `_target_`, and its arguments.

    Raises:
        BadInput: An argument has another type than its annotation.
    """
    target = settings.get("_target_")
    hints = _hints(target) if isinstance(target, str) else {}
    for key, value in settings.items():
        allowed = _members(hints.get(key, object))
        if all(kind in PLAIN for kind in allowed) and not any(_is_a(value, kind) for kind in allowed):
            words = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
            raise BadInput(f"{group}.{key}={value}: {target} takes {words} for {key}")


def refuse_unread(cfg: DictConfig, values: Mapping[str, Any], given: Set[str]) -> None:
    """Check that the keys which a group's config should read are read there: else runs differ in their name only.

    Args:
        cfg: The composed config, with interpolations.
        values: The same as plain values.
        given: Keys set on the command line or by a sweep.

    Raises:
        BadInput: A key has no effect.
    """
    optimizer = values["optimizer"].get("_target_")
    for key, matters in {"lr": "lr" in given, "weight_decay": bool(values["weight_decay"])}.items():
        if matters and not _is_read(cfg.optimizer, key):
            raise BadInput(
                f"{key}={values[key]} does not reach the optimizer {optimizer}: its config has no {key}: ${{{key}}}"
            )
    norm, model = values["norm"], values["model"].get("_target_")
    if norm.get("_target_") is None:
        for key in sorted(norm.keys() - {"kind", "_target_"}):
            if not _is_read(cfg.model, f"norm.{key}"):
                raise BadInput(
                    f"norm.{key}={norm[key]} does not reach the model {model}: its config has no ${{norm.{key}}}"
                )
    factors = {"norm.jacobian_factor", "model.jacobian_factor"} & given
    if factors and norm["kind"] != "prop":
        raise BadInput(f"{min(factors)} belongs to norm=prop; with norm={norm['kind']} it changes nothing")
    scheduled = {key for key in given if key.startswith("schedule.")}
    if values["schedule"].get("_target_") is None and scheduled:
        raise BadInput(f"{min(scheduled)} changes nothing with a constant learning rate; give schedule=halve, say")


def _is_read(node: DictConfig, key: str) -> bool:
    """Return whether a config reads a key, or the whole group of the key, by interpolation."""
    names = "|".join(re.escape(name) for name in {key, key.partition(".")[0]})
    text = OmegaConf.to_yaml(node, resolve=False)
    return re.search(rf"\$\{{[^}}]*?(?<![\w.])(?:{names})(?![\w.])", text) is not None


def callable_of(target: str) -> Callable[..., Any] | None:
    """Return the class or function with this dotted name; None if there is none."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if callable(found) else None


def parameters(target: str) -> set[str]:
    """Return the argument names of a class or function; none if they cannot be found."""
    found = callable_of(target)
    try:
        return set() if found is None else set(inspect.signature(found).parameters)
    except (ValueError, TypeError):
        return set()


def _hints(target: str) -> dict[str, Any]:
    found = callable_of(target)
    try:
        return typing.get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except (NameError, TypeError, AttributeError):  # no annotations, or some that only a type checker can resolve
        return {}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
