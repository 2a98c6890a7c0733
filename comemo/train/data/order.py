"""In which order an epoch reads its samples: a function of seed, epoch, lengths and weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np

_CHOICES = ("length", "sqrt")


@dataclass(frozen=True)
class Order:
    """How samples of several datasets follow each other.

    Attributes:
        counts: samples of an epoch, per dataset.
        weights: per dataset; how often it comes next, as long as it has samples left.
        seed: of every epoch.
        restart: whether an epoch is a draw by weight for each sample, in which a dataset that is
            used up begins again in a new order; else each sample comes once.
        shuffled: False for datasets one after the other, in the order of their files.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    restart: bool = False
    shuffled: bool = True

    @property
    def length(self) -> int:
        """Samples of an epoch."""
        used = zip(self.counts, self.weights, strict=True)
        return sum(count for count, weight in used if weight > 0)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of an epoch.

        Args:
            epoch: from 0.

        Returns:
            uint16 [length], the dataset of each position, and uint32 [length], its sample.
        """
        if not self.shuffled:
            return self._in_turn()
        rng = np.random.default_rng([self.seed, epoch])
        return self._draw(rng) if self.restart else self._merge(rng)

    def _in_turn(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = zip(self.counts, self.weights, strict=True)
        used = [count if weight > 0 else 0 for count, weight in pairs]
        datasets = np.repeat(np.arange(len(used), dtype=np.uint16), used)
        return datasets, np.concatenate([np.arange(count, dtype=np.uint32) for count in used])

    def _merge(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Each dataset's samples arrive at random times, at a rate that is its weight."""
        times, datasets, samples = [], [], []
        for index, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            if weight > 0:
                times.append(rng.exponential(1 / weight, count).cumsum())
                datasets.append(np.full(count, index, np.uint16))
                samples.append(rng.permutation(np.arange(count, dtype=np.uint32)))
        order = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(datasets)[order], np.concatenate(samples)[order]

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        shares = np.array(self.weights) / sum(self.weights)
        datasets = rng.choice(len(shares), self.length, p=shares).astype(np.uint16)
        samples = np.empty(self.length, np.uint32)
        for index, count in enumerate(self.counts):
            here = np.flatnonzero(datasets == index)
            rounds = -(-len(here) // count)
            once = np.arange(count, dtype=np.uint32)
            read = [rng.permutation(once) for _ in range(rounds)] or [once]
            samples[here] = np.concatenate(read)[: len(here)]
        return datasets, samples


def weights_of(mixing: Any, names: list[str], counts: list[int]) -> tuple[float, ...]:
    """The weights of datasets.

    Args:
        mixing: "length", "sqrt" (of the length), or a weight by name for every dataset; 0 leaves
            a dataset out.
        names, counts: of the datasets.

    Raises:
        ValueError: another word, an unknown or missing name, a negative weight, only zeros.
    """
    if isinstance(mixing, str) and mixing in _CHOICES:
        return tuple(float(count) if mixing == "length" else count**0.5 for count in counts)
    if not isinstance(mixing, dict):
        wanted = f"one of {list(_CHOICES)} or a weight by name of a dataset"
        raise ValueError(f"data: mixing must be {wanted}, got {mixing!r:.60}")
    if set(mixing) != set(names):
        got = sorted(map(str, mixing))
        raise ValueError(f"data: mixing must have a weight for each of {sorted(names)}, got {got}")
    for name, weight in mixing.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < 1e30:
            raise ValueError(f"data: mixing of {name!r} must be at least 0, got {weight!r:.60}")
    if not any(mixing.values()):
        raise ValueError(f"data: mixing must have a weight above 0, got {mixing}")
    return tuple(float(mixing[name]) for name in names)
