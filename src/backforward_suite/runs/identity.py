"""What a run stands on besides its settings: the content of its data, and the source of models and rules of one's own.

A run's identity is its settings (`Request.hash`), the SHA-256 of its data and that of each module of one's own. A
result and a checkpoint keep all three; a run is finished, or goes on, for a request that has the same. What an older
version did not keep is no difference.
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

OURS = ("backforward", "backforward_suite", "torch")  # their versions are in the result; what moves is no other class


def changed(request: Request, result: Mapping[str, Any]) -> str:
    """What has changed since a run of equal settings was finished, in words; empty if nothing has.

    Data whose files look as they did are not read again. Those that look different, or lie elsewhere, are: their
    content decides.

    Args:
        request: What is asked for now.
        result: What stands in the run's `result.json`.
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
    """Which modules of one's own are not what they were, in words; empty if all are, or nobody knows."""
    now = own_sources(request.values)
    moved = [name for name in now if found and found.get(name, now[name]) != now[name]]
    return f"the source of {', '.join(moved)} has changed" if moved else ""


@cache
def _content(data: DataSettings, _looks: str) -> str:
    """SHA-256 of the data as they are now; read once for all runs of a sweep."""
    from backforward_suite.data import load_asked  # torch, which takes seconds

    return load_asked(data).fingerprint


# --- source of one's own -------------------------------------------------------------------------------------------


def own_sources(values: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each module that holds a `_target_` of one's own, and of what it imports that is installed nowhere.

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
    """The module of a dotted path to a class or function; none if it is ours, or is not found."""
    if target.partition(".")[0] in OURS:
        return []
    parts = target.split(".")[:-1]
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(([name] for name in names if _source(name) is not None), [])


def _source(name: str) -> Path | None:
    try:
        spec = find_spec(name)
    except Exception:  # whatever a package of one's own does when it is imported: the run's start says so
        return None
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _is_own(name: str) -> bool:
    path = None if name.partition(".")[0] in OURS else _source(name)
    installed = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return path is not None and not any(path.is_relative_to(folder) for folder in installed)


def _imports(name: str, path: Path, text: bytes) -> Iterator[str]:
    """The modules that a module's source imports, wherever in it."""
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
