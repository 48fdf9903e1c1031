"""The parts that a prefix may have, each a kind of conditioning with token ids of its own.

Another kind is a subclass of `Part`, listed in `PART_CLASSES` (`options.py`); `Conditioning` puts the parts of a prior
together.
"""

import difflib
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.prior.options import ObjectiveConfig
from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.codes.loaded import CodeRows

ABSENT = -1
"""The value that leaves a part out, as -1 is the label of an image without a class."""


def is_absent(value: Any) -> bool:
    """Whether a value of a part is `ABSENT`."""
    return isinstance(value, int) and value == ABSENT


@dataclass(frozen=True)
class Rows:
    """Images of code files, from which a part takes its ids in training."""

    files: CodeRows
    indices: np.ndarray
    views: np.ndarray
    codes: Tensor
    """int64 (B, h, w[, depth])."""
    unknown: Tensor | None = None
    """Cells that the source does not tell, bool (B, h, w), where it is the image's own codes; None for none at all."""
    scans: np.ndarray | None = None
    """Scan order of each grid in `codes`, (B,), where they are not all in raster order."""


class Part(ABC):
    """One kind of conditioning: a fixed number of tokens, with token ids of its own."""

    name: ClassVar[str]
    """Key in conditions."""
    option: ClassVar[str] = ""
    """The option that gives its values; by default that of its name."""
    length: int = 1
    """Tokens in the prefix."""
    ids: int
    """Number of own ids; the last one says that the part is absent."""
    first: int
    """The first own id; set by `join`, as is `vocabulary`."""
    vocabulary: Vocabulary
    """Ids of the codes."""
    omissible: bool = False
    """Whether sequences may have no tokens of this part at all: training has sequences of both layouts."""
    dropout: float = 0.0
    """Share of the training sequences without this part, those that lack all of them included
    (`Conditioning.dropped`); at 0 there is no guidance on it."""
    dropout_option: str = ""
    """The option that sets it."""
    guidance: ClassVar[str] = "--guidance-scale"
    """The option of vqgen-sample whose scale guides by this part."""

    @classmethod
    @abstractmethod
    def for_files(cls, files: CodeFiles, options: ObjectiveConfig) -> "Part | None":
        """The part of a prior trained on code files; None where it has none."""

    @classmethod
    @abstractmethod
    def from_description(cls, about: Mapping[str, Any]) -> "Part | None":
        """The inverse of `describe`. Raises `KeyError`, `TypeError` or `ValueError` for a damaged description."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The keys of this part in `vqgen.json`."""

    @abstractmethod
    def of_rows(self, rows: Rows) -> Tensor:
        """Token ids of images in training, (B, length)."""

    @abstractmethod
    def of_value(self, value: Any) -> list[int]:
        """Token ids of one value other than `ABSENT`. Raises `UsageError` for one that the prior does not know."""

    @abstractmethod
    def parse(self, given: Any) -> list[Any]:
        """Values from what was given on the command line or in Python. Raises `UsageError`.

        Values are JSON-able: numbers, strings or lists, not tuples. Values and `ABSENT` are parsed to themselves.
        """

    @classmethod
    def flag(cls) -> str:
        """The option that gives its values, for errors."""
        return cls.option or f"--{cls.name}"

    def files(self) -> dict[str, str]:
        """Further files of the model folder that the part needs: name -> text."""
        return {}

    def read_files(self, folder: Path) -> None:  # noqa: B027
        """Read what `files` gave, in a prior that is loaded. Raises `UserError`."""

    def shares_ids(self, other: "Part") -> bool:
        """Whether the ids of the same part of another prior mean the same."""
        return self.ids == other.ids

    def shared_ids(self, other: "Part") -> list[tuple[slice, slice]]:
        """The ids, own and the other's, that mean the same in the same part of another prior."""
        own, theirs = (slice(part.first, part.first + part.ids) for part in (self, other))
        return [(own, theirs)] if self.shares_ids(other) else []

    def misfit(self, files: CodeFiles) -> str:
        """What code files lack of the part of a trained prior, as "has no …"; empty where they fit."""
        return ""

    def join(self, vocabulary: Vocabulary, first: int) -> None:
        """Take a place in a prior with these codes, with own ids from `first` on."""
        self.vocabulary, self.first = vocabulary, first

    def record(self, values: Sequence[Any]) -> Any:
        """What samples.json holds of the values of a series, JSON-able."""
        return list(values)

    def legend(self) -> str:
        """The meaning of the ids, for the model card."""
        return f"{self.first} to {self.first + self.ids - 1} {self.name}"

    @property
    def note(self) -> str:
        """What the model card says of the part besides, if anything."""
        return ""

    @property
    def informative(self) -> bool:
        """Whether the part ever says anything; the class part of an unconditional prior does not."""
        return self.ids > 1

    @property
    def guidable(self) -> bool:
        """Whether training has sequences in which the part says nothing, so that guidance can compare with these."""
        return self.dropout > 0

    @property
    def required(self) -> bool:
        """Whether every sequence of training says something here, so that none can be drawn without."""
        return self.informative and not self.omissible and not self.guidable

    @property
    def undropped(self) -> str:
        """The option with which training never left the part out, for errors."""
        return f"{self.dropout_option or f'dropout of {self.name}'} 0"

    @property
    def absent(self) -> list[int]:
        """Token ids of the part where it is left out."""
        return [self.first + self.ids - 1] * self.length

    def default(self) -> list[Any]:
        """Values of a series that asks for nothing."""
        return [ABSENT]

    def of_values(self, values: Sequence[Any]) -> Tensor:
        """Token ids (B, length) of values."""
        found = [self.absent if is_absent(value) else self.of_value(value) for value in values]
        return torch.tensor(found, dtype=torch.long).reshape(len(found), self.length)


