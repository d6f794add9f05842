"""The batches of a training run: which images a step sees and how each view of them is made. Stateless: the step says it all."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from modicum import distributed
from modicum.data.batches import balanced_positions, positions
from modicum.data.images import Images
from modicum.randomness import generator
from modicum.views.policies import Policy

Batch = dict[str, "Sample"]  # stream -> its images of one step: what a method is given
ON_DEVICE_BYTES = 4 << 30  # data sets up to this size are kept on the accelerator as a whole


@dataclass
class Sample:
    """The images of one step of one stream, of which this rank renders its slice of any view."""

    stream: "Stream"
    step: int
    chosen: Tensor  # int64 (global B,) on the CPU: positions among the stream's images
    rendered: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def mine(self) -> slice:
        return distributed.share(len(self.chosen))

    @cached_property
    def rows(self) -> Tensor:
        """int64 (B,) on the device: rows of the data set behind this rank's images."""
        return self.stream.rows[self.chosen[self.mine]].to(self.stream.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 (B,) on the device: places of this rank's images in their stream, 0 .. its size - 1, for what is kept an image."""
        return self.chosen[self.mine].to(self.stream.device)

    @cached_property
    def labels(self) -> Tensor:
        """int64 (B,) on the device. Streams without labels have none."""
        return self.stream.labels[self.chosen[self.mine]].to(self.stream.device)

    def __len__(self) -> int:
        return self.mine.stop - self.mine.start

    @property
    def num_views(self) -> int:
        return len(self.stream.policies)

    def view(self, number: int, order: Tensor | None = None) -> Tensor:
        """View `number` of this rank's images: normalised float (B, C, S, S).

        With `order`, a permutation of the *global* batch, the slice of the permuted batch: the rank makes those images'
        views by itself, none are sent.
        """
        if order is not None:
            return self._render(number, order[self.mine])
        if number not in self.rendered:
            self.rendered[number] = self._render(number, torch.arange(self.mine.start, self.mine.stop))
        return self.rendered[number]

    def _render(self, number: int, which: Tensor) -> Tensor:
        policy = self.stream.policies[number]
        draws = policy.draw(generator(*self.stream.keys, self.step, "view", number), len(self.chosen))
        images = self.stream.images(self.chosen[which])
        return policy(images, {name: values[which] for name, values in draws.items()})

    def permutation(self) -> Tensor:
        """int64 (global B,) on the CPU: the step's permutation for shuffled norm."""
        return torch.randperm(len(self.chosen), generator=generator(*self.stream.keys, self.step, "shuffle"))


@dataclass
class Stream:
    """An endless, seeded order of some rows of a data set, with the policies of its views."""

    pixels: Tensor  # uint8 (N, C, S, S), of the whole data set
    rows: Tensor  # int64 (n,) on the CPU: the rows of this stream
    labels: Tensor  # int64 (n,) on the CPU; empty where the stream must not know them
    policies: list[Policy]
    batch_size: int  # over all ranks
    device: torch.device
    keys: tuple[int | str, ...]  # seed, stage, name of the stream
    balanced: bool = False  # whether every class, not every image, comes equally often

    @classmethod
    def of(
        cls,
        images: Images,
        rows: np.ndarray,
        policies: list[Policy],
        batch_size: int,
        device: torch.device,
        *keys: int | str,
        labelled: bool = False,
        balanced: bool = False,
    ) -> "Stream":
        pixels = images.pixels.to(device) if device.type != "cpu" and images.pixels.nbytes <= ON_DEVICE_BYTES else images.pixels
        labels = torch.tensor(images.labels[rows]) if labelled else torch.empty(0, dtype=torch.int64)
        return cls(pixels, torch.tensor(rows), labels, policies, batch_size, device, keys, balanced)

    def images(self, chosen: Tensor) -> Tensor:
        return self.pixels[self.rows[chosen].to(self.pixels.device)].to(self.device)

    def sample(self, step: int) -> Sample:
        start, keys = step * self.batch_size, (*self.keys, "order")
        if self.balanced:
            return Sample(self, step, balanced_positions(self.classes, start, self.batch_size, *keys))
        return Sample(self, step, positions(len(self.rows), start, self.batch_size, *keys))

    @cached_property
    def classes(self) -> list[Tensor]:
        """The positions of each class's images, of classes that have any."""
        return [torch.nonzero(self.labels == label)[:, 0] for label in self.labels.unique()]
