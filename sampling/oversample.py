"""More images drawn than are kept: which are candidates for which place, and which stay.

The images of one class (and one given beginning) come in groups of `GROUP`. A group is drawn with as many more as
`oversample` says, and its places go to the likeliest. So an image still depends on its seed, index and settings alone.
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
    """The places of one group and its candidates, both as indices of images; candidates[:GROUP] are the places."""

    places: list[int]
    candidates: list[int]


def group_of(index: int, cycle: int, oversample: float) -> Group:
    """The group of image `index` where classes (and given images) come round every `cycle` images."""
    kind, number = index % cycle, index // cycle // GROUP
    places = [(number * GROUP + member) * cycle + kind for member in range(GROUP)]
    more = math.ceil(GROUP * (oversample - 1))
    first = EXTRA - EXTRA % cycle + kind  # of the same class as the places, going round
    extra = [first + (number * more + member) * cycle for member in range(more)]
    return Group(places, places + extra)


def likeliest(nats: Tensor) -> Tensor:
    """The `GROUP` candidates of the fewest nats, in the order they have: nats (candidates,) -> indices (GROUP,)."""
    return nats.argsort(stable=True)[:GROUP].sort().values


def batches(indices: Sequence[int], cycle: int, oversample: float, batch_size: int) -> list[list[int]]:
    """Images to draw together: `batch_size` neighbours, or where there are candidates whole groups of about as many."""
    if oversample == 1:
        return [list(indices[first : first + batch_size]) for first in range(0, len(indices), batch_size)]
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(group_of(index, cycle, oversample).places[0], []).append(index)
    together = max(1, batch_size // len(group_of(0, cycle, oversample).candidates))
    each = list(groups.values())
    parts = [each[first : first + together] for first in range(0, len(each), together)]
    return [[index for group in part for index in group] for part in parts]


def selected(indices: Sequence[int], cycle: int, oversample: float) -> tuple[list[int], list[Group]]:
    """All candidates of the groups that `indices` belong to, and the groups, in that order; without oversampling the
    images themselves, and no groups."""
    if oversample == 1:
        return list(indices), []
    groups = {group.places[0]: group for group in (group_of(index, cycle, oversample) for index in indices)}
    return [candidate for group in groups.values() for candidate in group.candidates], list(groups.values())


def places(nats: Tensor, groups: Sequence[Group]) -> dict[int, int]:
    """For every place of the groups the row that stays there, of the candidates' nats (all candidates,)."""
    found: dict[int, int] = {}
    first = 0
    for group in groups:
        rows = first + likeliest(nats[first : first + len(group.candidates)])
        found |= dict(zip(group.places, rows.tolist(), strict=True))
        first += len(group.candidates)
    return found
