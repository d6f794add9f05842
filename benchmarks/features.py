"""Features to search and to classify: clustered at random, the same on every machine but for rounding."""

import numpy as np
import torch

from modicum.randomness import generator

CLASSES, CLUSTERS = 10, 20  # clusters of a class


def clustered(count: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (count, dimensions) and labels int64 (count,).

    A class is a cloud of clusters, and noise lies mostly in few directions, as it does in a network's features: a linear probe errs
    on some images, and more so without regularisation.
    """
    random = generator("benchmarks", "features")
    classes = 0.1 * torch.randn(CLASSES, 1, dimensions, generator=random)
    centres = classes + 0.3 * torch.randn(CLASSES, CLUSTERS, dimensions, generator=random)
    turn = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=random)).Q
    spread = 12 * torch.arange(1, dimensions + 1).float().pow(-0.5)
    cluster = torch.randint(CLASSES * CLUSTERS, (count,), generator=random)
    noise = (torch.randn(count, dimensions, generator=random) * spread) @ turn
    return (centres.flatten(0, 1)[cluster] + noise).numpy(), (cluster // CLUSTERS).numpy()
