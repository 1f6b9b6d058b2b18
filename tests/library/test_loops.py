"""Update rules in Lightning and Accelerate: weights, counters and checkpoints."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.helpers.commands import REPOSITORY, environment
from tests.helpers.loops import BATCHES, Recipe, batches, by_hand, network, optimizer_of, trainer, with_accelerate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from backforward import Backforward, Backprop, in_accelerate, in_lightning

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{hint}")
    for hint in (
        ".*does not have many workers",
        ".*LeafSpec.* is deprecated",
        "Checkpoint directory .* exists",
        "Using ModelCheckpoint with manual optimization",  # saving after the step is intended
    )
]


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


PAGE = (REPOSITORY / "docs" / "lightning.md").read_text()

RULES: dict[str, Callable[..., Any]] = {
    "Backforward": Backforward,
    "joint pass": partial(Backforward, joint_pass=True),
    "repeats": partial(Backprop, repeats=2),
}


@pytest.mark.parametrize("rule", RULES)
def test_lightning_counts_batches_and_saves(rule: str, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    module = Recipe(RULES[rule])
    fit = trainer(tmp_path, callbacks=[saved])
    fit.fit(module, batches())
    assert fit.global_step == 2 * BATCHES
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=12.ckpt", "step=4.ckpt", "step=8.ckpt"]
    if rule == "Backforward":
        assert equal(module.network, by_hand())


def test_lightning_stops_at_max_steps_and_resumes(tmp_path: Path) -> None:
    module = Recipe()
    fit = trainer(tmp_path, max_epochs=None, max_steps=BATCHES)
    fit.fit(module, batches())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    other = Recipe()
    trainer(tmp_path).fit(other, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(other.network, by_hand())  # momentum included


@pytest.mark.filterwarnings("ignore:.*")  # tips from Lightning
@pytest.mark.parametrize(
    "example", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=["Lightning", "Accelerate"]
)
def test_the_examples_in_the_docs_run(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(example, "docs/lightning.md", "exec"), names)
    if "Classifier" in names:
        images = TensorDataset(torch.rand(32, 1, 28, 28), torch.arange(32) % 10)
        fit = trainer(tmp_path)
        fit.fit(names["Classifier"](), DataLoader(images, batch_size=8))
        assert fit.global_step == 8
        assert list(tmp_path.rglob("*.ckpt"))
    else:
        assert capsys.readouterr().out.startswith("loss ")


def test_accelerate_trains_the_same(tmp_path: Path) -> None:
    assert equal(with_accelerate(0, 1, tmp_path), by_hand())


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["lightning", "accelerate"])
def test_two_ranks_stay_equal_and_train_as_one_process(loop: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.helpers.loops", loop]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", port, str(tmp_path)], cwd=REPOSITORY, env=environment())
        for rank in range(2)
    ]
    try:
        assert [rank.wait(240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in by_hand().state_dict().items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


def test_refuses_lightning_modules_that_cannot_work(tmp_path: Path) -> None:
    """Lightning's wrapper of an optimizer, for example, would count a step for every group."""

    class Wrapped(Recipe):
        def on_train_start(self) -> None:
            Backforward(self.network, self.optimizers(), F.cross_entropy)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="wraps another optimizer"):
        trainer(tmp_path).fit(Wrapped(), batches())

    class Automatic(Recipe):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = True

    with pytest.raises(ValueError, match=r"set self\.automatic_optimization = False"):
        trainer(tmp_path).fit(Automatic(), batches())

    class Two(Recipe):
        def configure_optimizers(self) -> Any:
            return [optimizer_of(self.network[0]), optimizer_of(self.network[2])]  # type: ignore[index]

    with pytest.raises(ValueError, match="returned 2 optimizers"):
        trainer(tmp_path).fit(Two(), batches())


class FSDPStrategy:
    """Has the name of Lightning's class."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16' needs a gradient scaler"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
        ({"distributed_type": "DistributedType.FSDP"}, "FSDP gives each process a part"),
        ({"distributed_type": "DistributedType.MEGATRON_LM"}, "MEGATRON_LM gives each process a part"),
    ],
)
def test_refuses_accelerate_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    usual = {"mixed_precision": "no", "gradient_accumulation_steps": 1, "distributed_type": "NO", "num_processes": 1}
    with pytest.raises(ValueError, match=message):
        in_accelerate(SimpleNamespace(**usual | settings), optimizer_of(network()))


def test_refuses_a_strategy_that_shards_parameters() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy(), world_size=2)
    optimizer = optimizer_of(network())
    module = SimpleNamespace(automatic_optimization=False, trainer=trainer, optimizers=lambda **_: optimizer)
    with pytest.raises(ValueError, match="FSDPStrategy gives each process a part"):
        in_lightning(module)
