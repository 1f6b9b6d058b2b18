"""Check the command line of `src/train.py` before Hydra reads it, and print its manual."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from backforward_suite.errors import BadInput

USAGE = """\
Train one network, or sweep over many settings:

    python src/train.py lr=0.05 method=bfp                        one run
    python src/train.py -m lr=0.1,0.05,0.01 method=bfp,sgd        a sweep: every combination
    python src/train.py --help GROUP ...                          the choices of a group, such as method
    python src/train.py --help GROUP=CHOICE ...                   the keys of a choice, such as method=bfp
    python src/train.py --cfg job lr=0.05                         print the settings, train nothing
    python src/train.py --hydra-help                              Hydra's own options

"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of printing the usage and exiting."""
        raise BadInput(f"{message}; see --help")


def checked(given: Sequence[str], conf: Path) -> list[str]:
    """Return the arguments for Hydra.

    Args:
        given: The command line.
        conf: The folder of configs.

    Raises:
        BadInput: An option is unknown or follows a setting, or a group has a value instead of a choice.
    """
    parser = get_args_parser()
    options = sorted(flag for flag in parser._option_string_actions if flag.startswith("--"))
    parser.__class__ = Parser
    read, unread = parser.parse_known_args(list(given))
    for argument in unread:
        if argument.startswith("-"):
            setting = argument.lstrip("-")
            close = difflib.get_close_matches(argument.partition("=")[0], options, n=1)
            if re.match(r"[\w.]+=", setting) and (not close or _is_setting(setting, conf)):
                raise BadInput(f"{argument}: settings have no dashes; give {shlex.quote(setting)}")
            hint = f"did you mean {close[0]}? " if close else ""
            raise BadInput(f"{argument}: no such option; {hint}--help lists the settings, --hydra-help the options")
    if unread:
        settings = [argument for argument in given if argument in (*read.overrides, *unread)]
        flags = [argument for argument in given if argument not in settings]
        raise BadInput(f"{unread[0]}: options go before all settings; give {shlex.join([*flags, *settings])}")
    for override in read.overrides:
        _refuse_value_of_group(override, conf)
    for_each_run = {argument: _of_each_run(argument, conf) for argument in read.overrides if read.multirun}
    return [_with_home(for_each_run.get(argument, argument)) for argument in given]


def _refuse_value_of_group(override: str, conf: Path) -> None:
    """Refuse a value for a group, which takes the name of a choice: the value would replace the whole group."""
    key, equals, value = override.partition("=")
    group = key.lstrip("+")
    if equals and not group:
        raise BadInput(f"{override}: give a setting as key=value")
    if not equals or not _is_group(conf, group):
        return
    if value[:1] in ("{", "["):
        raise BadInput(f"{override}: {group} is a group; give its choice as {group}=..., its keys as {group}.key=...")
    if value in ("", "null") and group != "experiment":
        raise BadInput(f"{override}: {group} is a group; there are {', '.join(choices(conf, group))}")


def _of_each_run(override: str, conf: Path) -> str:
    """In a sweep, turn a group's key into a swept one: each run's own choice, not the default, must have the key.

    Hydra composes the sweep's own settings before those of its runs, and leaves out only swept keys.
    """
    key, _, value = override.partition("=")
    group, dot, _ = key.partition(".")
    if not value or not dot or group == "hydra" or not _is_group(conf, group):
        return override
    try:
        (read,) = OverridesParser.create().parse_overrides([override])
    except HydraException:  # Hydra reports it later
        return override
    return override if read.is_sweep_override() else f"{key}=choice({value})"


def _with_home(argument: str) -> str:
    """Expand the `~` in `data.root=~/x`, which the shell does not expand and Hydra cannot read."""

    def home(found: re.Match[str]) -> str:
        path = os.path.expanduser(found[0])  # noqa: PTH111  (Path.expanduser raises for an unknown user)
        return path if re.fullmatch(r"[\w./+-]*", path) else "'" + path.replace("'", "\\'") + "'"

    key, equals, value = argument.partition("=")
    return key + equals + re.sub(r"(?<![^,])~[^,]*", home, value) if equals else argument


def _is_setting(override: str, conf: Path) -> bool:
    key = re.split(r"[.=]", override)[0]
    return _is_group(conf, key) or f"\n{key}:" in (conf / "train.yaml").read_text()


def _is_group(conf: Path, name: str) -> bool:
    return bool(re.fullmatch(r"[\w/]+", name)) and (conf / name).is_dir()


def groups(conf: Path) -> list[str]:
    """Return the groups of configs, in the order of the defaults in `train.yaml`, then all others."""
    there = sorted(path.name for path in conf.iterdir() if path.is_dir() and path.name != "hydra")
    manual = (conf / "train.yaml").read_text()
    return sorted(there, key=lambda name: place if (place := manual.find(f"- {name}:")) >= 0 else len(manual))


def choices(conf: Path, group: str) -> list[str]:
    """Return the choices of a group."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def wants_help(given: Sequence[str]) -> bool:
    """Return whether the command line asks for the manual."""
    return any(argument in ("--help", "-h") for argument in given)


def manual(given: Sequence[str], conf: Path) -> str:
    """Return the manual: `train.yaml` with its comments, or the named groups and choices.

    Raises:
        BadInput: There is no such group, or no such choice of it.
    """
    named = [argument for argument in given if not argument.startswith("-")]
    if named:
        return "\n".join(_page(conf, argument) for argument in named)
    text = (conf / "train.yaml").read_text().partition("\nhydra:")[0]
    listed = "\n".join(f"    {group}: {', '.join(choices(conf, group))}" for group in groups(conf))
    return f"{USAGE}conf/train.yaml:\n\n{_indented(text)}\n\nGroups and their choices:\n\n{listed}\n"


def _page(conf: Path, argument: str) -> str:
    group, equals, choice = argument.partition("=")
    if not _is_group(conf, group):
        raise BadInput(f"--help {argument}: no such group; there are {', '.join(groups(conf))}")
    there = choices(conf, group)
    if not equals:
        lines = [f"    {name:<20} {_first_comment(conf / group / f'{name}.yaml')}".rstrip() for name in there]
        return f"{group}:\n\n" + "\n".join(lines) + f"\n\nThe keys of one: --help {group}={there[0]}\n"
    if choice not in there:
        raise BadInput(f"--help {argument}: no such {group}; there are {', '.join(there)}")
    return f"conf/{group}/{choice}.yaml:\n\n{_indented((conf / group / f'{choice}.yaml').read_text())}\n"


def _first_comment(path: Path) -> str:
    lines = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
    return next((line for line in lines if not line.startswith("@package")), "")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())
