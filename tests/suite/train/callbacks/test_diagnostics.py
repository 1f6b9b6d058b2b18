"""Diagnostics in whole runs: they change nothing, are due when they say, and their numbers stand where they belong."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf, open_dict
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tests.helpers.commands import CONF
from tests.helpers.configs import composed
from tests.helpers.ranks import two_ranks
from tests.helpers.training import METHODS, CutOff, cut_off_at, same, weights
from tests.oracles import shift as oracle

from backforward import probes
from backforward.data_norm import DataNorm
from backforward.models import MLP
from backforward_suite.config import Request, fingerprint, plain
from backforward_suite.data import EpochLoader, load_data
from backforward_suite.data.draws import first
from backforward_suite.errors import BadInput
from backforward_suite.run import train
from backforward_suite.runs import files
from backforward_suite.train import fit as fitting
from backforward_suite.train.callbacks.diagnostics import due, layout
from backforward_suite.train.callbacks.measures import DIAGNOSTICS
from backforward_suite.train.callbacks.record import RunRecord
from backforward_suite.train.module import Classification

SMALL = ("data=digits", "model.hidden=8", "batch_size=32", "trainer.accelerator=cpu")
FEW = ("data.train_images=192", "max_epochs=1")  # 6 batches
BUNDLES = ("cheap", "full")
NORMS = ("none", "batch", "prop")


def trained(folder: Path, *overrides: str) -> list[files.Measured]:
    train(composed(*SMALL, *overrides), folder)
    return files.read_diagnostics(folder)


def values(rows: list[files.Measured], measure: str, **where: Any) -> list[float]:
    return [r.value for r in rows if r.measure == measure and all(getattr(r, k) == v for k, v in where.items())]


# --- nothing changes -------------------------------------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Classification]]:
    """The modules that `train` has fitted; runs without a folder, which is quick, keep no weights elsewhere."""
    fitted: list[Classification] = []
    fit = fitting.fit

    def remembering(request: Request, module: Classification, *rest: Any) -> Any:
        fitted.append(module)
        return fit(request, module, *rest)

    monkeypatch.setattr(fitting, "fit", remembering)
    yield fitted


def with_bundle(cfg: DictConfig, bundle: str) -> DictConfig:
    """The config with another choice of diagnostics; composing it again would take most of this test's time."""
    given = OmegaConf.to_container(OmegaConf.load(CONF / "diagnostics" / f"{bundle}.yaml"))
    assert isinstance(given, dict)
    del given["defaults"]
    changed = cfg.copy()
    with open_dict(changed):
        changed.diagnostics.update(given)
    return changed


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_measuring_changes_nothing(method: str, norm: str, modules: list[Classification]) -> None:
    cfg = composed(
        *SMALL, *FEW, f"method={method}", f"norm={norm}", "model.dropout=0.2", "model.depth=2", "data_norm=batch",
        "optimizer=sgd_momentum",
    )  # fmt: skip
    found = []
    for one in (cfg, *(with_bundle(cfg, bundle) for bundle in BUNDLES)):
        result = train(one, None)
        (module,) = modules
        assert all(p.grad is None for p in module.network.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.network.modules())
        found.append((result["final"], module.state_dict(), torch.get_rng_state()))
        modules.clear()
    (final, state, draws), *others = found
    for their_final, their_state, their_draws in others:
        assert their_final == final
        assert same(their_state, state)
        assert torch.equal(their_draws, draws)


