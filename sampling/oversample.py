"""Oversampling: draw more candidates than images, keep the most likely.

The images of one condition (and one row of known codes) come in groups of `GROUP`. `oversample` times as many
candidates are drawn for a group, and its images are the most likely of them. So an image still depends on its seed,
index and settings alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

GROUP = 16
# Above all indices of images; an image without oversampling and the same image as a candidate share their numbers.
EXTRA = 2**63


@dataclass(frozen=True)
class Group:
    """Images of one group and its candidates, both as indices; candidates[:GROUP] are the images themselves."""

    images: list[int]
    candidates: list[int]


def group_of(index: int, cycle: int, oversample: float) -> Group:
    """The group of image `index` where conditions (and known codes) repeat after `cycle` images."""
    kind, number = index % cycle, index // cycle // GROUP
    images = [(number * GROUP + member) * cycle + kind for member in range(GROUP)]
    more = math.ceil(GROUP * (oversample - 1))
    first = EXTRA - EXTRA % cycle + kind  # the same condition as the images of the group
    extra = [first + (number * more + member) * cycle for member in range(more)]
    return Group(images, images + extra)


def most_likely(nats: Tensor) -> Tensor:
    """The `GROUP` candidates of the lowest NLL, in ascending order: nats (candidates,) -> indices (GROUP,)."""
    return nats.argsort(stable=True)[:GROUP].sort().values


def batches(indices: Sequence[int], cycle: int, oversample: float, batch_size: int) -> list[list[int]]:
    """Split images into batches of `batch_size`; with oversampling into whole groups of about as many candidates."""
    if oversample == 1:
        return [list(indices[first : first + batch_size]) for first in range(0, len(indices), batch_size)]
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(group_of(index, cycle, oversample).images[0], []).append(index)
    per_batch = max(1, batch_size // len(group_of(0, cycle, oversample).candidates))
    members = list(groups.values())
    parts = [members[first : first + per_batch] for first in range(0, len(members), per_batch)]
    return [[index for group in part for index in group] for part in parts]


def with_candidates(indices: Sequence[int], cycle: int, oversample: float) -> tuple[list[int], list[Group]]:
    """All candidates of the groups of `indices`, and those groups in that order; without oversampling the images
    themselves and no groups."""
    if oversample == 1:
        return list(indices), []
    groups = {group.images[0]: group for group in (group_of(index, cycle, oversample) for index in indices)}
    return [candidate for group in groups.values() for candidate in group.candidates], list(groups.values())


def selected_rows(nats: Tensor, groups: Sequence[Group]) -> dict[int, int]:
    """Image -> row of the candidate selected for it, from the NLL of all candidates of the groups, in order."""
    found: dict[int, int] = {}
    first = 0
    for group in groups:
        rows = first + most_likely(nats[first : first + len(group.candidates)])
        found |= dict(zip(group.images, rows.tolist(), strict=True))
        first += len(group.candidates)
    return found
