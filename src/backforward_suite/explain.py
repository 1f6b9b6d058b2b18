"""Explain an error to a user in one line: what is wrong, and what would be right."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from backforward_suite.errors import BadInput, os_error
from backforward_suite.targets import parameters

# Keys that users of Lightning look for, and what to give instead.
INSTEAD = {
    "accumulate_grad_batches": (
        "batch_size is the whole batch of an update, and micro_batches its number of parts;"
        " give batch_size=512 micro_batches=4, say"
    )
}
ARGUMENTS = ("model", "optimizer", "schedule", "method", "norm")  # groups whose keys are arguments of their target


def explain(error: BaseException, conf: Path, overrides: Sequence[str]) -> str | None:
    """Return one line for the user, or None if the error is not the user's."""
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, BadInput):
            return one_line(str(cause))
    if isinstance(error, ValueError) and str(error).startswith("Only one of --run, --multirun, --cfg"):
        return one_line(str(error))  # Hydra's own
    if isinstance(error, OmegaConfBaseException | HydraException):  # some of Hydra's are an OSError as well
        return _config_error(error, [str(cause) for cause in chain], conf, overrides)
    return next((os_error(cause) for cause in chain if isinstance(cause, OSError)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: set[int] = set()  # a chain may be circular
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _config_error(error: Exception, chain: list[str], conf: Path, overrides: Sequence[str]) -> str:
    everything = "\n".join(chain)
    for pattern, explained in _CASES:
        if found := re.search(pattern, everything):
            return explained(_Said(found, conf, overrides))
    text = one_line(str(error)).partition("; See https://hydra.cc")[0]
    if isinstance(error, OverrideParseException):
        at = error.override if error.override in overrides else " ".join(overrides)
        why = re.sub(r"^Error parsing override '.*?'; | expecting \{.*", "", text)
        return f"{at}: give settings as key=value, with quotes around values with special characters ({why})"
    return text


class _Said(NamedTuple):
    """One of Hydra's messages, matched by its pattern, and its context."""

    found: re.Match[str]
    conf: Path
    overrides: Sequence[str]


def _no_choice(said: _Said) -> str:
    group, choice, there = said.found[1], said.found[2], said.found[3].split()
    if (group, choice) == ("hydra/sweeper", "optuna"):
        return "hydra/sweeper=optuna: it is not installed; pip install -e '.[optuna]'"
    return f"{group}={choice}: no such {group}; there are {', '.join(there)}{_close(choice, there)}"


def _no_config(said: _Said) -> str:
    there = sorted(path.stem for path in said.conf.glob("*.yaml"))
    name = said.found[1]
    return f"--config-name {name}: no such config; {said.conf} has {', '.join(there)}{_close(name, there)}"


def _no_key(said: _Said) -> str:
    full_key = said.found[1]
    group, _, leaf = full_key.rpartition(".")
    if leaf in INSTEAD:
        return f"{full_key}: no such key: {INSTEAD[leaf]}"
    if group == "hydra.sweeper.params":
        return f"{full_key}: this sweeper reads the command line only; give -m {leaf}=VALUE,VALUE"
    if takes := _argument_of_target(said.conf, full_key, said.overrides):
        return f"{full_key}: no key of the config, but an argument of {takes}; add it with +{full_key}=..."
    keys = _keys(said.conf, group, said.overrides)
    there = f"; there are {', '.join(keys)}{_close(leaf, keys)}" if keys else ""
    return f"{full_key}: no such key{there}"


def _no_key_or_group(said: _Said) -> str:
    if said.found[1] in INSTEAD:
        return f"{said.found[1]}: no such key: {INSTEAD[said.found[1]]}"
    groups = sorted(path.name for path in said.conf.iterdir() if path.is_dir())
    return f"{said.found[1]}: no such key or group; groups are {', '.join(groups)}{_close(said.found[1], groups)}"


def _not_removed(said: _Said) -> str:
    key = said.found[1]
    group, _, leaf = key.rpartition(".")
    keys = _keys(said.conf, group, said.overrides)
    if leaf in keys:
        return f"~{key}: {key} is null already, so there is nothing to remove; give it a value with {key}=..."
    return f"~{key}: no such key; there are {', '.join(keys)}{_close(leaf, keys)}"


def _given_twice(said: _Said) -> str:
    group, choice = said.found[1], said.found[2]
    return f"+{group}={choice}: {group} is there already; give {group}={choice}, without +"


def _there_already(said: _Said) -> str:
    return f"+{said.found[1]}: {said.found[1].partition('=')[0]} is there already; give {said.found[1]}, without +"


def _several_values(said: _Said) -> str:
    command = f"python src/train.py -m {shlex.join(said.overrides)}"
    return f"{said.found[1]}: several values are a sweep, which needs -m: {command}"


# Messages of Hydra and OmegaConf, searched in this order in an error and its causes.
_CASES: tuple[tuple[str, Callable[[_Said], str]], ...] = (
    (r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", _no_choice),
    (r"Cannot find primary config '([^']+)'", _no_config),
    (r"Could not delete from config\. '([^']+)' does not exist", _not_removed),
    (r"Multiple values for (\S+)\. To override a value use 'override \S+: (\S+)'", _given_twice),
    (r"Either remove \+ prefix: '([^']+)'", _there_already),
    (r"Ambiguous value for argument '([^']+)'", _several_values),
    (r"Key '[^']+' is not in struct\s+full_key: (\S+)", _no_key),
    (r"Could not override '([^']+)'", _no_key_or_group),
)


def _argument_of_target(conf: Path, full_key: str, overrides: Sequence[str]) -> str:
    """Return the target of a group's config if it has an argument of this name; else ''."""
    group, _, leaf = full_key.partition(".")
    file = _file_of(conf, group, overrides)
    if file is None:
        return ""
    loaded = OmegaConf.load(file)
    target = OmegaConf.select(loaded, "_target_") or OmegaConf.select(loaded, f"{group}._target_")
    if not isinstance(target, str) or group not in ARGUMENTS:
        return ""
    return target if leaf in parameters(target) else ""


def _keys(conf: Path, group: str, overrides: Sequence[str]) -> list[str]:
    """Return the keys of `conf/train.yaml`, or those of a group's choice on the command line, else by default."""
    file = _file_of(conf, group, overrides) if group else conf / "train.yaml"
    if file is None:
        return []
    loaded = OmegaConf.load(file)
    assert isinstance(loaded, DictConfig)
    bases = [str(base) for base in loaded.get("defaults", ())] if group else []  # `defaults: [default]`
    for file in [conf / group / f"{base}.yaml" for base in bases]:
        merged = OmegaConf.merge(OmegaConf.load(file), loaded) if file.is_file() else loaded
        assert isinstance(merged, DictConfig)
        loaded = merged
    loaded = loaded.get(group, loaded)  # a group's file may have its own keys under its name, next to others
    if loaded is None:  # a choice without keys, as study=none
        return []
    keys = [str(key) for key in loaded if key not in ("defaults", "hydra", "_target_")]
    if not group:
        keys += sorted(path.name for path in conf.iterdir() if path.is_dir() and path.name != "hydra")
    return keys


def _file_of(conf: Path, group: str, overrides: Sequence[str]) -> Path | None:
    """Return the file of a group's choice on the command line, else by default, else any; None without such a group."""
    chosen = [text.partition("=")[2].split(",")[0] for text in overrides if text.startswith(f"{group}=")]
    defaults = OmegaConf.load(conf / "train.yaml").defaults
    by_default = [entry[group] for entry in defaults if isinstance(entry, DictConfig) and group in entry]
    files = [conf / group / f"{choice}.yaml" for choice in chosen + by_default]
    files += sorted((conf / group).glob("*.yaml"))
    return next((path for path in files if path.is_file()), None)


def _close(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def one_line(text: str) -> str:
    """Join the lines of a text into one."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "unknown error"