def test_a_run_with_diagnostics_keeps_the_same_record_and_checkpoint(tmp_path: Path) -> None:
    asked = ("method=bfp", "norm=batch", "model.dropout=0.2", "optimizer=adam", *FEW)
    for bundle in ("off", *BUNDLES):
        trained(tmp_path / bundle, *asked, f"diagnostics={bundle}")
    off = torch.load(tmp_path / "off" / "last.ckpt", weights_only=True)
    assert not (tmp_path / "off" / "diagnostics.csv").exists()
    for bundle in BUNDLES:
        assert (tmp_path / bundle / "metrics.csv").read_bytes() == (tmp_path / "off" / "metrics.csv").read_bytes()
        ours = torch.load(tmp_path / bundle / "last.ckpt", weights_only=True)
        assert same(ours["state_dict"], off["state_dict"])
        assert torch.equal(ours["ranks"][0]["rng"]["cpu"], off["ranks"][0]["rng"]["cpu"])
        moments = [
            torch.cat([state["exp_avg"].flatten() for state in checkpoint["optimizer_states"][0]["state"].values()])
            for checkpoint in (ours, off)
        ]
        assert torch.equal(*moments)


def test_a_run_cut_off_anywhere_measures_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = "method=bfp model.dropout=0.2 data.train_images=192 max_epochs=2 trainer.checkpoint_minutes=1e-9"
    asked = [*SMALL, *overrides.split(), "diagnostics=full", "diagnostics.pictures=[]", "diagnostics.shift=[2]"]
    train(composed(*asked), tmp_path / "whole")
    for step in (1, 4, 6, 7, 11):  # 6 batches an epoch
        with monkeypatch.context() as patch, pytest.raises(CutOff):
            patch.setattr(RunRecord, "before_batch", cut_off_at(step))
            train(composed(*asked), tmp_path / "cut")
    train(composed(*asked), tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert (tmp_path / "cut" / "diagnostics.csv").read_bytes() == (tmp_path / "whole" / "diagnostics.csv").read_bytes()
    rows = files.read_diagnostics(tmp_path / "cut")
    assert [r.step for r in rows if (r.measure, r.layer) == ("shift/induced", "model.head")] == [2, 4, 6, 8, 10, 12]
    assert len(values(rows, "input/drift", layer="model.head")) == 2  # it remembered the moments of the epoch before


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ([], []),
        (["epoch"], [0, 10, 20]),
        (["log"], [1, 4, 16]),
        ([7], [7, 14]),
        ([7, "epoch", "log"], [0, 1, 4, 7, 10, 14, 16, 20]),
    ],
)
def test_due(when: list[Any], steps: list[int]) -> None:
    assert [step for step in range(21) if due(when, step, 10)] == steps


