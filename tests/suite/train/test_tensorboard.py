"""TensorBoard on the quick start's output: what it serves, and what a browser shows of it.

The browser is Chromium with its driver (on Debian: `apt-get install chromium chromium-driver`) and selenium; if
one of them is missing, that test is skipped. `BACKFORWARD_SCREENSHOT=docs/tensorboard.png` saves a screenshot.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
from tests.helpers.browser import chromium_in
from tests.helpers.commands import TRAIN, environment

from backforward_suite.commands.train import command
from backforward_suite.runs import lifecycle
from backforward_suite.train.hparams import FIRST, METRICS

EPOCHS = 3
RUNS = [f"quickstart/{method}-lr0.1-max_epochs{EPOCHS}" for method in ("bfp", "sgd")]
# The text of the page, also in the shadow trees of TensorBoard's components.
PAGE_TEXT = """
function text(node) {
  if (node.nodeType === 3) return node.textContent;
  if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.tagName)) return '';
  return [node.shadowRoot, ...node.childNodes].filter(n => n).map(text).join(' ');
}
return text(document.body).replace(/\\s+/g, ' ');
"""


def run(folder: Path, *asked: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(TRAIN), *asked])
        patch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets both; restore them
        patch.setenv("BACKFORWARD_TRACEBACKS", "0")
        assert command() == 0


@contextmanager
def served(folder: Path, runs: list[str]) -> Iterator[str]:
    """The address of a TensorBoard that serves these runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "tensorboard.log").open("w")
    serve = [sys.executable, "-m", "tensorboard.main", "--logdir", "outputs", "--host", "127.0.0.1", f"--port={port}"]
    with log, subprocess.Popen(serve, cwd=folder, stdout=log, stderr=log, env=environment()) as server:
        address = f"http://127.0.0.1:{port}"
        try:
            until(lambda: sorted(ask(address, "runs")) == sorted(runs))
            yield address
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard that serves two runs as the quick start makes them."""
    tmp_path = tmp_path_factory.mktemp("quickstart")
    for method in ("bfp", "sgd"):
        run(tmp_path, "experiment=quickstart", f"method={method}", "lr=0.1", f"max_epochs={EPOCHS}")
    with served(tmp_path, RUNS) as address:
        yield address


MIXED = {
    "sgd-digits-lr1e+30": ["method=sgd", "lr=1e30"],  # found first; it diverges: no loss, no norm
    "bfp-digits-lr0.1": ["method=bfp", "lr=0.1"],
    "bfp-groups1-digits-lr0.1": ["method=bfp", "method.groups=1", "lr=0.1"],
    "sgd-digits-lr0.1-max_grad_norm2": ["method=sgd", "lr=0.1", "max_grad_norm=2"],
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same of runs that differ in keys: some have none of a group, or a number where others have a word."""
    tmp_path = tmp_path_factory.mktemp("mixed")
    common = ["data=digits", "max_epochs=1", "model.hidden=8", "trainer.accelerator=cpu", "name=mixed"]
    lifecycle.add_to_plan(tmp_path / "outputs" / "mixed", {name: [*given, *common] for name, given in MIXED.items()})
    for name, given in MIXED.items():
        run(tmp_path, *given, *common, f"hydra.run.dir=outputs/mixed/{name}")
    with served(tmp_path, [f"mixed/{name}" for name in MIXED]) as address:
        yield address


def test_hparams_has_the_columns_of_all_runs_those_that_vary_first(mixed: str) -> None:
    found = ask(mixed, "plugin/hparams/experiment", post={"experimentName": ""})
    names = [column["name"] for column in found["hparamInfos"]]
    shown = [column["displayName"] for column in found["hparamInfos"]]
    assert shown[:5] == ["method", "lr", "seed", "max_grad_norm", "method.groups"]
    assert [column["name"]["tag"] for column in found["metricInfos"]] == list(METRICS)
    assert len(names) == len(set(names))
    columns = [{"metric": {"tag": tag}} for tag in METRICS]
    asked = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "colParams": columns, "startIndex": 0,
             "sliceSize": 99}  # fmt: skip
    rows = ask(mixed, "plugin/hparams/session_groups", post=asked)["sessionGroups"]
    assert len(rows) == len(MIXED)
    by_run = {row["sessions"][0]["name"].partition("/")[2]: row for row in rows}
    groups = {name: row["hparams"].get("method.groups") for name, row in by_run.items()}
    assert groups == {
        "sgd-digits-lr1e+30": None,
        "bfp-digits-lr0.1": "layer",
        "bfp-groups1-digits-lr0.1": "1",
        "sgd-digits-lr0.1-max_grad_norm2": None,
    }
    for name, row in by_run.items():
        measured = {value["name"]["tag"] for value in row["metricValues"]}
        assert measured == set(METRICS) - ({"loss/test", "accuracy/test"} if "1e+30" in name else set()), name
        assert {key for key in row["hparams"] if key not in names} == set()
        assert row["hparams"][FIRST["lr"]] == (1e30 if "1e+30" in name else 0.1)


