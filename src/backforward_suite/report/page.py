"""Write findings as `index.html` and `report.md`, and each figure as SVG and PNG.

The page is one file without scripts; styles and figures are embedded. It contains no date, so that the same runs give
the same bytes. Everything that comes from runs is escaped.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from backforward_suite.atomic import remove_half_written, whole
from backforward_suite.errors import cause_of
from backforward_suite.report import answer, experiments, style
from backforward_suite.report.claims import Claim, read_claims
from backforward_suite.report.finding import ANSWERS, KINDS, Figure, Finding, Kind, Verdict
from backforward_suite.report.reading import Run, read_runs, refuse_mixed_data

SIGNS: Mapping[Kind, str] = {
    "reproduced": "✓",
    "contradicted": "✗",
    "inconclusive": "?",
    "not run": "–",
    "stand-in data": "≈",
}
MEANINGS: Mapping[Kind, str] = {
    "reproduced": "the 95 % interval of what was measured agrees with the claim",
    "contradicted": "the interval excludes the claim, or lies within the tolerance that counts as no effect",
    "inconclusive": "the interval allows both, or the runs are too few or too short to say",
    "not run": "there are no runs for it; its entry says what to do",
    "stand-in data": "measured on a data set that the claim is not about, which says nothing about the claim",
}
SCALES: Mapping[str, str] = {
    "smoke": "minutes; shows that everything runs; every verdict stays inconclusive",
    "small": "hours on two cores; real data, but fewer images and smaller networks; verdicts are about direction only, "
    "except where a paper's whole protocol was run",
    "medium": "hours on a CPU; all of CIFAR-10 on a NIN of a quarter of its width",
    "paper": "the papers' own protocol",
}
PAPERS = {"bfp": "Backforward Propagation", "np": "Normalization Propagation"}  # by the start of an experiment's name
COMMIT_LENGTH = 9


# --- findings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A figure as files.

    Attributes:
        figure: Its description.
        svg: The SVG file.
        png: The PNG file.
        width: In CSS pixels.
        height: In CSS pixels.
    """

    figure: Figure
    svg: bytes
    png: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        """The figure as a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


@dataclass(frozen=True)
class Examined:
    """One experiment, ready for the page.

    Attributes:
        finding: What was found.
        drawn: Its figures.
        fault: Why it could not be examined, in one line; empty if it could.
    """

    finding: Finding
    drawn: tuple[Drawn, ...] = ()
    fault: str = ""


def examine_all(outputs: Path, scale: str) -> list[Examined]:
    """Examine all experiments of a scale, in the order of the page, including those without runs.

    If an experiment cannot be examined, the page shows the cause in its place and all the others.

    Args:
        outputs: Holds `<scale>/<experiment>/<run>/`.
        scale: `smoke`, `small`, `medium` or `paper`.
    """
    claims = read_claims()
    return [
        _examine(
            name, read_runs(outputs / scale / name), [claim for claim in claims if claim.experiment == name], scale
        )
        for name in experiments.names()
    ]


def _examine(name: str, runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Examined:
    experiment = experiments.load(name)
    try:
        refuse_mixed_data(runs)
        finding = experiment.examine(runs, claims, scale)
        return Examined(finding, tuple(draw(figure, stamp_of(finding)) for figure in finding.figures))
    except Exception as error:
        fault = f"could not be examined: {cause_of(error)}"
        verdicts = tuple(Verdict(claim, "inconclusive", "", fault) for claim in claims)
        return Examined(Finding(name, experiment.question, verdicts, (), (), tuple(runs), scale, ""), fault=fault)


def stamp_of(finding: Finding) -> str:
    """The small print of its figures."""
    stand_in = "stand-in data" if finding.stand_in else ""
    return " · ".join(filter(None, [f"scale {finding.scale}", finding.hardware, stand_in]))


def draw(figure: Figure, stamp: str) -> Drawn:
    """Draw a figure in the report's style, with legend and stamp."""
    with style.applied():
        canvas = figure.draw()
        style.legend(canvas)
        style.stamp(canvas, stamp)
        width, height = (round(96 * inches) for inches in canvas.get_size_inches())
        return Drawn(figure, style.encode(canvas, "svg"), style.encode(canvas, "png"), width, height)


