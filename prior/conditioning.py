"""What a sequence is conditioned on: the tokens in front of the codes, called the prefix.

A prefix has parts of fixed length in the order of `PARTS`: `[scan][text][source][class or null][codes]`. A prior may
lack any part but the class, and sequences may lack a part that is `omissible`. Token ids are assigned from the last
part to the first, so that those of the class follow the codes whatever else there is.
"""

import copy
import math
import pkgutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen.errors import UsageError, UserError
from vqgen.files import read_text, write_text
from vqgen.tokenizer.codes.format import CodeFiles

from .options import PART_CLASSES, ObjectiveConfig
from .parts.part import ABSENT, Classes, Part, Rows, is_absent
from .parts.scan import Scan
from .parts.source import MaskedSource, PairedSource, Source
from .parts.text import Text
from .vocabulary import Vocabulary

PARTS: list[type[Part]] = [pkgutil.resolve_name(name) for name in PART_CLASSES]
"""Every kind of conditioning, in the order of the sequence; the class is the last."""

Conditions = Mapping[str, Sequence[Any]]
"""Name of a part -> the values that the images of a series have in turn: image i has value i % len."""


class Values(dict[str, list[Any]]):
    """Values of every part of a series, parsed and checked, with their token ids: a series is drawn batch by batch."""

    def __init__(self, values: Mapping[str, list[Any]], parts: Sequence[Part]) -> None:
        """Encode values of every part. Raises `UsageError` for values that the model does not know."""
        super().__init__(values)
        self.parts = list(parts)
        self.ids = {part.name: part.of_values(self[part.name]) for part in parts}

    def having(self, values: Mapping[str, list[Any]]) -> "Values":
        """The same with other values of some parts."""
        found = copy.copy(self)
        found.update(values)
        found.ids = self.ids | {
            part.name: part.of_values(found[part.name]) for part in self.parts if part.name in values
        }
        return found

    def crossed(self, outer: str, inner: str) -> "Values":
        """The same with every value of one part with every one of another, which changes first."""
        count, times = len(self[outer]), len(self[inner])
        rows = {outer: [row for row in range(count) for _ in range(times)], inner: [*range(times)] * count}
        found = copy.copy(self)
        found.update({name: [self[name][row] for row in places] for name, places in rows.items()})
        found.ids = self.ids | {name: self.ids[name][places] for name, places in rows.items()}
        return found


