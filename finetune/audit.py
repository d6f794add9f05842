"""Are the pseudo-labels right? The truth of benchmarks is used here, for the record alone; no method can reach it."""

import torch
from torch import Tensor

from modicum.data.images import UNKNOWN, Images
from modicum.finetune.semi_supervised import SemiSupervised
from modicum.loop import Reading


class Audit:
    """Counts, on the device, over the images of each step: how many guesses are used, and how many are right."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self.truth = torch.tensor(images.labels, device=device)

    def observe(self, method: SemiSupervised) -> dict[str, Reading]:
        """Numerators and denominators of the step just made; empty for a method that guesses nothing."""
        guesses = method.guesses
        if guesses is None:
            return {}
        truth = self.truth[guesses.rows]
        known = (truth != UNKNOWN).float()
        right = (guesses.probabilities.argmax(dim=1) == truth).float()
        used = guesses.used
        return {
            "share_above_threshold": (used.sum(), count(used)),
            "pseudo_label_accuracy": (right.sum(), known.sum()),
            "pseudo_label_accuracy_above_threshold": ((right * used).sum(), (known * used).sum()),
        }


def count(values: Tensor) -> Tensor:
    return torch.ones_like(values).sum()