def faults(examined: Sequence[Examined]) -> list[str]:
    """The experiments that could not be examined, and why, a line each."""
    return [f"{each.finding.experiment} {each.fault}" for each in examined if each.fault]


def counted(examined: Sequence[Examined], kind: str) -> Counter[Kind]:
    """The number of verdicts of each kind, of the papers' claims (`claim`) or our questions (`question`)."""
    verdicts = (verdict for each in examined for verdict in each.finding.verdicts)
    return Counter(verdict.kind for verdict in verdicts if verdict.claim.kind == kind)


def tally(examined: Sequence[Examined]) -> str:
    """The number of verdicts and answers of each kind, in one line."""
    claims, questions = counted(examined, "claim"), counted(examined, "question")
    told = ", ".join(f"{claims[kind]} {kind}" for kind in KINDS if claims[kind])
    asked = ", ".join(f"{questions[kind]} {ANSWERS.get(kind, kind)}" for kind in KINDS if questions[kind])
    parts = [
        f"{claims.total()} claims: {told}" if told else "",
        f"{questions.total()} questions: {asked}" if asked else "",
    ]
    return "; ".join(filter(None, parts)) or "no claims"


# --- pages -----------------------------------------------------------------------------------------------------------


def write(examined: Sequence[Examined], folder: Path, scale: str) -> Path:
    """Write page, text and figures, each file atomically.

    Args:
        examined: In the order of the page.
        folder: The target; figures of an earlier report there that this one does not have are deleted.
        scale: The scale of all findings.

    Returns:
        The page's path.
    """
    context = _context(examined, scale)
    # Everything is made before the first file is touched.
    files = {f"figures/{drawn.figure.name}.{kind}": getattr(drawn, kind) for e in examined for drawn in e.drawn
             for kind in ("svg", "png")}  # fmt: skip
    files["index.html"] = _environment().get_template("page.html.j2").render(context).encode()
    report = _environment(markdown=True).get_template("report.md.j2").render(context).encode()
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "figures"):
        remove_half_written(place, [Path(name).name for name in (*files, "report.md")])
    for name, content in files.items():
        with whole(folder / name, "wb") as file:
            file.write(content)
    for name in _figures_of(folder / "report.md") - files.keys():
        (folder / name).unlink(missing_ok=True)
    # Last: until then, the report before names the figures to remove.
    with whole(folder / "report.md", "wb") as file:
        file.write(report)
    return folder / "index.html"


