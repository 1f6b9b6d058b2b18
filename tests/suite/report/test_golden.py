"""The committed report is what the committed results give."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.commands import REPOSITORY

from backforward_suite.config import fingerprint
from backforward_suite.report import reference
from backforward_suite.report.reading import SCALES

REFERENCE = REPOSITORY / "outputs" / "reference"


def test_the_committed_report_is_the_one_that_the_committed_results_give(tmp_path: Path) -> None:
    """Byte for byte: page, text and figures; and no file more or less."""
    copy = tmp_path / "outputs" / "reference"
    shutil.copytree(REFERENCE, copy)
    shutil.rmtree(copy / "report")
    subprocess.run(
        [sys.executable, str(REPOSITORY / "src" / "report.py"), "page", "--reference"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    written, committed = (
        {path.relative_to(folder): path.read_bytes() for path in (folder / "report").rglob("*") if path.is_file()}
        for folder in (copy, REFERENCE)
    )
    assert written.keys() == committed.keys()
    assert [str(path) for path in committed if written[path] != committed[path]] == []


def test_every_committed_result_matches_its_hash() -> None:
    """Whatever has moved since."""
    count = 0
    for scale in reference.scales_in(REFERENCE):
        assert scale in SCALES
        for path in sorted((REFERENCE / scale).glob("*.jsonl")):
            for line in reference.read(path):
                result = line["result"]
                assert fingerprint(result["settings"]) == result["settings_hash"], f"{path.name}: {line['run']}"
                count += 1
    assert count > 1000


def test_the_readme_says_what_the_committed_report_says() -> None:
    """The tally, and every number with an interval."""
    report = (REFERENCE / "report" / "report.md").read_text().replace("\\", "")
    block = re.search(r"\*\*Verdicts so far\*\*.*?(?=\nEvery claim)", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert block is not None
    text = " ".join(block.group().split())
    counts = dict(re.findall(r"\*\*([a-z -]+)\*\* \((\d+)\)", report))
    told = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n != "0")
    assert f"{sum(map(int, counts.values()))} claims: {told}." in text
    answers = re.search(r"counted separately: (.*?)\.", report)
    assert answers is not None
    asked = sum(int(n) for n in re.findall(r"\d+", answers.group(1)))
    assert f"{asked} questions that no paper answers: {answers.group(1)}." in text
    measured = re.findall(r"[\d.]+ \[[\d., -]+\]", text)
    assert len(measured) > 10
    assert [number for number in measured if number not in report] == []