def test_numbers_of_a_run(tmp_path: Path) -> None:
    """Two steps of plain SGD by hand, against the file."""
    rows = trained(
        tmp_path, "method=sgd", "lr=0.1", "batch_size=96", "data.train_images=192", "max_epochs=1", "diagnostics=full",
        "diagnostics.shift=[1]", "diagnostics.update=[1]", "diagnostics.pictures=[]", "diagnostics.samples=100",
    )  # fmt: skip
    data = load_data("digits", Path("nowhere"), train_images=192)
    network = torch.nn.Sequential()
    network.add_module("data_norm", DataNorm.fit("channel", data.train.x))
    network.add_module("model", MLP(data.shape, data.classes, hidden=8, seed=0))
    layers = {"model.hidden1.linear": network.model.hidden1.linear, "model.head": network.model.head}
    for step, (x, y) in enumerate(EpochLoader(data.train, 96, seed=0), start=1):
        before = {name: torch.cat([p.detach().flatten() for p in layer.parameters()]) for name, layer in layers.items()}
        network.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        gradients = {name: torch.cat([p.grad.flatten() for p in layer.parameters()]) for name, layer in layers.items()}
        for p in network.parameters():
            p.data -= 0.1 * p.grad
        for name, layer in layers.items():
            after = torch.cat([p.detach().flatten() for p in layer.parameters()])
            where = {"step": step, "layer": name}
            assert values(rows, "update/weight_norm", **where) == pytest.approx([before[name].norm().item()])
            assert values(rows, "update/norm", **where) == pytest.approx(
                [(after - before[name]).norm().item()], rel=1e-4
            )
            assert values(rows, "update/gradient_norm", **where) == pytest.approx([gradients[name].norm().item()])
            ratio = ((after - before[name]).norm() / before[name].norm()).item()
            assert values(rows, "update/relative", **where) == pytest.approx([ratio], rel=1e-4)
        total = torch.cat(list(gradients.values())).norm().item()
        assert values(rows, "update/gradient_norm", step=step, layer="total") == pytest.approx([total])
        change = (F.cross_entropy(network(x), y) - loss).item()
        assert values(rows, "update/loss_change", step=step) == pytest.approx([change], abs=1e-6)
    induced, applied = (values(rows, f"shift/{kind}", layer="model.head") for kind in ("induced", "applied"))
    assert induced == applied
    assert min(induced) > 0

    chosen = torch.from_numpy(first(data.validation.y.numpy(), 100))  # ten of each class
    x = data.validation.x[chosen].float() / 255
    mean, std = oracle.input_moments(network.eval(), "model.head", x)
    assert values(rows, "input/mean", step=2, layer="model.head") == pytest.approx([sum(mean) / 8], rel=1e-5)
    assert values(rows, "input/std", step=2, layer="model.head") == pytest.approx([sum(std) / 8], rel=1e-5)
    unit = values(rows, "input/unit_mean", layer="model.head")
    assert len(unit) == 2
    assert any(unit[1] == pytest.approx(one, rel=1e-5) for one in mean)
    with torch.no_grad():
        logits = network(x).double().numpy()
    for kind, of_units in {
        "skewness": stats.skew(logits),
        "kurtosis": stats.kurtosis(logits),
        "distance": [stats.kstest(unit, "norm", (unit.mean(), unit.std())).statistic for unit in logits.T],
    }.items():
        expected = np.quantile(of_units, [0.05, 0.5, 0.95])
        for quantile, value in zip(("p05", "median", "p95"), expected, strict=True):
            found = values(rows, f"gaussianity/{kind}_{quantile}", step=2, layer="model.head")
            assert found == pytest.approx([value], abs=1e-5)
    with torch.no_grad():
        mu, distance, _, mended = oracle.incoherence(network.model.head.weight.tolist())
    assert values(rows, "proposition1/coherence", step=2, layer="model.head") == pytest.approx([mu], rel=1e-5)
    assert values(rows, "proposition1/distance", step=2, layer="model.head") == pytest.approx([distance], rel=1e-5)
    assert values(rows, "proposition1/mended_bound", step=2, layer="model.head") == pytest.approx([mended], rel=1e-5)
    cosines = probes.cosines_of_pairs(network.model.head.weight)
    assert values(rows, "proposition1/pairs", step=2, layer="model.head") == [len(cosines)]
    incoherent = [int((cosines < 0.3).sum())]
    assert values(rows, "proposition1/incoherent_pairs", step=2, layer="model.head") == incoherent
    squared = network.model.head.weight.detach().square().sum(dim=1)
    assert values(rows, "jacobian/mean_squared", step=2, layer="model.head") == pytest.approx([squared.mean().item()])
    assert values(rows, "jacobian/diagonal_max", step=2, layer="model.head") == pytest.approx([squared.max().item()])
    spread = values(rows, "jacobian/diagonal_std", step=2, layer="model.head")
    assert spread == pytest.approx([squared.std(correction=0).item()])
    singular = torch.linalg.svdvals(network.model.head.weight.detach())  # 8 of them
    for kind, value in {"largest": singular[0], "median": singular[4], "smallest": singular[-1]}.items():
        assert values(rows, f"jacobian/{kind}", step=2, layer="model.head") == pytest.approx([value.item()], rel=1e-5)
    assert len(values(rows, "sharpness")) == 2


def test_each_update_of_a_batch_is_measured(tmp_path: Path) -> None:
    rows = trained(tmp_path, "method=bfp_poster", *FEW, "diagnostics=cheap")
    head = {update: values(rows, "shift/applied", layer="model.head", update=update) for update in (1, 2, 3)}
    assert head[1] == [0, 0, 0]  # batches 1, 4 and 6: one layer after the other
    assert min(head[2]) > 0  # the joint pass is ordinary backpropagation
    assert head[3] == []
    assert min(values(rows, "shift/induced", layer="model.head")) > 0


