"""Random numbers as a function of (seed, step): they do not depend on what was drawn before.

So a run resumes exactly without random states on disk, and does not depend on its number of worker processes.
"""

import hashlib
from functools import lru_cache

import numpy as np


def hash64(*parts: object) -> int:
    """Hash the text of `parts` to 64 bits: the same number on every machine and in every process."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def step_seed(seed: int, *where: int) -> int:
    """Return a 63-bit seed, as torch takes it, for a position in a run, e.g. (step, process)."""
    return hash64(seed, *where) >> 1


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(step_seed(seed, epoch)).permutation(count)


def epoch_slice(count: int, seed: int, start: int, size: int) -> np.ndarray:
    """Return the indices, int64 (size,), at `start .. start + size` of an endless sequence of shuffled epochs.

    Each epoch holds each of `count` examples once, in its own order; a slice may cross epochs.
    """
    parts: list[np.ndarray] = []
    while size > 0:
        epoch, offset = divmod(start, count)
        part = _permutation(count, seed, epoch)[offset : offset + size]
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return np.concatenate(parts)


def fixed_subset(count: int, among: int) -> list[int]:
    """Return `count` fixed random indices below `among`, ascending (a prefix would be of the first classes only)."""
    return sorted(epoch_slice(among, 0, 0, count).tolist()) if count < among else list(range(among))
