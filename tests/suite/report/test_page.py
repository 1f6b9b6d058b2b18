from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.browser import chromium_in
from tests.helpers.commands import REPOSITORY, Command, Ended
from tests.helpers.pages import HOSTILE, findings
from tests.helpers.synthetic import write_run

from backforward_suite import cli
from backforward_suite.commands import report as report_command
from backforward_suite.report import experiments, page
from backforward_suite.report.claims import read_claims
from backforward_suite.report.finding import KINDS, Finding
from backforward_suite.report.reading import read_runs
from backforward_suite.runs.files import read_result, write_result
from backforward_suite.runs.lifecycle import take_over

PHONE, DESK = 390, 1280  # CSS pixels


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    page.write(findings(folder), folder, "small")
    return folder


class Parts(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def values(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(attribute)) is not None]


def test_the_page_asks_for_nothing_else_and_runs_no_script(report: Path) -> None:
    text = (report / "index.html").read_text()
    parts = Parts(text)
    assert not {tag for tag, _ in parts.tags} & {"script", "iframe", "object", "embed", "base", "form"}
    for address in [*parts.values("src"), *parts.values("href")]:
        assert address.startswith(("#", "data:")), address
    assert not re.search(r"url\(|@import|\son\w+=", text)


def test_its_anchors_lead_somewhere_and_stand_once(report: Path) -> None:
    parts = Parts((report / "index.html").read_text())
    ids = parts.values("id")
    assert len(ids) == len(set(ids))
    links = [address.removeprefix("#") for address in parts.values("href") if address.startswith("#")]
    assert {"bfp_learning_rates", "bfp-learning-rates-not-run", "np_table"} <= set(links) <= set(ids)


def test_verdicts_are_told_by_word_and_sign(report: Path) -> None:
    html, markdown = (report / "index.html").read_text(), (report / "report.md").read_text()
    for kind in KINDS:
        assert f'<span class="sign" aria-hidden="true">{page.SIGNS[kind]}</span> {kind}</span>' in html
        assert f"{page.SIGNS[kind]} **{kind}**" in markdown
    assert len(set(page.SIGNS.values())) == len(KINDS)


