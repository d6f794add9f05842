"""The batches of a training run: which images a step sees and how each view of them is made. Stateless: the step says it all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch import Tensor

from modicum import distributed
from modicum.data.batches import balanced_positions, positions
from modicum.data.image_files import Pixels
from modicum.data.images import Images
from modicum.hardware import send
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
        return send(self.stream.rows[self.chosen[self.mine]], self.stream.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 (B,) on the device: places of this rank's images in their stream, 0 .. its size - 1, for what is kept an image."""
        return send(self.chosen[self.mine], self.stream.device)

    @cached_property
    def labels(self) -> Tensor:
        """int64 (B,) on the device. Streams without labels have none."""
        return send(self.stream.labels[self.chosen[self.mine]], self.stream.device)

    def __len__(self) -> int:
        return self.mine.stop - self.mine.start

    @cached_property
    def images(self) -> Tensor:
        """uint8 (B, C, S, S) on the device: this rank's images, read once for all of its views."""
        return self.stream.images(self.step)

    @property
    def num_views(self) -> int:
        return len(self.stream.policies)

    def view(self, number: int, order: Tensor | None = None) -> Tensor:
        """View `number` of this rank's images: normalised float (B, C, S, S).

        With `order`, a permutation of the *global* batch, the slice of the permuted batch: the rank makes those images'
        views by itself, none are sent.
        """
        if order is not None:
            which = order[self.mine]
            alone = len(self) == len(self.chosen)  # else a part of the permuted batch holds other ranks' images too
            images = self.images[send(which, self.images.device)] if alone else self.stream.read(self.chosen[which])
            return self._render(number, which, images)
        if number not in self.rendered:
            self.rendered[number] = self._render(number, torch.arange(self.mine.start, self.mine.stop), self.images)
        return self.rendered[number]

    def previous(self) -> "Sample":
        """What the stream gave the step before; the first step has itself before it. Its views are rendered again."""
        return self.stream.sample(max(0, self.step - 1))

    def _render(self, number: int, which: Tensor, images: Tensor) -> Tensor:
        policy = self.stream.policies[number]
        draws = policy.draw(generator(*self.stream.keys, self.step, "view", number), len(self.chosen))
        return policy(images, {name: values[which] for name, values in draws.items()})

    def permutation(self) -> Tensor:
        """int64 (global B,) on the CPU: the step's permutation for shuffled norm."""
        return torch.randperm(len(self.chosen), generator=generator(*self.stream.keys, self.step, "shuffle"))


@dataclass
class Stream:
    """An endless, seeded order of some rows of a data set, with the policies of its views."""

    pixels: Pixels  # uint8 (N, C, S, S), of the whole data set
    rows: Tensor  # int64 (n,) on the CPU: the rows of this stream
    labels: Tensor  # int64 (n,) on the CPU; empty where the stream must not know them
    policies: list[Policy]
    batch_size: int  # over all ranks
    device: torch.device
    keys: tuple[int | str, ...]  # seed, stage, name of the stream
    balanced: bool = False  # whether every class, not every image, comes equally often
    _ahead: Iterator[Tensor] = field(default_factory=lambda: iter(()), init=False)
    _next: int = field(default=-1, init=False)  # the step whose images come next from `_ahead`
    _recent: dict[int, Tensor] = field(default_factory=dict, init=False)  # step -> its images, of the last two

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
        pixels = images.pixels
        if isinstance(pixels, Tensor) and device.type != "cpu" and pixels.nbytes <= ON_DEVICE_BYTES:
            pixels = pixels.to(device)
        labels = torch.tensor(images.labels[rows]) if labelled else torch.empty(0, dtype=torch.int64)
        return cls(pixels, torch.tensor(rows), labels, policies, batch_size, device, keys, balanced)

    def read(self, chosen: Tensor) -> Tensor:
        """uint8 (B, C, S, S) on the device: the images at `chosen` places of the stream, int64 (B,) on the CPU."""
        rows = self.rows[chosen]
        return send(self.pixels[send(rows, self.pixels.device) if isinstance(self.pixels, Tensor) else rows], self.device)

    def images(self, step: int) -> Tensor:
        """uint8 (B, C, S, S) on the device: this rank's images of a step. Files are decoded ahead while step follows step; two are kept."""
        mine, order = distributed.share(self.batch_size), self.order
        if isinstance(self.pixels, Tensor):
            return self.read(order(step)[mine])
        if step in self._recent:
            return self._recent[step]
        if step != self._next:
            rows = self.rows  # not `self`: a stream that nobody holds any more must end its workers
            self._ahead = self.pixels.ahead((rows[order(later)[mine]] for later in count(step)), mine.stop - mine.start)
        images = send(next(self._ahead), self.device)
        self._recent = {step: images} | {earlier: kept for earlier, kept in self._recent.items() if earlier == step - 1}
        self._next = step + 1
        return images

    def sample(self, step: int) -> Sample:
        return Sample(self, step, self.order(step))

    @cached_property
    def order(self) -> Callable[[int], Tensor]:
        """step -> int64 (batch_size,): which of the stream's images it sees."""
        size, batch, keys = len(self.rows), self.batch_size, (*self.keys, "order")
        if not self.balanced:
            return lambda step: positions(size, step * batch, batch, *keys)
        classes = [torch.nonzero(self.labels == label)[:, 0] for label in self.labels.unique()]
        return lambda step: balanced_positions(classes, step * batch, batch, *keys)
