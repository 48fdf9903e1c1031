"""Random numbers as a function of (seed, step): they do not depend on what was drawn before.

So a run resumes exactly without random states on disk, and does not depend on its number of worker processes.
"""

import hashlib
from functools import lru_cache

import numpy as np

LARGE = 2**26
"""From this many examples on, the order of an epoch is computed where it is needed: a billion would take 8 GB."""
BLOCK, WINDOW = 64, 256
"""Examples that follow one another and come within a window of `window_slice`, and the steps of a window."""


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


def _scattered(count: int, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
    """Return what a permutation of `count` numbers has at `places`, each computed by itself, in no memory.

    A Feistel network of four rounds permutes the numbers of an even count of bits (Luby & Rackoff 1988); it is repeated
    for results from `count` on (cycle walking, Black & Rogaway 2002).
    """
    half = np.uint64(((count - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(hash64("permutation", seed, epoch, part)) for part in range(4)]
    found = places.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            mixed = right ^ key  # splitmix64 (Steele et al. 2014)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        found[outside] = (left << half) | right
        outside = found >= count
    return found.astype(np.int64)


def epoch_slice(count: int, seed: int, start: int, size: int) -> np.ndarray:
    """Return the indices, int64 (size,), at `start .. start + size` of an endless sequence of shuffled epochs.

    Each epoch holds each of `count` examples once, in its own order; a slice may cross epochs.
    """
    parts: list[np.ndarray] = []
    while size > 0:
        epoch, offset = divmod(start, count)
        if count < LARGE:
            part = _permutation(count, seed, epoch)[offset : offset + size]
        else:
            part = _scattered(count, seed, epoch, np.arange(offset, min(offset + size, count)))
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def _window(count: int, seed: int, epoch: int, number: int, batch: int) -> np.ndarray:
    """Return the order in window `number` of an epoch: WINDOW batches, or what is left of the examples."""
    places = np.arange(number * WINDOW * batch, min((number + 1) * WINDOW * batch, count))
    blocks, rows = np.divmod(places, BLOCK)
    found, whole = places.copy(), blocks < count // BLOCK
    if whole.any():
        first = blocks[0]
        shuffled = _scattered(count // BLOCK, seed, epoch, np.arange(first, blocks[whole][-1] + 1))
        found[whole] = shuffled[blocks[whole] - first] * BLOCK + rows[whole]
    random = np.random.default_rng(step_seed(seed, epoch, number, 3))  # what a step draws has (seed, step, 1 or 2)
    steps = len(found) // batch
    body, rest = np.split(found, [steps * batch])
    return np.concatenate([random.permuted(body.reshape(batch, steps), axis=1).T.reshape(-1), random.permutation(rest)])


def window_slice(count: int, seed: int, step: int, batch: int) -> np.ndarray:
    """Return the indices, int64 (batch,), of a step of endless shuffled epochs, for data that are read in blocks.

    As with `epoch_slice`, each epoch holds each of `count` examples once, in its own order. Here blocks of BLOCK
    neighbours are shuffled. The examples of a block have the same place in different batches of one window, where each
    place has WINDOW / BLOCK blocks, mixed at random. A process has fixed places of the batches: it reads whole blocks.
    """
    start, size, parts = step * batch, batch, list[np.ndarray]()
    while size > 0:
        epoch, place = divmod(start, count)
        number, offset = divmod(place, WINDOW * batch)
        part = _window(count, seed, epoch, number, batch)[offset : offset + size]
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return np.concatenate(parts)


def window_steps(count: int, step: int, batch: int) -> range:
    """Return the steps from this one on that begin in its window, see `window_slice`."""
    epoch, place = divmod(step * batch, count)
    end = epoch * count + min((place // (WINDOW * batch) + 1) * WINDOW * batch, count)
    return range(step, -(-end // batch))


def fixed_subset(count: int, among: int) -> list[int]:
    """Return `count` fixed random indices below `among`, ascending (a prefix would be of the first classes only)."""
    return sorted(epoch_slice(among, 0, 0, count).tolist()) if count < among else list(range(among))