def _figures_of(report: Path) -> set[str]:
    """The figures that an existing report in Markdown links to."""
    try:
        return set(re.findall(r"\((figures/\w[\w-]*\.(?:svg|png))\)", report.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        return set()


def _environment(markdown: bool = False) -> Environment:
    environment = Environment(
        loader=PackageLoader("backforward_suite.report", "."),
        autoescape=not markdown,  # noqa: S701 (Markdown is escaped by `in_markdown`)
        undefined=StrictUndefined,
        finalize=in_markdown if markdown else None,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": Plain,
        "published": published,
        "rule": rule,
        "prose": prose_in_markdown if markdown else prose,
        "duration": duration,
        "commands": commands,
        "anchor": anchor,
        "runs": count_of_runs,
    }
    environment.globals |= {
        "signs": SIGNS,
        "meanings": MEANINGS,
        "scales": SCALES,
        "kinds": KINDS,
        "answers": ANSWERS,
        "papers": PAPERS,
    }
    return environment


def _context(examined: Sequence[Examined], scale: str) -> dict[str, Any]:
    findings = [e.finding for e in examined]
    runs = _trained(run for finding in findings for run in finding.runs)
    return {
        "scale": scale,
        "examined": [{"finding": e.finding, "drawn": e.drawn, "fault": e.fault, "runs": list(map(row, e.finding.runs))}
                     for e in examined],
        "claims": counted(examined, "claim"),
        "questions": counted(examined, "question"),
        "answer": answer.sentences(findings),
        "hardware": _distinct(each for finding in findings for each in finding.hardware.split("; ")),
        "code": ", ".join(_distinct(part(run) for part in (commit_of, torch_of) for run in runs)),
        "runs": len(runs),
        "stand_in": any(finding.stand_in for finding in findings),
        "seconds": sum(run.result.get("timing", {}).get("training_seconds") or 0 for run in runs),
    }  # fmt: skip


def _trained(runs: Iterable[Run]) -> list[Run]:
    """Each training once: experiments may share a run, which then has the same result in each."""
    found: dict[object, Run] = {}
    for run in runs:
        settings = run.result.get("settings_hash")  # a run that failed to begin has none
        ended = run.result.get("timing", {}).get("finished_at")  # equal settings trained twice count twice
        found.setdefault((settings, ended) if settings else run.folder, run)
    return list(found.values())


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def commit_of(run: Run) -> str:
    """The commit of the code behind a run, with `+changes` if it had uncommitted changes."""
    commit, changes = str(run.result.get("code", {}).get("commit") or "").partition("+")[::2]
    return commit[:COMMIT_LENGTH] + ("+" + changes if changes else "")


def torch_of(run: Run) -> str:
    """The version of torch behind a run."""
    version = run.result.get("code", {}).get("torch")
    return f"torch {version}" if version else ""


def duration(seconds: float) -> str:
    """Seconds in words, in a suitable unit."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def row(run: Run) -> dict[str, str]:
    """A run's row in the list of runs."""
    seconds = run.result.get("timing", {}).get("training_seconds")
    return {
        "run": run.name,
        "status": run.status if run.status != "failed" else f"failed: {run.result.get('cause', 'cause unknown')}",
        "data": run.data,
        "epochs": _number(run.final("epoch"), "{:.0f}"),
        "train loss": _number(run.final("loss/train"), "{:.4f}"),
        "validation %": _number(run.final("accuracy/validation"), "{:.2%}").rstrip("%"),
        "test %": _number(run.final("accuracy/test"), "{:.2%}").rstrip("%"),
        "seconds": _number(seconds, "{:.1f}"),
    }


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""


def published(claim: Claim, most: int | None = None) -> str:
    """The published numbers of a claim in one line; `most` of them, and how many more there are."""
    numbers = [f"{name}: {_span(value)}" for name, value in claim.published.items()]
    rest = len(numbers) - most if most is not None else 0
    unit = f" ({claim.unit})" if claim.unit and numbers else ""
    return ", ".join(numbers[:most]) + (f" and {rest} more" if rest > 0 else "") + unit


def _span(value: Any) -> str:
    return f"{value[0]:g} to {value[1]:g}" if isinstance(value, tuple) else f"{value:g}"


def commands(finding: Finding) -> list[str]:
    """The commands that run an experiment: its own sweep, and the sweep with the report."""
    name, scale = finding.experiment, finding.scale
    if finding.stand_in:
        return [f"make reproduce ONLY={name} SCALE={scale} STAND_IN=1"]
    return [f"python src/train.py -m experiment={name} scale={scale}", f"make reproduce ONLY={name} SCALE={scale}"]


RULES: Mapping[str, str] = {
    "direction": "sign of the effect",
    "value": "published number",
    "identity": "mathematical identity",
    "share": "frequency",
    "curve": "published curve",
}


def rule(claim: Claim) -> str:
    """How a claim is judged, in one line."""
    if claim.tolerance is None:
        asked = f", at least {claim.arguments['at_least']:.0%}" if "at_least" in claim.arguments else ""
    else:
        share = " relative" if claim.arguments.get("relative") else f" {claim.unit}".rstrip()
        asked = f", tolerance {claim.tolerance:g}{share}"
    late = " Set after results were known (post hoc)." if claim.post_hoc else ""
    return f"{RULES[claim.rule]}{asked}. {claim.tolerance_why}{late}"


def count_of_runs(count: int) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} run" if count == 1 else f"{count:,} runs"


def prose(text: str) -> Markup:
    """A sentence as HTML: escaped, with text between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 (escaped just here)


def prose_in_markdown(text: str) -> Plain:
    """The same as Markdown."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # an unpaired backtick
        return Plain(in_markdown(text))
    return Plain("".join(f"`{part}`" if number % 2 else in_markdown(part) for number, part in enumerate(parts)))


def anchor(text: str) -> str:
    """A text as an anchor on the page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class Plain(str):
    """Text that must not be escaped in Markdown: code, and links that this module made."""

    __slots__ = ()


def in_markdown(value: Any) -> str:
    """Text escaped for Markdown, in one line."""
    if isinstance(value, Plain):
        return value
    text = re.sub(r"\s*\n\s*", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)
