"""The loader in Lightning's hands: it sets the epoch, saves the place and resumes there."""

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from backforward_suite.data import EpochLoader, Images

BATCHES = 3  # in an epoch


def loader(count: int, **options: bool) -> EpochLoader:
    """Return a loader over images that are labelled with their own numbers, in batches of 4."""
    return EpochLoader(
        Images(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count)), 4, seed=5, **options
    )


class Recorder(L.LightningModule):
    """Records the images of each batch; saves a checkpoint during a given batch, or after an epoch."""

    def __init__(self, folder: Path, save: int | str | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(1, 1)
        self.folder, self.save, self.seen = folder, save, []  # type: ignore[var-annotated]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.seen.append(batch[1].tolist())
        self.optimizers().step()  # type: ignore[union-attr]

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.seen) == self.save:
            self.trainer.save_checkpoint(self.folder / "saved.ckpt")

    def on_train_epoch_end(self) -> None:
        if self.save == f"epoch {self.current_epoch}":
            self.trainer.save_checkpoint(self.folder / "saved.ckpt")

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        pass

    def on_validation_end(self) -> None:
        if self.save == f"validation {self.current_epoch}" and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(self.folder / "saved.ckpt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, save: int | str | None = None, resume: bool = False, **limits: int) -> list[list[int]]:
    module = Recorder(folder, save)
    trainer = L.Trainer(
        **limits,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    validation = loader(6, shuffle=False, drop_last=False)
    path = folder / "saved.ckpt" if resume else None
    trainer.fit(module, loader(4 * BATCHES), validation, ckpt_path=path, weights_only=True)
    return module.seen


EPOCHS, STEPS = {"max_epochs": 4}, {"max_epochs": -1, "max_steps": 11}
# Saved at the end of a training epoch and resumed with `max_steps`, Lightning 2.6.6 itself counts an epoch too many.
CASES = [(save, limits) for save in (1, 2, 3, 5, 6, 8, "validation 0", "validation 1") for limits in (EPOCHS, STEPS)]
CASES += [("epoch 0", EPOCHS), ("epoch 2", EPOCHS)]


@pytest.mark.parametrize(("save", "limits"), CASES, ids=[f"{save}-{max(limits)}" for save, limits in CASES])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_lightning_sets_the_epoch_and_resumes_with_the_next_batch(
    tmp_path: Path, save: int | str, limits: dict[str, int]
) -> None:
    expected = []
    for epoch in range(4):
        plain = loader(4 * BATCHES)
        plain.set_epoch(epoch)
        expected += [y.tolist() for _, y in plain]
    expected = expected[: limits.get("max_steps")]
    assert fit(tmp_path, save, **limits) == expected
    done = save if isinstance(save, int) else BATCHES * (int(save[-1]) + 1)
    assert fit(tmp_path, resume=True, **limits) == expected[done:]
