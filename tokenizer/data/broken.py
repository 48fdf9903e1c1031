"""Images that cannot be read: they are named, counted, and end a run where they are too many."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from vqgen.config import one_line
from vqgen.devices import gather_objects, rank_and_world
from vqgen.errors import UserError
from vqgen.seeding import hash64

from .options import ImageConfig

MOST_NAMED = 100_000
"""Broken images of which the name is kept, and printed; of further ones a hash."""
LEAST_SEEN = 1000
"""Where the number of images is not known, the share of broken ones is one of at least so many."""


class BrokenImages:
    """The broken images of one split found so far, and the limit that the configuration sets.

    Args:
        name: of the data.
        total: number of images of all its splits; None where it is not known: then the limit is a share of those seen.
        own: number of images of the split.
        option: what an error names where broken images are errors.
    """

    def __init__(
        self,
        name: str,
        config: ImageConfig,
        total: int | None,
        own: float = math.inf,
        option: str = "--broken error",
    ):
        self.name, self.config, self.total, self.own, self.option = name, config, total, own, option
        self.names: dict[str, None] = {}
        self.further: set[int] = set()
        self.count = self.seen = 0
        self.shared = False  # whether all processes call `exchange`
        self.untold: tuple[list[str], int] = [], 0  # new names, and images seen, that others do not know; where shared
        self.report: Callable[[str], None] | None = None  # called with a line for each broken image

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "report": None}  # a callback of the main process

    @property
    def images(self) -> int:
        """The number that the limit is a share of."""
        return self.total or max(self.seen, LEAST_SEEN)

    @property
    def most(self) -> float:
        """How many may be broken: not all of a split, unless that is said."""
        most = self.config.max_broken * self.images
        return most if self.config.max_broken == 1 else min(most, self.own - 1)

    def add(self, names: Iterable[str], seen: int = 0) -> None:
        """Count the broken images of a batch of `seen` images. Raises `UserError` beyond `max_broken`, or on any with
        --broken error."""
        new = [name for name in names if name not in self.names and hash64(name) not in self.further]
        named = new[: MOST_NAMED - len(self.names)]
        self.names.update(dict.fromkeys(named))
        self.further.update(map(hash64, new[len(named) :]))
        self.count += len(new)
        self.seen += seen
        if self.shared:
            self.untold = [*self.untold[0], *new], self.untold[1] + seen
        if self.report:
            for name in named:
                self.report(one_line(f"skipped, broken: {name}"))
        if new and self.config.broken == "error":
            raise UserError(f"{self.option}: {new[0]}; replace or remove it")
        if new and self.count > self.most:
            found = f"{self.name} has {self.count} broken images, the last {new[-1]}"
            skipped = f"at most {int(self.most)} of {self.images} are skipped"
            raise UserError(f"--max-broken {self.config.max_broken}: {found}; {skipped}, replace or remove them")

    def exchange(self) -> None:
        """Count what other processes found since the last call, too; all of them call this. Raises as `add`."""
        if not self.shared:
            return
        others = gather_objects(self.untold)
        others.pop(rank_and_world()[0])
        names = dict.fromkeys(name for names, _ in others for name in names)
        try:
            self.add(names, sum(seen for _, seen in others))
        finally:
            self.untold = [], 0