class Conditioning:
    """The parts of a prior's prefix over its vocabulary of codes: lengths, token ids and requests."""

    def __init__(self, vocabulary: Vocabulary, parts: Iterable[Part | None]) -> None:
        self.vocabulary, self.parts = vocabulary, [part for part in parts if part is not None]
        self.size = vocabulary.size
        """Number of all token ids, those of the codes included."""
        for part in reversed(self.parts):
            part.join(vocabulary, self.size)
            self.size += part.ids

    @property
    def length(self) -> int:
        """Tokens in the prefix."""
        return sum(part.length for part in self.parts)

    @property
    def plain(self) -> "Conditioning":
        """The layout without the parts that may be missing; token ids are the same."""
        layout = copy.copy(self)
        layout.parts = [part for part in self.parts if not part.omissible]
        return layout

    def layout(self, conditions: Conditions) -> "Conditioning":
        """The layout of sequences with these conditions: parts that may be missing are, where they have no values."""
        layout = copy.copy(self)
        given = {name for name, values in conditions.items() if any(not is_absent(value) for value in values)}
        layout.parts = [part for part in self.parts if part.name in given or not part.omissible]
        return layout

    @classmethod
    def for_files(
        cls, files: CodeFiles, options: ObjectiveConfig | None = None, order: str = "raster"
    ) -> "Conditioning":
        """The conditioning of a prior trained on code files."""
        vocabulary = Vocabulary(files.codebook_size, files.depth, files.grid, order)
        return cls(vocabulary, [kind.for_files(files, options or ObjectiveConfig()) for kind in PARTS])

    @classmethod
    def from_description(cls, vocabulary: Vocabulary, about: Mapping[str, Any]) -> "Conditioning":
        """The inverse of `describe`; `read_files` is still to be called."""
        return cls(vocabulary, [kind.from_description(about) for kind in PARTS])

    def describe(self) -> dict[str, Any]:
        """The keys of the conditioning in `vqgen.json`."""
        return {key: value for part in self.parts for key, value in part.describe().items()}

    def write_files(self, folder: Path) -> None:
        """Write the files that the parts need besides the description to a model folder."""
        for part in self.parts:
            for name, text in part.files().items():
                write_text(folder / name, text)

    def check_files(self, folder: Path) -> None:
        """Raise `UserError` where a folder has other files than `write_files` would write, e.g. of a run that began."""
        for part in self.parts:
            for name, text in part.files().items():
                if read_text(folder / name) != text:
                    text = "was made from other captions of --codes or by another version of tokenizers"
                    raise UserError(f"{folder / name} {text}; restore these, or start anew with --overwrite")

    def read_files(self, folder: Path) -> None:
        """Read what `write_files` wrote. Raises `UserError` where a file is missing, damaged or of another prior."""
        for part in self.parts:
            part.read_files(folder)

    @property
    def classes(self) -> Classes:
        """The class part, which every prior has."""
        return next(part for part in self.parts if isinstance(part, Classes))

    @property
    def scan(self) -> Scan | None:
        """The part of a prior that was trained on other scan orders, too."""
        return next((part for part in self.parts if isinstance(part, Scan)), None)

    @property
    def text(self) -> Text | None:
        """The part of a prior that was trained on captions."""
        return next((part for part in self.parts if isinstance(part, Text)), None)

    @property
    def masked_source(self) -> Source | None:
        """The source part of a prior that was trained to fill in images."""
        return next((part for part in self.parts if isinstance(part, Source) and part.inpainting), None)

    @property
    def paired_source(self) -> PairedSource | None:
        """The source part of a prior that was trained to translate images."""
        return next((part for part in self.parts if isinstance(part, PairedSource)), None)

    @property
    def null(self) -> int:
        """The id of no class, which is also the start and padding token of the backbone."""
        return self.classes.absent[0]

    def common_ids(self, other: "Conditioning") -> list[tuple[slice, slice]]:
        """The token ids that two priors of the same codes share: own and the other's, of codes and of parts."""
        shared = [(slice(self.vocabulary.size), slice(self.vocabulary.size))]
        theirs = {part.name: part for part in other.parts}
        for part in self.parts:
            if part.name in theirs:
                shared += part.shared_ids(theirs[part.name])
        return shared

    # Sequences (B, length + codes) = prefix, then code tokens.

    def split(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Prefixes (B, length) and code tokens (B, T - length) of sequences (B, T)."""
        return sequences[:, : self.length], sequences[:, self.length :]

    def of_codes(self, logits: Tensor) -> Tensor:
        """Logits (B, T, V) after each token of sequences less their last code -> those that predict codes."""
        return logits[:, self.length - 1 :]

    def part(self, sequences: Tensor, name: str) -> Tensor:
        """Token ids (B, length of the part) of one part."""
        return next(ids for part, ids in self._by_part(sequences) if part.name == name)

    def _by_part(self, sequences: Tensor) -> Iterable[tuple[Part, Tensor]]:
        ids = sequences[:, : self.length].split([part.length for part in self.parts], 1)
        return zip(self.parts, ids, strict=True)

    def of_rows(self, rows: Rows) -> Tensor:
        """Prefixes (B, length) of images in training."""
        return torch.cat([part.of_rows(rows) for part in self.parts], 1)

    def dropped(self, sequences: Tensor) -> Tensor:
        """Sequences in which each part is absent in a random share of the rows, its `dropout`.

        In half of the smallest of these shares all such parts are absent together, as in guidance by several at once,
        which compares with sequences without any; in the other rows they are drawn apart.
        """
        rows, device = len(sequences), sequences.device
        shares = [part.dropout for part in self.parts if part.dropout]
        joint = min(shares) / 2 if len(shares) > 1 else 0.0
        chosen = {
            part.name: torch.rand(rows, device=device) < (part.dropout - joint) / (1 - joint) for part in self.parts
        }
        if joint:
            together = torch.rand(rows, device=device) < joint
            chosen = {part.name: chosen[part.name] | (together & (part.dropout > 0)) for part in self.parts}
        prefix = [
            torch.where(chosen[part.name][:, None], ids.new_full((), part.absent[0]), ids)
            for part, ids in self._by_part(sequences)
        ]
        return torch.cat([*prefix, self.split(sequences)[1]], 1)

    def without(self, sequences: Tensor, parts: Collection[Part] | None = None) -> Tensor:
        """Sequences with some parts absent, by default all that training has sequences without, but for the image that
        is filled in: guidance compares with these."""
        if parts is None:
            conditions = [part for part in self.parts if not isinstance(part, MaskedSource)]
            parts = [part for part in conditions if part.guidable or not part.informative]
        prefix = [
            torch.full_like(ids, part.absent[0]) if part in parts else ids for part, ids in self._by_part(sequences)
        ]
        return torch.cat([*prefix, self.split(sequences)[1]], 1)

    def conditions(self, given: Mapping[str, Any] | None = None, absent: bool = False) -> Values:
        """The values of every part from those given by name, parsed or not. Raises `UsageError`.

        Where nothing is given, or None for each, the parts have their default values, or none where `absent` is set;
        otherwise those that are not given have none.
        """
        if isinstance(given, Values) and given.parts == self.parts:
            return given
        given = {name: values for name, values in (given or {}).items() if values is not None}
        flags = {kind.name: kind.flag() for kind in PARTS}
        for name in given:
            if name not in [part.name for part in self.parts]:
                raise UsageError(f"{flags.get(name, f'--{name}')}: the model has no such condition; leave it out")
        found: dict[str, list[Any]] = {}
        for part in self.parts:
            default = [ABSENT] if absent or given else part.default()
            values = found[part.name] = part.parse(given[part.name]) if part.name in given else default
            if not values:
                raise UsageError(f"{part.flag()}: found no values; give at least one, or leave it out")
        return Values(found, self.parts)

    def record(self, conditions: Conditions) -> dict[str, Any]:
        """What samples.json holds of the conditions besides the classes; parts that are omitted are not in it."""
        layout = self.layout(conditions)
        return {
            part.name: part.record(conditions[part.name])
            for part in layout.parts
            if part.informative and part.name != "class"
        }

    @staticmethod
    def cycle(conditions: Conditions) -> int:
        """Number of images after which the conditions of a series repeat."""
        return math.lcm(*(len(values) for values in conditions.values()))

    def prefixes(
        self, conditions: Conditions, indices: Sequence[int], given: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Prefixes (B, length) of images of a series; `conditions` has every part but those with ids that are `given`,
        (B, length of the part)."""
        ids = dict(given or {})
        for part in self.parts:
            if part.name not in ids:
                values = conditions[part.name]
                rows = [i % len(values) for i in indices]
                encoded = conditions.ids[part.name] if isinstance(conditions, Values) else part.of_values(values)
                ids[part.name] = encoded[rows]
        return torch.cat([ids[part.name] for part in self.parts], 1)

    def check_absence(self, option: str, conditions: Conditions | None = None, guidance: str | None = None) -> None:
        """Raise `UsageError`, beginning with `option`, where absent conditions change nothing or were not learned.

        With `guidance`, the option of a scale, only the parts that it guides count, and of `conditions` those given.
        """
        informative = [part for part in self.parts if part.informative and guidance in (None, part.guidance)]
        if not informative:
            kind = (
                "has no condition of that kind" if any(part.informative for part in self.parts) else "is unconditional"
            )
            raise UsageError(f"{option} the model {kind}; leave it at its default")
        given = [p for p in informative if conditions is None or not all(map(is_absent, conditions[p.name]))]
        if not given:
            options = ", ".join(part.flag() for part in informative)
            raise UsageError(f"{option} these images have no condition to be guided to; name some with {options}")
        if not any(part.guidable for part in given):
            trained = f"the prior was trained with {', '.join(part.undropped for part in given)}"
            raise UsageError(f"{option} {trained}, always with its condition; leave it at its default")

    def check_given(
        self, conditions: Conditions, option: str | None = None, hint: str = "give one to each image"
    ) -> None:
        """Raise `UsageError` where images lack a part that all sequences of training have; it begins with `option`, by
        default that of the part, and ends with `hint`."""
        for part in self.parts:
            if part.required and any(map(is_absent, conditions[part.name])):
                trained = f"the prior was trained with {part.undropped}, always with its condition"
                raise UsageError(f"{option or f'{part.flag()}:'} {trained}; {hint}")

    @property
    def group_names(self) -> list[str]:
        """Names of the groups whose likelihood is reported separately: the classes, then images without one."""
        names = [*(self.classes.names or map(str, range(self.classes.count)))]
        return [*names, "no class (unlabelled)" if "no class" in names else "no class"]

    def groups(self, sequences: Tensor) -> Tensor:
        """Group (B,) of each sequence, as an index into `group_names`."""
        return self.part(sequences, "class")[:, 0] - self.classes.first