def test_the_page_opens_with_methods_question_answer_and_tally(report: Path) -> None:
    text = (report / "index.html").read_text()
    parts = ["<h1>", "<svg", "What is tested.", 'id="answer"', 'id="tally"', 'id="summary"', "<section"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_claims_and_questions_are_counted_apart(tmp_path: Path) -> None:
    examined = page.examine_all(tmp_path, "small")
    claims = read_claims()
    questions = sum(claim.kind == "question" for claim in claims)
    count = len(claims) - questions
    assert page.tally(examined) == f"{count} claims: {count} not run; {questions} questions: {questions} not run"
    page.write(examined, tmp_path / "report", "small")
    assert f"<b>{len(claims) - questions}</b>" in (tmp_path / "report" / "index.html").read_text()


def test_what_was_set_post_hoc_is_marked_in_the_summary(tmp_path: Path) -> None:
    page.write(page.examine_all(tmp_path, "small"), tmp_path / "report", "small")
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    for claim in read_claims():
        mark = " *post hoc* |" if claim.post_hoc else " |"
        assert any(f"| {page.in_markdown(claim.statement)}{mark}" in line for line in lines), claim.id


def test_the_page_has_no_names_that_only_the_code_knows(tmp_path: Path) -> None:
    """But for commands, which stand as code."""
    page.write(page.examine_all(tmp_path, "small"), tmp_path / "report", "small")
    text = re.sub(
        r"<(code|style)>.*?</\1>|<[^>]*>", " ", (tmp_path / "report" / "index.html").read_text(), flags=re.DOTALL
    )
    for name in ("bfp_poster", "sgd_repeat", "sgd_2lr", "middle of the range", "batch_size", "np_"):
        assert name not in text, name


def test_what_comes_from_runs_is_no_markup(report: Path) -> None:
    html, markdown = (report / "index.html").read_text(), (report / "report.md").read_text()
    assert (
        "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    )  # a data set's name, a failure's cause, a cell, a note
    assert "<script" not in html
    assert "<script" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| &lt;script")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 4  # the bar in the cell made no column


def test_everything_said_of_an_experiment_is_on_both(report: Path) -> None:
    for name in ("index.html", "report.md"):
        text = (report / name).read_text().replace("\\", "")
        for said in (
            "Does exact Backforward reach",
            "-0.4 [-0.7, -0.1], 5 pairs",
            "AAAI 2023, p. 2, Fig. 1",
            "sgd: 31, bfp: 13 (epochs)",
            "Holm's correction" if name == "report.md" else "Holm&#39;s correction",
            "lr 1: one of 5 seeds diverged.",
            "python src/train.py -m experiment=bfp_learning_rates scale=small",
            "2 cores of an AMD EPYC",
            "make reproduce ONLY=np_table",
            "could not be examined: KeyError",
        ):
            assert said in text, f"{said} is not in {name}"


def test_a_run_that_two_experiments_share_is_counted_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "bfp_learning_rates", seconds=90)
    for name, copy in (("bfp_weight_norm", True), ("bfp_depth", False)):
        elsewhere = tmp_path / "small" / name / folder.name
        take_over(folder, elsewhere)
        if not copy:  # its own training of these settings
            result = read_result(folder) or {}
            write_result(elsewhere, result | {"timing": result["timing"] | {"finished_at": "2026-01-01"}})
    examined = [
        page.Examined(Finding(name, "Why?", (), (), (), tuple(read_runs(tmp_path / "small" / name)), "small", ""))
        for name in ("bfp_learning_rates", "bfp_weight_norm", "bfp_depth")
    ]
    page.write(examined, tmp_path / "report", "small")
    html, markdown = ((tmp_path / "report" / file).read_text() for file in ("index.html", "report.md"))
    assert "2 runs, 3 minutes of training" in html
    assert html.count("1 run behind it") == 3  # where it is read, it is listed
    assert "2 runs" in markdown


def test_the_same_findings_give_the_same_bytes(report: Path, tmp_path: Path) -> None:
    page.write(findings(report), tmp_path, "small")
    assert contents(tmp_path) == contents(report)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_replaces_the_one_before_and_nothing_else(report: Path, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "of_yesterday.svg").write_text("<svg/>")
    (tmp_path / "figures" / "of_mine.svg").write_text("<svg/>")
    (tmp_path / "report.md").write_text("![x](figures/of_yesterday.svg) and ![y](figures/../../index.svg)")
    page.write(findings(report), tmp_path, "small")
    names = {f"bfp_learning_rates_{figure}.{kind}" for figure in ("curves", "forest") for kind in ("svg", "png")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names | {"of_mine.svg"}


def test_nothing_is_written_where_a_page_cannot_be_made(tmp_path: Path) -> None:
    broken = [*findings(tmp_path), None]
    with pytest.raises(AttributeError):
        page.write(broken, tmp_path / "report", "small")  # type: ignore[arg-type]
    assert not (tmp_path / "report").exists()


def test_scale_and_hardware_are_stamped_into_figures(report: Path) -> None:
    # Paths of glyphs hide the text; matplotlib leaves it beside them as a comment.
    svg = (report / "figures" / "bfp_learning_rates_curves.svg").read_text()
    assert "<!-- scale small · 2 cores of an AMD EPYC -->" in svg


@pytest.mark.parametrize("name", experiments.names())
def test_an_experiment_without_runs_says_what_to_do(name: str, tmp_path: Path) -> None:
    [examined] = [each for each in page.examine_all(tmp_path, "small") if each.finding.experiment == name]
    assert examined.fault == ""
    assert examined.finding.question.endswith("?")
    assert {verdict.kind for verdict in examined.finding.verdicts} <= {"not run"}
    said = [*(verdict.why for verdict in examined.finding.verdicts), *examined.finding.notes]
    assert any(name in text for text in said)


def test_an_experiment_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = experiments.names()[0]

    class Failing:
        question = "Why?"

        @staticmethod
        def examine(*_: object) -> None:
            raise KeyError("x")

    load = experiments.load
    monkeypatch.setattr(experiments, "load", lambda asked: Failing if asked == name else load(asked))
    examined = page.examine_all(tmp_path, "small")
    assert [each.finding.experiment for each in examined] == experiments.names()
    assert "KeyError: 'x'" in examined[0].fault
    assert not any(each.fault for each in examined[1:])


def test_every_experiment_has_a_config_and_a_place_on_the_page() -> None:
    folder = Path(experiments.__file__).parent
    assert set(experiments.MODULES) == {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    modules = [import_module(f"{experiments.__name__}.{name}") for name in experiments.MODULES]
    defined = [experiment.name for module in modules for experiment in module.EXPERIMENTS]
    configs = {path.stem for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml")}
    assert sorted(experiments.ORDER) == sorted(defined)
    assert set(experiments.ORDER) <= configs
    assert {claim.experiment for claim in read_claims()} <= set(experiments.ORDER)


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real browser without a window."""
    with chromium_in(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_in_a_browser(browser: Any, report: Path, tmp_path: Path, width: int, scheme: str) -> None:
    """`BACKFORWARD_PAGE=index.html` looks at that page; `BACKFORWARD_SCREENSHOTS=folder` keeps pictures."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    path = Path(os.environ.get("BACKFORWARD_PAGE", report / "index.html")).resolve()
    browser.get(path.as_uri())
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    ask = browser.execute_script
    assert ask("return document.compatMode") == "CSS1Compat"
    pictures = ask("return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.alt])")
    assert len(pictures) == path.read_text().count("<img")
    assert all(complete and natural > 100 and shown > 100 and alt for complete, natural, shown, alt in pictures)
    # Wide things scroll within their boxes, also with the lists of runs unfolded.
    ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert ask("return document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && "
    )
    outside += "!e.closest('.box, .paper, pre, .summary thead')).map(e => e.outerHTML.slice(0, 200))"
    assert ask(f"return {outside}") == []
    sizes = ask("return [...document.body.querySelectorAll('*')].map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 12
    for anchor in ask("return [...document.querySelectorAll('a')].map(a => a.hash.slice(1))"):
        assert ask("return document.getElementById(arguments[0]) !== null", anchor), anchor
    rows = "[...document.querySelectorAll('tr[data-verdict]')].filter(r => r.offsetParent)"
    shown = f"return {rows}.map(r => r.dataset.verdict)"
    everything = ask(shown)
    ask("document.getElementById('v-contradicted').click()")
    assert set(ask(shown)) == {"contradicted"} & set(everything)
    ask("document.getElementById('v-all').click(); document.getElementById('p-np').click()")
    assert 0 < len(ask(shown)) < len(everything)
    ask("document.getElementById('p-all').click()")
    assert ask(shown) == everything
    folder = Path(os.environ.get("BACKFORWARD_SCREENSHOTS", tmp_path))
    assert browser.save_screenshot(str(folder.resolve() / f"page-{width}-{scheme}.png"))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`python src/report.py ...` in an empty folder, within this process."""

    def call(*arguments: str) -> Ended:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", ["report.py", *arguments])
            patch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets both: have them put back
            patch.setenv("BACKFORWARD_TRACEBACKS", "0")
            patch.setenv("COLUMNS", "200")
            capfd.readouterr()
            code = cli.run(report_command.main, report_command.CONF)
        return Ended(code, *capfd.readouterr())

    return call


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["page"], "no results of any scale here; make reproduce"),
        ([], "no results of any scale here; make reproduce"),
        (["--reference"], "no results of any scale here"),
        (["keep"], "no results of any scale here"),
        (["keep", "--scale", "small"], "no finished run here; make reproduce SCALE=small"),
        (["page", "--reference", "--scale", "small"], "no committed results here"),
    ],
)
def test_nothing_to_report_on_costs_a_line(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    ended = command(*arguments)
    assert ended.code == cli.BAD_INPUT
    assert says in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_committed_results_give_the_page_without_their_runs(command: Command, tmp_path: Path) -> None:
    for norm in ("batch", "prop"):
        for seed in range(2):
            write_run(
                tmp_path / "outputs", "np_stability", seed=seed, scale="smoke", data="cifar10",
                settings={"norm.kind": norm}, choices={"norm": norm}, name=f"{norm}-seed{seed}",
            )  # fmt: skip
    outputs = tmp_path / "outputs"
    ended = command("page")
    assert ended.code == 0, ended.err
    assert "claims: " in ended.out
    assert "outputs/reference/smoke/np_stability.jsonl: 4 runs, " in command("keep").out
    shutil.rmtree(outputs / "smoke")
    assert command("page", "--reference").code == 0
    assert contents(outputs / "reference" / "report") == contents(outputs / "report")
    assert not (outputs / "smoke").exists()


def test_hostile_text_is_hostile() -> None:
    assert page.in_markdown(HOSTILE) == "&lt;script>alert('x')&lt;/script> &amp; \\|\\_\\*\\`\\[b\\](c)"


def test_code_in_prose_is_shown_as_code_and_nothing_else_is_markup() -> None:
    text = "run `make <all>` & *see*"
    assert page.prose(text) == "run <code>make &lt;all&gt;</code> &amp; *see*"
    assert page.prose_in_markdown(text) == "run `make <all>` &amp; \\*see\\*"
    assert page.prose_in_markdown("a ` alone") == "a \\` alone"
