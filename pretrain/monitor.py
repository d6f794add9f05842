"""What is watched while a backbone learns: what neighbours say of its features, and how its embeddings lie on the sphere."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from modicum.data.images import UNKNOWN, Images
from modicum.features import in_evaluation
from modicum.files import write_table
from modicum.hardware import Hardware
from modicum.neighbours import normalise, scores, search
from modicum.networks import Backbone
from modicum.pretrain.collapse import Collapse
from modicum.pretrain.prototypes import Prototypes
from modicum.pretrain.spread import BINS, alignment, cosines_of_pairs, deviation, effective_rank, histogram, uniformity
from modicum.randomness import generator
from modicum.views.policies import Policy

BANK, QUERIES = 4096, 1024  # training images, fixed over the run
K, TEMPERATURE, BATCH = 20, 0.07, 256
# Training images whose embeddings are watched: 1,024 at most, of small sets a quarter, though no fewer than 64. A reading of 1,024 takes as
# long as about 4 steps of MoCo with 128 images; in a run of the shipped digits its readings take 1 % of the time.
WATCHED, FEWEST = 1024, 64


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
        with in_evaluation(backbone), self.hardware.autocast():
            parts = [backbone(self.policy(part.to(self.hardware.device), {})).float() for part in self.pixels.split(BATCH)]
        features = torch.cat(parts).cpu().numpy()
        bank, queries = normalise(features[self.num_queries :]), normalise(features[: self.num_queries])
        similarities, found = search(bank, queries, K)
        votes = scores(similarities, self.labels[self.num_queries :][found], [K], TEMPERATURE, self.num_classes)
        _, scored = next(votes)
        return {"knn": float((scored.argmax(axis=1) == self.labels[: self.num_queries]).mean())}


class EmbeddingMonitor:
    """How the student's embeddings of two views of some training images lie: spread, rank, alignment, uniformity and similarities.

    The images, their two views (by the first two of the run's policies) and their draws are the same at every reading. What is
    measured are the student's own embeddings, before any predictor, whitening or prototypes, with running norm statistics, as stage
    two will meet the network. In the first few dozen steps those lag behind the weights, and the figures with them.
    """

    def __init__(
        self,
        images: Images,
        policies: list[Policy],
        student: nn.Sequential,
        collapse: Collapse,
        folder: Path,
        hardware: Hardware,
        seed: int,
    ) -> None:
        rows = images.rows("train")
        count = min(WATCHED, max(FEWEST, len(rows) // 4))
        rows = rows[torch.randperm(len(rows), generator=generator(seed, "monitor", "embeddings")).numpy()][:count]
        self.pixels = images.pixels[torch.from_numpy(rows)]
        self.policies = policies[:2]
        self.draws = [policy.draw(generator(seed, "monitor", "view", at), len(rows)) for at, policy in enumerate(self.policies)]
        self.student, self.collapse, self.folder, self.hardware = student, collapse, folder, hardware
        self.backbone = student[0]
        self.head = nn.Sequential(*(layer for layer in student[1:] if not isinstance(layer, Prototypes)))

    @torch.no_grad()
    def read(self, step: int) -> dict[str, float]:
        """The figures of the moment; the histogram of the similarities goes to `similarities.csv`. The student's mode is left as it was.

        Empty where the embeddings are not finite: the loop says so, and why.
        """
        with in_evaluation(self.student), self.hardware.autocast():
            (features, first), (_, second) = (self._view(number) for number in (0, 1))
        if not (first.isfinite().all() and second.isfinite().all()):
            return {}
        positives, negatives = cosines_of_pairs(first, second)
        self._record(step, histogram(positives), histogram(negatives))
        figures = {
            "embedding_std": deviation(first),
            "embedding_rank": effective_rank(first),
            "feature_rank": effective_rank(features),
            "alignment": alignment(positives),
            "uniformity": uniformity(negatives),
        }
        self.collapse.look(step, figures, min(first.shape))
        return figures

    def _view(self, number: int) -> tuple[Tensor, Tensor]:
        """Features (N, F) and embeddings (N, D) of one view, float32 on the CPU."""
        features, embeddings = [], []
        for start in range(0, len(self.pixels), BATCH):
            part = slice(start, start + BATCH)
            draws = {name: values[part] for name, values in self.draws[number].items()}
            found = self.backbone(self.policies[number](self.pixels[part].to(self.hardware.device), draws))
            features.append(found.float().cpu())
            embeddings.append(self.head(found).float().cpu())
        return torch.cat(features), torch.cat(embeddings)

    def _record(self, step: int, positives: np.ndarray, negatives: np.ndarray) -> None:
        """Writes the reading behind the earlier ones, in place of those that a resumed run makes again."""
        path = self.folder / "similarities.csv"
        edges = np.linspace(-1, 1, BINS + 1).round(6)
        made = pd.DataFrame({"step": step, "low": edges[:-1], "high": edges[1:], "positives": positives, "negatives": negatives})
        if path.is_file():
            earlier = pd.read_csv(path, dtype=str)  # as it stands, to the last digit
            made = pd.concat([earlier[earlier["step"].astype(int) < step], made])
        write_table(path, made)
