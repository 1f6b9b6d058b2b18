"""Run what is missing of the report's experiments, then write the report.

    python src/reproduce.py --scale smoke --only bfp_learning_rates

Finished runs are skipped, interrupted ones continue. Further arguments are overrides for every run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from backforward_suite import cli
from backforward_suite.arguments import Parser
from backforward_suite.errors import BadInput, Stopped
from backforward_suite.hardware import cpu_count, gpu_count
from backforward_suite.report import experiments, page, reference
from backforward_suite.report.reading import SCALES
from backforward_suite.runs import files
from backforward_suite.sweep import estimate

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"
OUTPUTS = Path("outputs")
REFERENCE = ROOT / "outputs" / "reference"
CONSOLE = Console()
STAND_IN = OUTPUTS / "stand_in"  # runs on scikit-learn's digits, and their report

# The data sets that experiments need, by the prefix of their names, longest first.
NEEDS = {
    "bfp_": ("mnist",),
    "np_table": ("cifar10", "cifar100", "mnist"),
    "np_": ("cifar10",),
}
# Further sweeps into the same folder, by the data set that they need.
MORE = {"bfp_norm": {"cifar10": "bfp_norm_nin"}, "np_table": {"svhn": "np_table_svhn"}}
# Digits instead of every data set, enlarged for NIN.
DIGITS = ("data=digits", "data.size=32", "data.train_images=1000", "data.evaluation_images=250")


@dataclass(frozen=True)
class ExperimentSweep:
    """What `experiment=name` runs, and the data sets that it needs."""

    name: str
    experiment: str  # where its runs are examined
    needs: tuple[str, ...]


def main() -> None:
    """Parse the command line and run the experiments."""
    parser = Parser(description="Run the experiments and write the report.")
    parser.add_argument("--scale", choices=SCALES, help="default: paper with a GPU, otherwise small")
    parser.add_argument("--only", default="", metavar="NAMES", help="experiments, separated by commas; default: all")
    parser.add_argument("--stand-in", action="store_true", help="on scikit-learn's digits, marked as stand-in data")
    parser.add_argument("--go-on-from", type=Path, metavar="FOLDER", help="count the results there as done")
    parser.add_argument("overrides", nargs="*", help="for every run, such as trainer.matmul_precision=high")
    given = parser.parse_args()
    scale = given.scale or ("paper" if gpu_count() else "small")
    known = experiments.names()
    names = [name for name in given.only.split(",") if name] or [name for name in known if _sweeps(name, scale)]
    if unknown := [name for name in names if name not in known]:
        raise BadInput(f"{unknown[0]}: no such experiment; there are {', '.join(known)}")
    outputs = STAND_IN if given.stand_in else OUTPUTS
    if given.go_on_from is not None:
        reference.unpack(given.go_on_from, scale, outputs)

    sweeps = [sweep for name in names for sweep in _sweeps(name, scale)]
    if not sweeps:
        raise BadInput(f"{names[0]}: there is no scale {scale} for it")
    lacking = {} if given.stand_in else _lacking({data for sweep in sweeps for data in sweep.needs})
    _announce(sweeps, lacking, scale, outputs)
    extra = [*DIGITS, *given.overrides] if given.stand_in else given.overrides
    failed = []
    for number, sweep in enumerate(sweeps, 1):
        if not lacking.keys() & sweep.needs:
            CONSOLE.print(f"\n[bold]{sweep.name}[/] ({number} of {len(sweeps)})", highlight=False)
            place = (outputs / scale / sweep.experiment).relative_to(OUTPUTS)
            if not _run([f"experiment={sweep.name}", f"scale={scale}", f"name={place}", *extra]):
                failed.append(sweep.name)
    examined = page.examine_all(outputs, scale)
    written = page.write(examined, outputs / "report", scale)
    CONSOLE.print(f"\n{page.tally(examined)}\n{written}, report.md and figures/ beside it", highlight=False)
    if faults := page.faults(examined):
        raise cli.RunsFailed("; ".join(faults))
    if failed:
        raise cli.RunsFailed(f"runs failed in {', '.join(failed)}; the same command runs them again")


def _sweeps(name: str, scale: str) -> list[ExperimentSweep]:
    """The sweeps of an experiment; of scale medium, that of its own config for it, if there is one."""
    if scale == "medium":
        own = f"{name}_medium"
        return [ExperimentSweep(own, name, ("cifar10",))] if (CONF / "experiment" / f"{own}.yaml").exists() else []
    needs = next(data for start, data in NEEDS.items() if name.startswith(start))
    more = [ExperimentSweep(other, name, (data,)) for data, other in MORE.get(name, {}).items()]
    return [ExperimentSweep(name, name, needs), *more]


def _lacking(names: Iterable[str]) -> dict[str, str]:
    """The data sets that are missing and cannot be downloaded, and why."""
    import backforward_suite._torchvision  # noqa: F401  (before torchvision)
    from backforward_suite.data import DataError, default_root, load_data

    why = {}
    for name in sorted(names):
        try:
            load_data(name, default_root())
        except DataError as error:
            why[name] = str(error)
    return why


def _run(arguments: Sequence[str]) -> bool:
    """ExperimentSweep in a process of its own; return whether all of its runs are done.

    Raises:
        KeyboardInterrupt, Stopped: It was told to end; then nothing further is to be started.
    """
    command = [sys.executable, str(ROOT / "src" / "train.py"), "-m", *arguments]
    # However this process ends, the sweep ends with it.
    process = subprocess.Popen(command, env={**os.environ, "BACKFORWARD_PARENT": str(os.getpid())})  # noqa: S603
    try:
        code = process.wait()
    except BaseException:  # Ctrl-C also reaches the sweep, which ends its runs
        process.wait()
        raise
    if code == cli.INTERRUPTED:
        raise KeyboardInterrupt
    if code == cli.STOPPED:
        raise Stopped
    return code == 0


def _announce(sweeps: Sequence[ExperimentSweep], lacking: Mapping[str, str], scale: str, outputs: Path) -> None:
    """Print what will be run and an estimate of the time, from the times of the committed results."""
    slots = gpu_count() or cpu_count()
    table = Table("experiment", "runs done", "of", "minutes left", box=SIMPLE_HEAD)
    estimates: list[float | None] = []
    done = set(files.done_below(outputs / scale))  # experiments share runs of equal settings; each is counted once
    for name in dict.fromkeys(sweep.experiment for sweep in sweeps):
        parts = [sweep for sweep in sweeps if sweep.experiment == name]
        missing = sorted({data for sweep in parts for data in sweep.needs if data in lacking})
        there = files.done_below(outputs / scale / name)
        kept = reference.seconds(REFERENCE, scale, name)
        planned = [estimate.planned(CONF, part.name, scale) for part in parts]
        runs = sum(map(len, planned))
        most = None if kept else _at_most(name, planned[0], scale)
        left = _left(kept, done, runs - len(kept.keys() | there.keys())) / 60 / slots if kept else None
        done |= kept.keys()
        if all(set(sweep.needs) & lacking.keys() for sweep in parts):
            shown = f"not run: no {', '.join(missing)}"
        else:
            estimates.append(most / 60 / slots if most is not None else left)
            shown = "not known" if left is None else f"{left:.0f}"
            shown = f"{most / 60 / slots:.0f} at most" if most is not None else shown
            shown += f", no {', '.join(missing)}" if missing else ""
        table.add_row(name, str(len(there)), str(runs), shown)
    CONSOLE.print(table)
    minutes = sum(left for left in estimates if left is not None)
    time = f"{minutes:.0f} minutes" if minutes < 300 else f"{minutes / 60:.0f} hours"
    known = f"{time}, {slots} at a time, by the times of the committed results"
    if None in estimates:
        unknown = f"not known: {estimates.count(None)} of the experiments have no committed results at this scale"
        known = f"{known}; for the rest {unknown}" if minutes else unknown
    CONSOLE.print(f"Estimated time: {known}.")
    for name, why in lacking.items():
        CONSOLE.print(f"No {name}: {why}; --stand-in trains on digits instead.", highlight=False, soft_wrap=True)


def _left(kept: Mapping[str, float], done: Container[str], untimed: int) -> float:
    """Seconds that the remaining runs take; each of the `untimed`, not yet committed, counts as the mean."""
    known = sum(seconds for key, seconds in kept.items() if key not in done)
    return known + mean(kept.values()) * max(0, untimed)


def _at_most(experiment: str, planned: Sequence[estimate.Planned], scale: str) -> float | None:
    """Seconds of an MLP's experiment at paper scale, by the committed results of the same network at scale small.

    None where none are known, or the network is another at that scale.
    """
    if scale != "paper" or not experiment.startswith("bfp_") or gpu_count():
        return None
    paces = estimate.seconds_an_epoch(line["result"] for line in reference.kept(REFERENCE, "small", experiment))
    return estimate.at_most(planned, paces)


def command() -> int:
    """The command line; returns its exit code."""
    return cli.run(main, CONF)
