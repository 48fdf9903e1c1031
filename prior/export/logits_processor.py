"""Drawing with transformers' `generate`: the ids that may follow in a sequence of a prior."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vqgen.errors import UserError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import read_conditioning


class CodesOnly(LogitsProcessor):
    """A `LogitsProcessor` that leaves the codes of the next position's depth, and masks all other ids.

    Which position is next follows from the ids: the class, or null, is the last one before the codes. So one object
    serves sequences with and without a source that they may lack, and rows of any batch.
    """

    def __init__(self, conditioning: Conditioning) -> None:
        self.conditioning, self.vocabulary = conditioning, conditioning.vocabulary

    @classmethod
    def from_folder(cls, folder: str | Path) -> "CodesOnly":
        """The processor for the prior in a run folder, a model folder or a folder of vqgen-export; no weights are read.

        Raises `UserError` where the folder does not describe a prior.
        """
        return cls(read_conditioning(Path(folder))[1])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Token ids int64 (B, T) and the logits of the next ones (B, V) -> logits, -inf where an id may not follow.

        Raises `UserError` where a row has no whole prefix, or all codes of its image already.
        """
        drawn = (input_ids >= self.vocabulary.size).flip(1).int().argmax(1)  # codes after the class
        self._check(input_ids, drawn)
        start = drawn % self.vocabulary.depth * self.vocabulary.codebook_size
        ids = torch.arange(scores.shape[1], device=scores.device)
        allowed = (ids >= start[:, None]) & (ids < start[:, None] + self.vocabulary.codebook_size)
        return scores.masked_fill(~allowed, -torch.inf)

    def _check(self, input_ids: Tensor, drawn: Tensor) -> None:
        """Raise `UserError` for sequences after which no code can be drawn; `drawn` (B,) are the codes in each."""
        classes, length = self.conditioning.classes, input_ids.shape[1]
        last = input_ids.gather(1, (length - 1 - drawn)[:, None])
        known = (last >= classes.first) & (last < classes.first + classes.ids)
        lengths = sorted({self.conditioning.plain.length, self.conditioning.length})
        if not known.all() or not torch.isin(length - drawn, torch.tensor(lengths, device=drawn.device)).all():
            parts = ", ".join(f"{part.name} ({part.length})" for part in self.conditioning.parts)
            wanted = f"{' or '.join(map(str, lengths))} ids: {parts}; of the class {classes.legend()}"
            raise UserError(f"input_ids: a row has no prefix of {wanted}")
        if int(drawn.max()) >= self.vocabulary.length:
            most = self.vocabulary.length
            raise UserError(
                f"input_ids: a row has {int(drawn.max())} codes, an image has {most}; max_new_tokens={most}"
            )
