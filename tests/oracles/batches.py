"""The slow obvious version of the in-memory loader: one image at a time, in Python."""

import numpy as np
import torch
from torch import Tensor

from backforward_suite.data import Images


def epoch(
    images: Images, batch_size: int, seed: int, number: int, *, shuffle: bool = True, augment: str = "none"
) -> list[tuple[Tensor, Tensor]]:
    """Return all images of an epoch in global batches, a short last one included."""
    random = np.random.RandomState([seed, number])
    order = random.permutation(len(images)) if shuffle else range(len(images))
    flips = random.random_sample(len(images)) < 0.5
    batches = []
    for start in range(0, len(images), batch_size):
        x, y = [], []
        for place in range(start, min(start + batch_size, len(images))):
            image = images.x[int(order[place])].to(torch.float32) / 255
            if augment == "flip" and flips[place]:
                image = torch.tensor([[row[::-1] for row in channel] for channel in image.tolist()])
            x.append(image)
            y.append(images.y[int(order[place])])
        batches.append((torch.stack(x), torch.stack(y)))
    return batches
