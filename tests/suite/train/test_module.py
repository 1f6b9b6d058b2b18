"""Training under Lightning against bare loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.training import (
    METHODS,
    as_trained,
    network_and_loader,
    only_network,
    same,
    trained,
    weights,
)

from backforward_suite.data import load_data
from backforward_suite.runs import files
from backforward_suite.train.callbacks.checkpoint import read_checkpoint


def test_sgd_is_a_bare_loop(tmp_path: Path) -> None:
    trained(tmp_path, "method=sgd", "max_epochs=2", "lr=0.1")

    network, loader = network_and_loader()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

    assert same(only_network(weights(tmp_path)), as_trained(network))


def test_bfp_is_a_ten_line_loop(tmp_path: Path) -> None:
    trained(tmp_path, "method=bfp", "max_epochs=2", "lr=0.1")

    network, loader = network_and_loader()
    groups = [list(network.model.hidden1.parameters()), list(network.model.head.parameters())]
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            for group in groups:
                loss = F.cross_entropy(network(x), y)
                for weight, gradient in zip(group, torch.autograd.grad(loss, group), strict=True):
                    weight.data.add_(gradient, alpha=-0.1)

    assert same(only_network(weights(tmp_path)), as_trained(network))


def test_bfp_with_one_group_is_sgd(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    trained(one, "method=bfp", "method.groups=1", "max_epochs=2", "optimizer=sgd_momentum")
    trained(other, "method=sgd", "max_epochs=2", "optimizer=sgd_momentum")
    assert same(weights(one), weights(other))
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def test_the_shortcut_engine_is_replay_but_for_rounding(tmp_path: Path) -> None:
    replay, shortcut = tmp_path / "replay", tmp_path / "shortcut"
    for engine, folder in (("replay", replay), ("shortcut", shortcut)):
        trained(folder, "method=bfp", f"method.engine={engine}", "max_epochs=1", "trainer.precision=64-true")
    one, other = weights(replay), weights(shortcut)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-9, atol=1e-9)
    assert files.read_metrics(shortcut)[-1]["step"] == 40


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_alike_and_counts_batches(method: str, tmp_path: Path) -> None:
    result = trained(tmp_path, f"method={method}", "max_epochs=1")
    before, after = files.read_metrics(tmp_path)

    network, _ = network_and_loader()
    data = load_data("digits", Path("nowhere"))
    with torch.no_grad():
        loss = F.cross_entropy(network(data.validation.x.float() / 255), data.validation.y)
    assert before["loss/validation"] == pytest.approx(loss.item(), rel=1e-6)
    assert after["step"] == 1297 // 32  # one global step a batch, however many updates
    assert after["loss/validation"] < before["loss/validation"]
    assert ("loss/train_joint" in after) == (method == "bfp_poster")
    assert result["status"] == "finished"


def test_training_metrics_are_from_before_the_update(tmp_path: Path) -> None:
    result = trained(tmp_path, "method=bfp", "max_epochs=1", "lr=0")
    network, loader = network_and_loader()
    with torch.no_grad():
        losses = [F.cross_entropy(network(x), y).item() for x, y in loader]
    assert result["final"]["loss/train"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert same(only_network(weights(tmp_path)), as_trained(network))


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tmp_path: Path) -> None:
    result = trained(tmp_path, "lr=1e30", "max_epochs=3", "trainer.log_every_n_steps=5")
    assert result["status"] == "diverged"
    assert result["final"]["loss/train"] is None
    assert result["final"]["step"] < 40  # it did not wait for the end of the epoch
    assert len(files.read_metrics(tmp_path)) == 2


def test_double_precision_reaches_the_images(tmp_path: Path) -> None:
    trained(tmp_path, "trainer.precision=64-true", "data_norm=none", "max_epochs=1")
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float64}


@pytest.mark.parametrize("log_every", [50, 7])
def test_however_many_batches_lightning_hands_over_at_a_time_it_counts_batches(tmp_path: Path, log_every: int) -> None:
    settings = ("method=bfp", "max_epochs=2", f"trainer.log_every_n_steps={log_every}")
    trained(tmp_path / "many", *settings)
    trained(tmp_path / "one", *settings, "trainer.checkpoint_minutes=1e-9")  # due after every batch
    assert same(weights(tmp_path / "many"), weights(tmp_path / "one"))
    many, one = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("many", "one"))
    assert many["global_step"] == one["global_step"] == 80
    progress = many["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress == one["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"] == {"ready": 80, "completed": 80, "started": 80, "processed": 80}
    assert files.read_metrics(tmp_path / "many") == files.read_metrics(tmp_path / "one")


def test_arithmetic_is_what_the_formula_of_a_chain_gives() -> None:
    """For layers of c_j multiply-accumulates: SGD 3 sum(c) - c_1, replay sum((2j + 1) c_j) - c_L."""
    costs = [64 * 16, 16 * 10]
    sgd, bfp = 3 * sum(costs) - costs[0], 3 * costs[0] + 5 * costs[1] - costs[1]
    expected = {"sgd": (sgd, 1), "sgd_repeat": (2 * sgd, 2), "bfp": (bfp, 1), "bfp_poster": (bfp + sgd, 2)}
    for method, (update, updates) in expected.items():
        (phase,) = trained(None, f"method={method}", "max_epochs=1")["arithmetic"]
        assert phase == {
            "from_epoch": 0,
            "samples": 2,
            "forward": 2 * sum(costs),
            "update": 2 * update,
            "updates": updates,
        }
    warmup = trained(None, "method=bfp_warmup", "method.at_epoch=1", "max_epochs=1")
    assert [(phase["from_epoch"], phase["update"]) for phase in warmup["arithmetic"]] == [(0, 2 * bfp), (1, 2 * sgd)]
