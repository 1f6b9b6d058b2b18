"""Batches from memory, in an order that depends on nothing but seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backforward_suite.data.images import Images

AUGMENTATIONS = ("none", "flip")


class EpochLoader:
    """Iterate over the batches of an epoch, by index from images that stay on the device as bytes.

    Yields ``(x, y)``: x float32 ``[B, C, H, W]`` in [0, 1], y int64 ``[B]``, both on ``device``.

    The order of samples, and which of them are flipped, is a pure function of ``(seed, epoch)``: it does not depend on
    the process, the method, the number of ranks or earlier draws. Call :meth:`set_epoch` before each epoch (Lightning
    does, through :attr:`sampler`); without it every epoch has the same order.

    **Resuming.** A loader that loads the :meth:`state_dict` taken while or after training on batch k starts its next
    iterator at batch k + 1. The state consists of integers, the same on every rank.

    **Several processes.** ``batch_size`` is global. Every rank takes its own contiguous share of every global batch, so
    that n ranks together see what one process sees. With ``drop_last=False`` (evaluation) the shares of a batch may
    differ by one image; none is empty, as a remainder too small for that joins the batch before it. So add *sums* over
    images (of losses, of correct predictions, of counts) over batches and ranks and divide at the end: means of means
    would be wrong.

    Args:
        images: The images.
        batch_size: Images per global batch.
        seed: 0 to 2**32 - 1.
        shuffle: Draw a new order each epoch; else keep the order of ``images``.
        drop_last: Leave out the last images if they do not fill a batch.
        limit: Batches per epoch at most; with ``drop_last`` only.
        augment: ``none``, or ``flip``: flip each image left to right with probability 1/2, drawn each epoch.
        device: The device of images and batches.
        rank: Index of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: An argument is out of range, or ``batch_size`` does not fit the images or the processes.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        limit: int | None = None,
        augment: str = "none",
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be an integer >= 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks run from 0 to world_size - 1")
        if batch_size % world_size if drop_last else batch_size < world_size:
            raise ValueError(f"batch_size={batch_size} does not divide among {world_size} processes; a multiple would")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed!r}: must be an integer from 0 to {2**32 - 1}")
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment={augment!r}: there are {', '.join(AUGMENTATIONS)}")
        if limit is not None and (not drop_last or limit < 1):
            raise ValueError(f"limit={limit!r}: must be an integer >= 1, with drop_last=True")
        if drop_last and batch_size > len(images):
            raise ValueError(f"batch_size={batch_size} is more than the {len(images)} images there are to train on")
        if len(images) < world_size:
            raise ValueError(f"{len(images)} images are too few for {world_size} processes")
        self.images = images.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.limit = limit
        self.augment = augment
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._batch = 0  # batches of this epoch yielded so far
        self._resume = 0  # where the next iterator starts

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, the same on every rank."""
        whole, rest = divmod(len(self.images), self.batch_size)
        if self.drop_last:
            return whole if self.limit is None else min(whole, self.limit)
        return max(1, whole + (rest >= self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the epoch, or the rest of them after a state was loaded."""
        # A generator: nothing runs before the first batch is requested. Lightning creates iterators before it calls
        # `set_epoch`, and some that it never uses.
        start, self._resume = self._resume, 0
        self._batch = start
        order, flips = self.order(self._epoch)
        labels = self.images.y.index_select(0, order)
        for batch in range(start, len(self)):
            share = self._share(batch)
            x = self.images.x.index_select(0, order[share])
            if flips is not None:
                x = torch.where(flips[share], x.flip(-1), x)
            self._batch = batch + 1
            yield x.to(torch.float32).div_(255), labels[share]

    def _share(self, batch: int) -> slice:
        """Return this rank's share of a global batch, as a slice of the epoch's order."""
        start, stop = batch * self.batch_size, (batch + 1) * self.batch_size
        if not self.drop_last and batch == len(self) - 1:
            stop = len(self.images)
        size = stop - start
        return slice(start + self.rank * size // self.world_size, start + (self.rank + 1) * size // self.world_size)

    def order(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Return an epoch's order of images, int64 ``[N]``, and which of them are flipped, bool ``[N, 1, 1, 1]``."""
        # NumPy froze the stream of RandomState (NEP 19): the same order under every version and on every device.
        random, count = np.random.RandomState([self.seed, epoch]), len(self.images)
        order: NDArray[np.int64] = random.permutation(count) if self.shuffle else np.arange(count)
        device = self.images.x.device
        flips = None
        if self.augment == "flip":
            flips = torch.from_numpy(random.random_sample(count) < 0.5).view(-1, 1, 1, 1).to(device)
        return torch.from_numpy(order).to(device), flips

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless it is the current one: a loaded state stays."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: must be >= 0")
        if epoch != self._epoch:
            self._epoch, self._batch, self._resume = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position in the data, and the settings that it depends on."""
        return {"epoch": self._epoch, "batch": self._batch, **self._setting()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iterator start where :meth:`state_dict` was taken.

        Raises:
            ValueError: The state has another seed, batch size or number of images, or is damaged.
        """
        for key, value in self._setting().items():
            if state.get(key) != value:
                raise ValueError(
                    f"the position in the data is of another run: {key} was {state.get(key)} and is {value} now"
                )
        epoch, batch = state.get("epoch"), state.get("batch")
        if not isinstance(epoch, int) or not isinstance(batch, int) or epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"the position in the data is damaged: batch {batch} of {len(self)} in epoch {epoch}")
        self._epoch, self._batch, self._resume = epoch, batch, batch

    def _setting(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "images": len(self.images)}

    # Lightning calls `set_epoch` of a loader's `sampler`, and reads `batch_sampler` if there is a `sampler`.
    batch_sampler = None

    @property
    def sampler(self) -> EpochLoader:
        """The loader itself: it orders its own samples."""
        return self
