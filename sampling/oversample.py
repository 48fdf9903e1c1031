"""Oversampling: draw more candidates than images, keep the most likely.

The images of one condition (and one row of known codes) come in groups of `GROUP`. `oversample` times as many
candidates are drawn for a group, and its images are the most likely of them. So an image still depends on its seed,
index and settings alone.
"""

import math
from collections.abc import Sequence
from itertools import chain

from torch import Tensor

GROUP = 16
# Above all indices of images; an image without oversampling and the same image as a candidate share their numbers.
EXTRA = 2**63


def candidates_of(index: int, cycle: int, oversample: float) -> list[int]:
    """Candidates of the group of image `index`, the images of the group first, then further indices.

    `cycle` is the number of images after which conditions and known codes repeat.
    """
    kind, number = index % cycle, index // cycle // GROUP
    images = [(number * GROUP + member) * cycle + kind for member in range(GROUP)]
    more = math.ceil(GROUP * (oversample - 1))
    first = EXTRA - EXTRA % cycle + kind  # the same condition as the images of the group
    return images + [first + (number * more + member) * cycle for member in range(more)]


def batches(indices: Sequence[int], cycle: int, oversample: float, batch_size: int) -> list[list[int]]:
    """Split images into batches of `batch_size`; with oversampling into whole groups of about as many candidates."""
    if oversample == 1:
        return [list(indices[first : first + batch_size]) for first in range(0, len(indices), batch_size)]
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(candidates_of(index, cycle, oversample)[0], []).append(index)
    per_batch = max(1, batch_size // len(candidates_of(0, cycle, oversample)))
    members = list(groups.values())
    return [list(chain(*members[first : first + per_batch])) for first in range(0, len(members), per_batch)]


def with_candidates(indices: Sequence[int], cycle: int, oversample: float) -> tuple[list[int], list[list[int]]]:
    """All candidates of the groups of `indices`, and those of each group; without oversampling the images themselves
    and no groups."""
    if oversample == 1:
        return list(indices), []
    found = (candidates_of(index, cycle, oversample) for index in indices)
    groups = list({group[0]: group for group in found}.values())
    return list(chain(*groups)), groups


def selected_rows(nats: Tensor, groups: Sequence[list[int]]) -> dict[int, int]:
    """Image -> row of the candidate selected for it, from the NLL of all candidates of the groups, in order.

    The `GROUP` candidates of the lowest NLL are selected and given to the images in ascending order.
    """
    found: dict[int, int] = {}
    first = 0
    for group in groups:
        best = nats[first : first + len(group)].argsort(stable=True)[:GROUP].sort().values
        found |= dict(zip(group[:GROUP], (first + best).tolist(), strict=True))
        first += len(group)
    return found
