"""The online kNN monitor: what a nearest-neighbour vote on the backbone's features says while it learns."""

import torch

from modicum.data.images import UNKNOWN, Images
from modicum.hardware import Hardware
from modicum.neighbours import normalise, scores, search
from modicum.networks import Backbone
from modicum.randomness import generator
from modicum.views.policies import Policy

BANK, QUERIES = 4096, 1024  # training images, fixed over the run
K, TEMPERATURE, BATCH = 20, 0.07, 256


class KnnMonitor:
    """Weighted kNN accuracy of some training images among others (k 20, cosine, temperature 0.07). Test images have no part in it.

    Labels are read here for the record alone; images without one are left out. None of it reaches a loss.
    """

    def __init__(self, images: Images, policy: Policy, hardware: Hardware, seed: int) -> None:
        rows = images.rows("train")
        rows = rows[images.labels[rows] != UNKNOWN]
        rows = rows[torch.randperm(len(rows), generator=generator(seed, "monitor")).numpy()][: BANK + QUERIES]
        self.num_queries = min(QUERIES, len(rows) // 4)
        self.pixels = images.pixels[torch.from_numpy(rows)]
        self.labels = images.labels[rows]
        self.policy, self.hardware, self.num_classes = policy, hardware, images.num_classes

    @property
    def possible(self) -> bool:
        return self.num_queries >= 10 and len(self.labels) - self.num_queries > K

    @torch.no_grad()
    def read(self, backbone: Backbone) -> dict[str, float]:
        """`{"knn": accuracy in 0..1}` with running norm statistics; the backbone's mode is left as it was."""
        mode = backbone.training
        backbone.eval()
        with self.hardware.autocast():
            parts = [backbone(self.policy(part.to(self.hardware.device), {})).float() for part in self.pixels.split(BATCH)]
        backbone.train(mode)
        features = torch.cat(parts).cpu().numpy()
        bank, queries = normalise(features[self.num_queries :]), normalise(features[: self.num_queries])
        similarities, found = search(bank, queries, K)
        votes = scores(similarities, self.labels[self.num_queries :][found], [K], TEMPERATURE, self.num_classes)
        _, scored = next(votes)
        return {"knn": float((scored.argmax(axis=1) == self.labels[: self.num_queries]).mean())}
