"""The identity of a run besides its settings: the content of its data and the source of the user's own modules.

A run is identified by its settings (`Request.hash`), the SHA-256 of its data, and the SHA-256 of each of the user's
modules. Results and checkpoints record all three. A finished run is reused, and a half-done one resumed, only for a
request in which all three are equal; what an older version did not record counts as equal.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backforward_suite.config import DataSettings, Request
from backforward_suite.datafiles import stamps

OURS = ("backforward", "backforward_suite", "torch")  # the result records their versions


def changed(request: Request, result: Mapping[str, Any]) -> str:
    """What has changed since a run of equal settings finished, in words; empty if nothing has.

    Data are read again only if the path, size or modification time of a file differs; then their content decides.

    Args:
        request: What is asked for now.
        result: The content of the run's `result.json`.
    """
    code = result.get("code")
    if differs := changed_sources(request, code.get("own") if isinstance(code, Mapping) else None):
        return differs
    data, now = result.get("data"), stamps(request.settings.data.name, Path(request.settings.data.root))
    if not isinstance(data, Mapping) or not data.get("files") or not now or now == data["files"]:
        return ""
    if _content(request.settings.data, repr(now)) == data.get("sha256"):
        return ""
    return f"{', '.join(str(path) for path, _, _ in now[:3])} {'holds' if len(now) == 1 else 'hold'} other data now"


def changed_sources(request: Request, found: Mapping[str, str] | None) -> str:
    """The user's modules that have changed, in words; empty if none has, or none was recorded."""
    now = own_sources(request.values)
    moved = [name for name in now if found and found.get(name, now[name]) != now[name]]
    return f"the source of {', '.join(moved)} has changed" if moved else ""


@cache
def _content(data: DataSettings, _looks: str) -> str:
    """SHA-256 of the data as they are now; cached for all runs of a sweep."""
    from backforward_suite.data import load_asked  # slow: it imports torch

    return load_asked(data).fingerprint


def own_sources(values: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each module of the user's that holds a `_target_`, and of the user's modules that these import.

    Args:
        values: Settings.
    """
    todo = [name for target in _targets(values) for name in _module_of(target)]
    found: dict[str, str] = {}
    while todo:
        name = todo.pop()
        path = _source(name)
        if name in found or path is None:
            continue
        text = path.read_bytes()
        found[name] = hashlib.sha256(text).hexdigest()
        todo += [other for other in _imports(name, path, text) if _is_own(other)]
    return dict(sorted(found.items()))


def _targets(values: Any) -> Iterator[str]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key == "_target_" and isinstance(value, str):
                yield value
            yield from _targets(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _targets(value)


def _module_of(target: str) -> list[str]:
    """The module of a dotted path to a class or function; empty if it is ours or not found."""
    if target.partition(".")[0] in OURS:
        return []
    parts = target.split(".")[:-1]
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(([name] for name in names if _source(name) is not None), [])


def _source(name: str) -> Path | None:
    try:
        spec = find_spec(name)
    except Exception:  # the user's package raises when it is imported: the run itself will report that
        return None
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _is_own(name: str) -> bool:
    path = None if name.partition(".")[0] in OURS else _source(name)
    installed = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return path is not None and not any(path.is_relative_to(folder) for folder in installed)


def _imports(name: str, path: Path, text: bytes) -> Iterator[str]:
    """The modules that a module's source imports anywhere."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
