"""Batches for several networks at once, each in an order of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backforward.data.loader import EpochLoader


class StackedBatches:
    """What several loaders of the same images yield, batch by batch, as one tensor.

    Args:
        loaders: Whole loaders (of one process, dropping the last short batch) that differ in nothing but their seed.
        device: Where images are held, once for all, and batches made.
    """

    def __init__(self, loaders: Sequence[EpochLoader], device: torch.device | str = "cpu") -> None:
        self.loaders = list(loaders)
        self.images = self.loaders[0].images.to(device)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.loaders[0])

    def keep_(self, places: Sequence[int]) -> None:
        """Go on with the loaders at these places alone, from the next batch on."""
        self.loaders = [self.loaders[place] for place in places]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x, y)`` from batch ``start`` on: x float32 ``[R, B, C, H, W]`` in [0, 1], y int64 ``[R, B]``."""
        size, device = self.loaders[0].batch_size, self.images.x.device
        of_each = {loader: loader.order(epoch) for loader in self.loaders}
        while start < len(self):
            loaders = self.loaders
            orders = torch.stack([of_each[loader][0] for loader in loaders]).to(device)
            flipped = [flips for flips in (of_each[loader][1] for loader in loaders) if flips is not None]
            flips = torch.stack(flipped).to(device) if flipped else None
            while start < len(self) and self.loaders is loaders:
                share = slice(start * size, (start + 1) * size)
                index = orders[:, share].flatten()
                x = self.images.x.index_select(0, index)
                if flips is not None:
                    x = torch.where(flips[:, share].flatten(0, 1), x.flip(-1), x)
                y = self.images.y.index_select(0, index)
                start += 1
                yield x.to(torch.float32).div_(255).view(len(loaders), size, *x.shape[1:]), y.view(-1, size)
