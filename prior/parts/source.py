"""The source of an image: codes of another image, or its own with unknown cells, in front of the sequence.

Inpainting is a source of the image's own codes (Bavarian et al. 2022 move the context of a hole in front of it, for
text): `[s_0 ... s_N-1][class][x_0 ... x_N-1]`, where s_i is x_i or `unknown`. Translation is a source of the codes of
another image, that of the same scene degraded or in another style.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqgen.errors import UsageError, UserError
from vqgen.files.read import as_record
from vqgen.prior.options import ObjectiveConfig
from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.codes.degrade import Keep, alternatives, chain_among, keep_of
from vqgen.tokenizer.codes.format import CodeFiles, SourceRecord

from .part import Part, Rows, is_absent
from .scan import scanned

UNKNOWN = -1
"""The code of an unknown cell."""
KNOWN = "where a code is known, allow that one alone"
"""What the model card says of the codes around a hole."""
ALL_UNKNOWN = 0.1
"""Share of the masked sequences in training that know nothing of their source."""


def random_masks(count: int, grid: tuple[int, int], random: np.random.Generator) -> Tensor:
    """Masks of unknown cells for training, bool (count, h, w), at least one cell each.

    A tenth is all unknown. Half of the others are a random share of the cells, drawn evenly from 0 to 1, and half a
    rectangle of random sides and place.
    """
    height, width = grid
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        kind = random.random()
        if kind < ALL_UNKNOWN:
            mask[:] = True
        elif kind < (1 + ALL_UNKNOWN) / 2:
            mask[:] = random.random((height, width)) < random.random()
        else:
            rows, columns = random.integers(1, height + 1), random.integers(1, width + 1)
            top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
            mask[top : top + rows, left : left + columns] = True
        if not mask.any():
            mask[random.integers(height), random.integers(width)] = True
    return torch.from_numpy(masks)


class Source(Part):
    """Codes of a source image in drawing order, under the ids of the codes; one further id is `unknown`."""

    name, ids, option = "source", 1, "--source-image"
    guidance = "--source-guidance-scale"
    inpainting: float = 0.0
    """Share of the training steps whose sources are the images' own codes, some of them unknown."""

    def join(self, vocabulary: Vocabulary, first: int) -> None:
        super().join(vocabulary, first)
        self.length = self.vocabulary.length

    @property
    def informative(self) -> bool:
        return True

    def of_codes(self, codes: Tensor) -> Tensor:
        """Token ids (B, length) of codes int64 (B, h, w[, depth]), `UNKNOWN` where a cell is unknown."""
        unknown = self.vocabulary.to_sequence(codes) < 0
        return torch.where(unknown, self.absent[0], self.vocabulary.to_tokens(codes))

    def of_value(self, value: Any) -> list[int]:
        return self.of_values([value])[0].tolist()

    def of_values(self, values: Sequence[Any]) -> Tensor:
        # All at once: a series has as many sources as images.
        ids = torch.tensor(self.absent).repeat(len(values), 1)
        given = [row for row, value in enumerate(values) if not is_absent(value)]
        codes = [torch.as_tensor(values[row]) for row in given]
        wanted = f"expected codes {self.vocabulary.shape} below {self.vocabulary.codebook_size}, {UNKNOWN} for unknown"
        for each in codes:
            if each.shape != torch.Size(self.vocabulary.shape) or each.is_floating_point():
                raise UsageError(f"source: found {each.dtype} {tuple(each.shape)}, {wanted}")
        if codes:
            stacked = torch.stack([each.long() for each in codes])
            for found in (int(stacked.min()), int(stacked.max())):
                if not UNKNOWN <= found < self.vocabulary.codebook_size:
                    raise UsageError(f"source: found {found}, {wanted}")
            ids[given] = self.of_codes(stacked)
        return ids

    def parse(self, given: Any) -> list[Any]:
        if isinstance(given, Tensor):
            return list(given)
        if is_absent(given):
            return [given]
        return [each if is_absent(each) else torch.as_tensor(each) for each in given]

    def record(self, values: Sequence[Any]) -> Any:
        digest = hashlib.sha256()
        for value in values:
            digest.update(torch.as_tensor(value, dtype=torch.long).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def legend(self) -> str:
        return f"{self.first} an unknown code of the source"


class MaskedSource(Source):
    """The image's own codes, some of them unknown, in a share of the training steps; the others have no source."""

    omissible = True

    def __init__(self, inpainting: float) -> None:
        self.inpainting = inpainting

    @classmethod
    def for_files(cls, files: CodeFiles, options: ObjectiveConfig) -> "MaskedSource | None":
        return cls(options.inpainting) if options.inpainting and not files.source else None

    @classmethod
    def from_description(cls, about: Mapping[str, Any]) -> "MaskedSource | None":
        return None if "inpainting" not in about or "source" in about else cls(_inpainting_of(about))

    @property
    def guidable(self) -> bool:
        return True  # a tenth of the sources are all unknown

    def describe(self) -> dict[str, Any]:
        return {"inpainting": self.inpainting}

    def of_rows(self, rows: Rows) -> Tensor:
        if rows.unknown is None:
            return torch.tensor(self.absent).expand(len(rows.codes), -1)
        return self.of_codes(masked(rows.codes, rows.unknown))

    @property
    def note(self) -> str:
        return (
            f"To fill in an image, put its own {self.length} codes right before the last id of the prefix, "
            f"{self.first} where one is unknown, and generate as before; {KNOWN}."
        )


class PairedSource(Source):
    """Codes of another image, degraded or paired: every sequence has them, all `unknown` where the source is absent.

    In the share `inpainting` of the training steps the image's own codes take their place, as in `MaskedSource`.
    """

    dropout_option = "--source-dropout"

    def __init__(self, about: SourceRecord, dropout: float = 0.1, inpainting: float = 0.0) -> None:
        self.about, self.dropout, self.inpainting = about, dropout, inpainting

    def join(self, vocabulary: Vocabulary, first: int) -> None:
        rows, columns = self.about.grid
        super().join(dataclasses.replace(vocabulary, grid=(rows, columns)), first)

    def keep(self, degraded_by: Sequence[str] | None = None) -> Keep | None:
        """How drawn images get what their sources show as it was; None where that is nothing, as of pairs.

        A prior that was trained on several chains needs to be told by which of them the sources were degraded. Raises
        `UsageError` for what is no degradation.
        """
        chains = alternatives(self.about.degradations)
        named = chain_among(degraded_by, chains) if degraded_by else []
        return keep_of(chains[0] if len(chains) == 1 else named)

    @classmethod
    def for_files(cls, files: CodeFiles, options: ObjectiveConfig) -> "PairedSource | None":
        if files.source:
            if options.inpainting and tuple(files.source.grid) != tuple(files.grid):
                grids = f"{files.source.grid} codes, the images {list(files.grid)}"
                text = f"found {options.inpainting:g}, but the sources in {files.folder} have {grids}"
                raise UsageError(f"--inpainting: {text}; leave it out, or tokenize sources of the size of the images")
            return cls(files.source, options.source_dropout, options.inpainting)
        if options.source_dropout != ObjectiveConfig().source_dropout:
            found = f"found {options.source_dropout:g}, but {files.folder} has no source codes"
            raise UsageError(f"--source-dropout: {found}; leave it out, or tokenize with --source")
        return None

    @classmethod
    def from_description(cls, about: Mapping[str, Any]) -> "PairedSource | None":
        if "source" not in about:
            return None
        found = dict(about["source"])
        dropout = found.pop("dropout")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError("the dropout of source has to be a share")
        if unknown := found.keys() - {field.name for field in dataclasses.fields(SourceRecord)}:
            raise ValueError(f"source has {sorted(unknown)}, which this installation does not know")
        try:
            record = as_record(Path("source"), found, SourceRecord)
        except UserError as error:
            raise ValueError(str(error)) from error
        return cls(record, dropout, _inpainting_of(about) if "inpainting" in about else 0.0)

    @property
    def guidable(self) -> bool:
        return self.dropout > 0 or self.inpainting > 0

    def describe(self) -> dict[str, Any]:
        found = {"source": {**dataclasses.asdict(self.about), "dropout": self.dropout}}
        return {**found, "inpainting": self.inpainting} if self.inpainting else found

    def misfit(self, files: CodeFiles) -> str:
        if not files.source:
            return "has no source codes, the prior was trained with some"
        (kind, *grid), own = ((about.kind, *about.grid) for about in (files.source, self.about))
        if (kind, *grid) != own:
            return f"has {kind} sources of {grid} codes, the prior was trained with {own[0]} ones of {list(own[1:])}"
        return ""

    def of_rows(self, rows: Rows) -> Tensor:
        if rows.unknown is not None:
            return self.of_codes(masked(rows.codes, rows.unknown))
        if not rows.files.has_source:
            return torch.tensor(self.absent).expand(len(rows.codes), -1)
        codes = rows.files.gather_source(rows.indices, rows.views)
        return self.of_codes(codes if rows.scans is None else scanned(codes, rows.scans))

    @property
    def note(self) -> str:
        made = " ".join(self.about.degradations) or self.about.description
        filling = f" To fill in an image, put its own there, {self.first} where one is unknown; {KNOWN}."
        return (
            f"The {self.length} ids before the last one of the prefix are the codes of a source image ({made}), "
            f"in the order of generation, or all {self.first} for none. To translate an image, put its codes there."
            f"{filling * bool(self.inpainting)}"
        )


def _inpainting_of(about: Mapping[str, Any]) -> float:
    """The share of masked steps in a description. Raises `ValueError`."""
    share = about["inpainting"]
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError("inpainting has to be a share between 0 and 1")
    return share


def masked(codes: Tensor, unknown: Tensor) -> Tensor:
    """Codes (B, h, w[, depth]) with `UNKNOWN` at the cells of a mask, bool (B, h, w)."""
    return codes.masked_fill(unknown[..., None].expand_as(codes) if codes.ndim == 4 else unknown, UNKNOWN)
