"""The command line: options, `~` in paths, and one line for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.commands import CONF, REPOSITORY, Command, assert_one_line, environment

from backforward_suite import arguments
from backforward_suite.errors import BadInput

QUICK = ("data=digits", "max_epochs=1", "model.hidden=8", "batch_size=64", "trainer.accelerator=cpu")

LINES = [
    (["lr=0.1", "-m", "method=bfp,sgd"], ["options go before all settings; give -m lr=0.1 method=bfp,sgd"]),
    (["lr=0.1", "--cfg", "job", "seed=1"], ["seed=1: options go before", "give --cfg job lr=0.1 seed=1"]),
    (["--lr=0.2"], ["--lr=0.2: settings have no dashes; give lr=0.2"]),
    (["--model.hidden=8"], ["settings have no dashes; give model.hidden=8"]),
    (["-lr=0.1"], ["settings have no dashes; give lr=0.1"]),
    (["--multrun"], ["--multrun: no such option; did you mean --multirun?"]),
    (["--cfg"], ["--cfg", "expected one argument"]),
    (["--config-name", "foo"], ["--config-name foo: no such config", "has train"]),
    (["--config-dir", "foo"], ["foo' not found"]),
    (["~max_grad_norm"], ["max_grad_norm is null already"]),
    (["~data.size"], ["data.size is null already"]),
    (["~foo"], ["~foo: no such key; there are name, lr"]),
    (["+experiment=quickstart"], ["give experiment=quickstart, without +"]),
    (["+method=bfp"], ["give method=bfp, without +"]),
    (["+lr=0.2"], ["give lr=0.2, without +"]),
    (["optimizer=adam", "optimizer.betas=[.8,.99]"], ["argument of torch.optim.Adam; add it with +optimizer.betas="]),
    (["optimizer.dampening=0.1"], ["argument of torch.optim.SGD; add it with +optimizer.dampening="]),
    (["schedule=halve", "schedule.last_epoch=3"], ["add it with +schedule.last_epoch="]),
    (["trainer.accumulate_grad_batches=4"], ["no such key: batch_size is the whole batch", "micro_batches=4"]),
    (["accumulate_grad_batches=4"], ["no such key: batch_size is the whole batch", "micro_batches=4"]),
    (["trainer=cpu", "trainer.deices=2"], ["did you mean devices?"]),
    (["lr=0.1,0.2"], ["several values are a sweep, which needs -m: python src/train.py -m lr=0.1,0.2"]),
    (["lr:0.2"], ["lr:0.2: give settings as key=value"]),
    (["=3"], ["=3: give a setting as key=value"]),
    (["model={hidden:3}"], ["model is a group; give its choice as model=..., its keys as model.key=..."]),
    (["model=null"], ["model is a group; there are mlp, nin, residual"]),
    (["-m", "hydra.sweeper.params={lr:'0.1,0.2'}"], ["hydra.sweeper.params.lr", "give -m lr=VALUE,VALUE"]),
    (["-m", "hydra.sweeper={params:{lr:1}}"], ["hydra.sweeper.params.lr", "give -m lr=VALUE,VALUE"]),
    (["--help", "foo"], ["--help foo: no such group; there are method, model"]),
    (["--help", "method=foo"], ["no such method; there are bfp,"]),
]


@pytest.mark.parametrize(("given", "parts"), LINES, ids=[" ".join(given) for given, _ in LINES])
def test_a_line_says_what_would_be_right(train: Command, tmp_path: Path, given: list[str], parts: list[str]) -> None:
    assert_one_line(train(*given), *parts)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "multirun.yaml"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (["model.hidden=[64,32]"], "model.hidden=[64, 32]: backforward.models.MLP takes int for hidden"),
        (["model.depth=1.5"], "model.depth=1.5: backforward.models.MLP takes int for depth"),
        (["model.dropout=x"], "model.dropout=x: backforward.models.MLP takes float for dropout"),
        (["optimizer=sgd_momentum", "optimizer.momentum=x"], "momentum=x: torch.optim.SGD takes float"),
        (["schedule=halve", "schedule.gamma=x"], "gamma=x: torch.optim.lr_scheduler.StepLR takes float"),
        (["method.repeats=two"], "method.repeats=two: backforward.rules.Backprop takes int"),
    ],
    ids=str,
)
def test_an_argument_of_the_wrong_type_is_named(train: Command, override: list[str], line: str) -> None:
    assert_one_line(train(*QUICK[:2], *override), line)


def test_a_tilde_is_the_home_folder(train: Command, tmp_path: Path) -> None:
    """In a setting, in one of several, in quotes, and in the variable."""
    home = tmp_path / "a home"
    here = {"HOME": str(home)}
    own = ("data=npz", "data.name=mine")
    assert_one_line(train(*own, "data.root=~/x", **here), f"no {home}/x/mine.npz")
    assert_one_line(train(*own, "data.root='~/x'", **here), f"no {home}/x/mine.npz")
    assert_one_line(train(*own, **here, BACKFORWARD_DATA="~/y"), f"no {home}/y/mine.npz")
    assert arguments.checked(["lr=1", "a=~/b,~/c", "~max_grad_norm"], CONF)[2] == "~max_grad_norm"


def test_only_a_leading_tilde_is_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert arguments.checked(["a=~/b,~/c", "b=x~y"], CONF) == ["a=/home/me/b,/home/me/c", "b=x~y"]


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["one run", "a sweep"])
def test_a_link_to_nowhere_is_named(train: Command, tmp_path: Path, sweep: list[str]) -> None:
    (tmp_path / "outputs").symlink_to(tmp_path / "gone")
    assert_one_line(train(*sweep, *QUICK), f"outputs is a link to {tmp_path / 'gone'}, which does not exist")


@pytest.fixture(scope="module")
def manual() -> str:
    return arguments.manual(["--help"], CONF)


def test_help_is_the_commented_manual(train: Command, manual: str) -> None:
    ended = train("--help")
    assert ended.code == 0
    assert ended.out.strip() == manual.strip()
    assert "    lr: 0.1                  # learning rate" in manual.splitlines()
    for group in arguments.groups(CONF):
        assert f"    {group}: " in manual
        page = arguments.manual(["--help", group], CONF)
        for choice in arguments.choices(CONF, group):
            (line,) = (line for line in page.splitlines() if line.split()[:1] == [choice])
            assert len(line.split()) > 3, f"conf/{group}/{choice}.yaml begins with no comment"
    assert "hydra:" not in manual


def test_help_shows_the_keys_of_a_choice(train: Command) -> None:
    ended = train("--help", "method=bfp")
    assert ended.code == 0
    assert "groups: layer         # layer, a number k of groups" in ended.out


@pytest.mark.parametrize(
    ("script", "given", "line"),
    [
        ("report.py", ["tabel"], "invalid choice: 'tabel'"),
        ("report.py", ["table"], "required: folder"),
        ("reproduce.py", ["--scal", "x"], "--scal"),
        ("bench.py", ["spede"], "no such benchmark: spede"),
    ],
)
def test_the_other_commands_too_say_it_in_a_line(script: str, given: list[str], line: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(REPOSITORY / "src" / script), *given],
        check=False, cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_output_in_ascii(spawned: Command, tmp_path: Path) -> None:
    assert spawned(*QUICK, "seed=0", PYTHONIOENCODING="ascii").code == 0
    assert spawned(*QUICK, "seed=1", PYTHONIOENCODING="ascii").code == 0
    ended = subprocess.run(
        [sys.executable, str(REPOSITORY / "src" / "report.py"), "table", "outputs/train"],
        check=False, cwd=tmp_path, env=environment(PYTHONIOENCODING="ascii"), capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "+-" in ended.stdout
    assert "?" not in ended.stdout


def test_a_value_instead_of_a_choice_is_refused_before_composing() -> None:
    with pytest.raises(BadInput, match="data is a group"):
        arguments.checked(["data={name: mnist}"], CONF)