STALE = ("method._target_=tests.oracles.shift.StaleBackforward", "~method.repeats")


@pytest.mark.parametrize("optimizer", ["sgd", "sgd_momentum"])
def test_on_real_mnist(optimizer: str, mnist_root: Path, tmp_path: Path) -> None:
    asked = ("data=mnist", f"data.root={mnist_root}", "data.train_images=1280", "batch_size=128", "max_epochs=1")
    asked += (f"optimizer={optimizer}", "weight_decay=1e-3")
    found = {}
    for rule, choice in {"sgd": ["method=sgd"], "bfp": ["method=bfp"], "stale": ["method=sgd", *STALE]}.items():
        cfg = composed(*asked, *choice, "model.hidden=32", "trainer.accelerator=cpu", "diagnostics=cheap")
        train(cfg, tmp_path / rule)
        found[rule] = rows = files.read_diagnostics(tmp_path / rule)
        assert values(rows, "shift/induced", layer="model.hidden1.linear") == [0, 0, 0]  # batches 1, 4, 10
        assert values(rows, "shift/applied", layer="model.hidden1.linear") == [0, 0, 0]
        assert min(values(rows, "shift/induced_relative", layer="model.head")) > 1e-2
    assert min(values(found["sgd"], "shift/applied_relative", layer="model.head")) > 1e-2
    assert max(values(found["bfp"], "shift/applied_relative", layer="model.head")) < 1e-5
    assert min(values(found["stale"], "shift/applied_relative", layer="model.head")) > 1e-2


def test_nan_weights_are_measured_without_an_error(tmp_path: Path) -> None:
    rows = trained(tmp_path, "lr=1e30", *FEW, "diagnostics=full")
    assert math.isnan(values(rows, "input/mean", step=6, layer="model.head")[0])


@pytest.mark.parametrize("norm", NORMS)
def test_under_bf16_autocast(norm: str, tmp_path: Path) -> None:
    asked = (
        "method=bfp",
        f"norm={norm}",
        "model.dropout=0.2",
        "optimizer=sgd_momentum",
        "trainer.precision=bf16-mixed",
    )
    found = {bundle: trained(tmp_path / bundle, *asked, *FEW, f"diagnostics={bundle}") for bundle in ("off", *BUNDLES)}
    for bundle in BUNDLES:
        assert same(weights(tmp_path / bundle), weights(tmp_path / "off"))
        assert all(math.isfinite(row.value) for row in found[bundle] if row.measure != "proposition1/printed_bound")
        # The copy's gradients are those that the rule stepped along: computed under the same autocast.
        assert max(values(found[bundle], "shift/applied_relative", layer="model.head")) < 1e-5
        assert min(values(found[bundle], "shift/induced_relative", layer="model.head")) > 1e-3


def test_clipping_makes_the_applied_shift_of_bfp_one_of_length(tmp_path: Path) -> None:
    rows = trained(tmp_path, "method=bfp", "max_grad_norm=0.01", *FEW, "diagnostics=cheap")
    gradients = values(rows, "update/gradient_norm", layer="model.head")
    assert gradients == pytest.approx([0.01] * 3, rel=1e-3)  # it clips each group
    assert min(values(rows, "shift/applied_relative", layer="model.head")) > 0.5
    assert values(rows, "shift/applied_cosine", layer="model.head") == pytest.approx([1] * 3)