class Classes(Part):
    """The class of an image: one id a class, then the null id, the start token of an unconditional prior."""

    name = "class"
    dropout_option = "--label-dropout"

    def __init__(
        self, count: int, names: list[str] | None = None, dropout: float = 0.1, unlabelled: bool = False
    ) -> None:
        """`unlabelled`: whether some training images have no class, so that null is learned without dropout, too."""
        self.count, self.names, self.dropout, self.unlabelled, self.ids = count, names, dropout, unlabelled, count + 1

    @classmethod
    def for_files(cls, files: CodeFiles, options: ObjectiveConfig) -> "Classes":
        count = len(files.class_names or [])
        unlabelled = count > 0 and files.unlabelled
        return cls(count, files.class_names, options.label_dropout, unlabelled)

    @classmethod
    def from_description(cls, about: Mapping[str, Any]) -> "Classes":
        count, names, dropout = about["classes"], about["class_names"], about["label_dropout"]
        if type(count) is not int or not 0 <= count <= 2**24:
            raise ValueError("classes has to be a whole number of at most 2^24")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError("label_dropout has to be a share")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names have to be a list of names")
        if names and len(names) != count:
            raise ValueError(f"{len(names)} class_names for {count} classes")
        unlabelled = about.get("unlabelled", False)
        if not isinstance(unlabelled, bool):
            raise ValueError("unlabelled has to be true or false")
        return cls(count, names, dropout, unlabelled)

    def describe(self) -> dict[str, Any]:
        found = {"classes": self.count, "class_names": self.names, "label_dropout": self.dropout}
        return {**found, "unlabelled": True} if self.unlabelled else found

    @property
    def guidable(self) -> bool:
        return self.dropout > 0 or self.unlabelled

    def shared_ids(self, other: Part) -> list[tuple[slice, slice]]:
        if not isinstance(other, Classes):
            return []
        renamed = self.names and other.names and self.names != other.names
        if not renamed and (same := super().shared_ids(other)):
            return same
        places = {name: place for place, name in enumerate(self.names or [])}
        pairs = [(places[name], place) for place, name in enumerate(other.names or []) if name in places]
        pairs += [(self.count, other.count)]  # null, which is no class in both
        firsts = [(self.first + ours, other.first + theirs) for ours, theirs in pairs]
        return [(slice(ours, ours + 1), slice(theirs, theirs + 1)) for ours, theirs in firsts]

    def of_rows(self, rows: Rows) -> Tensor:
        return self.of_labels(torch.from_numpy(rows.files.gather_labels(rows.indices)))[:, None]

    def of_labels(self, labels: Tensor) -> Tensor:
        """Labels (B,), -1 for none -> token ids (B,); null for all where the prior is unconditional."""
        null = self.absent[0]
        return torch.where(labels < 0, null, labels + self.first) if self.count else torch.full_like(labels, null)

    def of_value(self, value: Any) -> list[int]:
        if not 0 <= value < self.count:
            raise UsageError(f"--class: found {value}, but the model has {self.count} classes")
        return [self.first + value]

    def default(self) -> list[int]:
        """Every class in turn."""
        return list(range(self.count)) or [ABSENT]

    def parse(self, given: Any) -> list[int]:
        """Labels of classes by name or index: numbers are indices, words names first."""
        single = isinstance(given, str) or not hasattr(given, "__iter__") or getattr(given, "ndim", 1) == 0
        found: list[int] = []
        for each in [given] if single else given:
            try:
                found += self._find(each) if isinstance(each, str) else [operator.index(each)]
            except TypeError as error:
                raise UsageError(f"--class: found {str(each)[:80]}, expected names or whole numbers") from error
        return found

    def _find(self, word: str) -> list[int]:
        """Labels of a name, an index, or several of them with commas between."""
        if not self.count:
            raise UsageError(f"--class: found {word}, but the model is unconditional; leave --class out")
        names, folded = self.names or [], [name.casefold() for name in self.names or []]
        if word in names:
            return [names.index(word)]
        if folded.count(word.casefold()) == 1:
            return [folded.index(word.casefold())]
        if re.fullmatch(r"-?\d{1,9}", word):
            if not 0 <= int(word) < self.count:
                raise UsageError(f"--class: found {word}, expected an index from 0 to {self.count - 1} or a name")
            return [int(word)]
        if "," in word.strip(","):
            return [label for each in word.split(",") for label in self._find(each.strip())]
        close = difflib.get_close_matches(word.casefold(), folded, n=1)
        hint = f"give an index from 0 to {self.count - 1}"
        if close:
            hint = f"did you mean {names[folded.index(close[0])]!r}?"
        elif names and self.count <= 20:
            hint += f" (the classes are {', '.join(names)})"
        raise UsageError(f"--class: the model knows no class {word[:80]!r}; {hint}")

    def legend(self) -> str:
        null = self.absent[0]
        listed = ", ".join(f"{self.first + label} {name}" for label, name in enumerate(self.names or []))
        classes = f"{self.first} to {null - 1} classes{f' ({listed})' if listed else ''}, " if self.count else ""
        return f"{classes}{null} no class"