def ask(address: str, route: str, post: dict[str, Any] | None = None, **arguments: str) -> Any:
    query = f"?{urlencode(arguments)}" if arguments else ""
    data = None if post is None else json.dumps(post).encode()
    with urlopen(Request(f"{address}/data/{route}{query}", data, {"Content-Type": "application/json"})) as answer:
        return json.load(answer)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except URLError:  # it does not listen yet
            pass
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def test_what_it_serves(tensorboard: str) -> None:
    tags = ask(tensorboard, "plugin/scalars/tags")
    assert sorted(tags) == RUNS
    for run in RUNS:
        assert {"loss/train", "accuracy/validation", "shift/induced/model.head", "input/unit_mean/model.head"} <= set(
            tags[run]
        )
        # Whole curves: final metrics among the hyper-parameters must not supersede them.
        for tag in ("loss/validation", "accuracy/validation", "weight_norm/total"):
            points = ask(tensorboard, "plugin/scalars/scalars", run=run, tag=tag)
            assert sorted({step for _, step, _ in points}) == [40 * epoch for epoch in range(EPOCHS + 1)]
    layout = ask(tensorboard, "plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == ["Covariate shift", "Layer inputs", "Weights"]
    experiment = ask(tensorboard, "plugin/hparams/experiment", post={"experimentName": ""})
    assert {"method", "lr", "diagnostics"} <= {column["displayName"] for column in experiment["hparamInfos"]}
    assert {"accuracy/test", "loss/validation"} <= {column["name"]["tag"] for column in experiment["metricInfos"]}


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A real browser without a window."""
    with chromium_in(tmp_path / "profile") as browser:
        yield browser


def test_hparams_in_a_browser(browser: Any, mixed: str, tmp_path: Path) -> None:
    browser.get(f"{mixed}/#hparams")
    until(lambda: all(text in browser.execute_script(PAGE_TEXT) for text in ("layer", "1.0000e+30")))
    text = browser.execute_script(PAGE_TEXT)
    header = text[text.index("Trial ID") :]
    order = ["method", "lr", "seed", "max_grad_norm", "method.groups", *METRICS[:4]]
    places = [header.index(f" {name} ") for name in order]
    assert places == sorted(places), header[:500]
    picture = Path(os.environ.get("BACKFORWARD_SCREENSHOT_HPARAMS", tmp_path / "hparams.png"))
    assert browser.save_screenshot(str(picture.resolve()))


def test_what_a_browser_shows(browser: Any, tensorboard: str, tmp_path: Path) -> None:
    def shows(page: str, *texts: str) -> None:
        browser.get("about:blank")  # else only the fragment of the address changes
        browser.get(f"{tensorboard}/#{page}&_smoothingWeight=0")
        until(lambda: all(text in browser.execute_script(PAGE_TEXT) for text in texts))

    shows("scalars", *RUNS, "accuracy/validation", "loss", "shift", "weight_norm")
    shows("hparams", "Hyperparameters", "method", "batch_size", "accuracy/test", "loss/validation")
    shows(
        "custom_scalars", *RUNS, "Covariate shift", "induced shift, share of the gradient", "mean input of one unit",
        f"shift/applied_relative/model.head ({RUNS[0]})",
    )  # fmt: skip
    time.sleep(1)  # lines fade in
    picture = Path(os.environ.get("BACKFORWARD_SCREENSHOT", tmp_path / "tensorboard.png"))
    assert browser.save_screenshot(str(picture.resolve()))
    assert picture.stat().st_size > 20_000
