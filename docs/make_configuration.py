"""Write docs/configuration.md from the commented configs.

python docs/make_configuration.py
"""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parent
CONF = DOCS.parent / "conf"
INTRO = """\
# Configuration

This page is generated from the commented configs by `python docs/make_configuration.py`; edit those, not this page.

Give a key as `key=value` and a group as `group=choice`: `python src/train.py method=bfp method.groups=2 lr=0.05`.
With `-m`, commas list values to sweep over. A key that a config does not have is added with `+`:
`+optimizer.nesterov=true`.
"""


def fenced(path: Path) -> str:
    """A config as a block of YAML."""
    return f"```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```\n"


def page() -> str:
    """The whole page."""
    parts = [INTRO, "## train.yaml: every top-level key and group\n", fenced(CONF / "train.yaml")]
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name not in ("experiment", "hydra"))
    for group in [*groups, CONF / "hydra" / "launcher", CONF / "hydra" / "sweeper"]:
        name = group.relative_to(CONF).as_posix()
        parts.append(f"## {name}\n")
        for path in sorted(group.glob("*.yaml")):
            parts += [f"### {name}={path.stem}\n", fenced(path)]
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(page(), encoding="utf-8")
