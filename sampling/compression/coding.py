"""Range coding of codes with the probabilities of a prior.

Both sides get the probabilities from the same stepwise decoder, at the same number of rows, each stream on one thread:
a parallel forward pass rounds differently, and one other number makes all that follows another text.
"""

from collections.abc import Callable, Iterator

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqgen.errors import UserError
from vqgen.prior.parts.part import ABSENT
from vqgen.sampling.drawing import Drawer

from .archive import ROWS, Probabilities

# An extension module without stubs.
model, queue = constriction.stream.model, constriction.stream.queue  # pyright: ignore[reportAttributeAccessIssue]
_CATEGORICAL = model.Categorical(perfect=False)
Symbols = NDArray[np.int32]


def rounded(table: Tensor) -> Tensor:
    """Counts of probabilities (n, codes), rounded to 12 bits and at least 1: of K codes, K of the 4,095 + K counts."""
    return (table * 4095).round() + 1


class InvalidStream(Exception):
    """Words that are no stream of the codes that are decoded."""


class Coder:
    """Encodes and decodes windows of codes as tokens (n, length), at most `ROWS` at a time.

    With `histogram` the streams must come in the same order on both sides, as the counts go on from one to the next.
    """

    def __init__(self, drawer: Drawer, probabilities: Probabilities) -> None:
        self.drawer, self.probabilities, self.vocabulary = drawer, probabilities, drawer.vocabulary
        self._counts: dict[int, NDArray[np.float32]] = {}  # of the codes so far at each position, from 1
        self.allowed = [self.vocabulary.allowed(position) for position in range(self.vocabulary.length)]

    @property
    def in_order(self) -> bool:
        """Whether streams depend on those before them."""
        return self.probabilities == "histogram"

    def encode(self, tokens: Tensor) -> NDArray[np.uint32]:
        """The words of a stream for tokens (n, length). Raises `UserError` where the prior's logits are not finite."""
        coder = queue.RangeEncoder()

        def code(position: int, table: NDArray[np.float32]) -> Symbols:
            symbols = (tokens[:, position] - self.allowed[position][0]).numpy().astype(np.int32)
            coder.encode(symbols, _CATEGORICAL, table)
            return symbols

        self._run(len(tokens), code)
        return coder.get_compressed()

    def decode(self, words: NDArray[np.uint32], count: int) -> Tensor:
        """The tokens (count, length) of a stream.

        Raises `InvalidStream` where the words are no stream of these codes, `UserError` as `encode` does.
        """
        coder = queue.RangeDecoder(words)

        def code(_position: int, table: NDArray[np.float32]) -> Symbols:
            try:
                return coder.decode(_CATEGORICAL, table)
            except AssertionError as error:
                raise InvalidStream(str(error)) from error

        return self._run(count, code)

    @torch.inference_mode()
    def _run(self, count: int, code: Callable[[int, NDArray[np.float32]], Symbols]) -> Tensor:
        """Give `code` the probabilities of each position (count, codes), and return the tokens of its symbols."""
        found = torch.zeros(count, len(self.allowed), dtype=torch.long)
        tables = self._histograms if self.probabilities == "histogram" else self._predictions
        for position, table in tables(found):
            found[:, position] = torch.from_numpy(code(position, table).astype(np.int64)) + self.allowed[position][0]
        return found

    def _predictions(self, found: Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The prior's probabilities of each position, given the tokens before it, which `found` has by then."""
        layout, decoder = self.drawer.conditioning.plain, self.drawer.decoder
        fill = torch.arange(ROWS).clamp(max=len(found) - 1)  # always the same number of rows
        conditions = {part.name: [ABSENT] for part in layout.parts}
        decoder.start(ROWS)
        logits = decoder.feed(layout.prefixes(conditions, range(ROWS)), self.allowed[0])
        for position in range(len(self.allowed)):
            if position:
                logits = decoder.feed(found[fill, position - 1][:, None], self.allowed[position])
            table = logits[: len(found)].softmax(-1)
            if not table.isfinite().all():
                raise UserError("the model's logits are not finite; its weights are damaged, restore or replace it")
            if self.probabilities == "rounded":
                table = rounded(table)
            yield position, table.numpy().astype(np.float32)

    def _histograms(self, found: Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The shares of the codes at each position in all streams so far."""
        for position, (first, last) in enumerate(self.allowed):
            counts = self._counts.setdefault(position, np.ones(last - first, np.float32))
            yield position, np.tile(counts, (len(found), 1))
            counts += np.bincount((found[:, position] - first).numpy(), minlength=last - first)