def test_on_two_processes(tmp_path: Path) -> None:
    """The gradient faced is the mean of those on each process's share, as the one stepped along."""
    asked = ("method=bfp", "norm=batch", "model.dropout=0.2", *FEW)
    with_and_without = [two_ranks(tmp_path / b, *asked, f"diagnostics={b}") for b in ("cheap", "off")]
    assert all(same(*pair) for pair in zip(*with_and_without, strict=True))
    rows = files.read_diagnostics(tmp_path / "cheap")
    assert max(values(rows, "shift/applied_relative", layer="model.head")) < 1e-5
    assert min(values(rows, "shift/induced_relative", layer="model.head")) > 1e-3


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_scalars_layout_histograms_and_figures(tmp_path: Path) -> None:
    rows = trained(tmp_path, "method=bfp", *FEW, "diagnostics=full")
    events = EventAccumulator(str(tmp_path), {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    events.Reload()
    scalars = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    for row in rows:
        tag = f"{row.measure}/{row.layer}".rstrip("/")
        assert scalars[tag, row.step] == pytest.approx(row.value, rel=1e-6, nan_ok=True), tag
    assert {"input/model.head", "weight/model.head"} <= set(events.Tags()["histograms"])
    assert {"figure/inputs", "figure/jacobian"} <= set(events.Tags()["images"])
    (config,) = events.Tensors("custom_scalars__config__")
    shown = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    assert {category.title for category in shown.category} == {"Covariate shift", "Layer inputs", "Weights"}


def test_every_chart_of_the_layout_shows_something(tmp_path: Path) -> None:
    rows = trained(tmp_path, *FEW, "diagnostics=full", "diagnostics.pictures=[]")
    tags = {f"{row.measure}/{row.layer}".rstrip("/") for row in rows}
    charts = [chart for kind in DIAGNOSTICS.values() for chart in kind.charts.items()]
    for category in layout(dict(charts)).values():
        for title, (_, (pattern,)) in category.items():
            assert any(re.search(pattern, tag) for tag in tags) or title.startswith("drift"), title


DOCS = CONF.parent / "docs" / "diagnostics.md"


def test_the_docs_name_every_measure_and_no_other(tmp_path: Path) -> None:
    rows = trained(tmp_path, *FEW, "diagnostics=full")
    cells = [line.split("|")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    events = EventAccumulator(str(tmp_path), {"histograms": 0, "images": 0})
    events.Reload()
    layers = "|".join({re.escape(row.layer) for row in rows if row.layer.startswith("model.")})
    shown = {re.sub(f"/({layers})$", "/LAYER", tag) for kind in ("histograms", "images") for tag in events.Tags()[kind]}
    assert sorted(named) == sorted({row.measure for row in rows} | shown)


def test_the_docs_name_every_diagnostic() -> None:
    assert set(re.findall(r"\(`(\w+)`\)", DOCS.read_text())) == set(DIAGNOSTICS)


# --- settings --------------------------------------------------------------------------------------------------------


def test_diagnostics_make_a_run_of_their_own() -> None:
    assert fingerprint(plain(composed())) != fingerprint(plain(composed("diagnostics=cheap")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("diagnostics.shift=5", "diagnostics.shift=5: input should be a valid list"),
        ("diagnostics.shift=[0]", "diagnostics.shift.0"),
        ("diagnostics.shift=[daily]", "diagnostics.shift.0"),
        ("diagnostics.samples=0", "diagnostics.samples=0: input should be greater than or equal to 1"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        Request.of(composed(override))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_shortcut_engine_has_no_gradients_to_look_at() -> None:
    Request.of(composed("method=bfp", "method.engine=shortcut"))
    with pytest.raises(BadInput, match=r"engine=shortcut computes none; give method.engine=replay, or diagnostics=off"):
        Request.of(composed("method=bfp", "method.engine=shortcut", "diagnostics=cheap"))


def test_the_callback_stops_listening(modules: list[Classification]) -> None:
    train(composed(*SMALL, *FEW, "norm=prop", "diagnostics=cheap"), None)
    (module,) = modules
    assert module.after_update is not None
    assert "diagnostics" not in getattr(module.after_update, "__module__", "")
    assert isinstance(module, L.LightningModule)
