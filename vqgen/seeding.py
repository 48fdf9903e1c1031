"""Randomness as a function of (seed, step): what a run draws depends on nothing that came before.

This is what makes a resume exact without random states on disk, and a run independent of its worker processes.
"""

import hashlib
from functools import lru_cache

import numpy as np


def hash64(*parts: object) -> int:
    """A fixed 64-bit number from the parts' text: the same on every machine, in every process, for ever."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def step_seed(seed: int, *where: int) -> int:
    """A 63-bit seed, as torch takes it, for a place in a run, e.g. (step, process)."""
    return hash64(seed, *where) >> 1


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(step_seed(seed, epoch)).permutation(count)


def epoch_slice(count: int, seed: int, start: int, size: int) -> np.ndarray:
    """Indices `start .. start + size` of an endless sequence of shuffled epochs over `count` examples: int64 (size,).

    Each epoch holds every example once, in an order of its own; a slice may cross epochs.
    """
    parts: list[np.ndarray] = []
    while size > 0:
        epoch, offset = divmod(start, count)
        part = _permutation(count, seed, epoch)[offset : offset + size]
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return np.concatenate(parts)


def fixed_subset(count: int, among: int) -> list[int]:
    """`count` of the indices below `among`, in order, always the same: a sample of a set whatever its order, which in a
    folder of classes is one class after the other. All where `among` is not more."""
    return sorted(epoch_slice(among, 0, 0, count).tolist()) if count < among else list(range(among))
