"""The text of an image: its caption as tokens of a byte-level BPE, in front of the sequence.

The BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019) is trained on the captions of the training images. Text
has a fixed length, filled up with null on the left, so that its end stands next to what follows.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval, Len
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from vqgen.errors import UsageError, UserError
from vqgen.files import as_record, parse_json, read_text
from vqgen.prior.options import MAX_TEXT_IDS, MAX_TEXT_LENGTH, ObjectiveConfig
from vqgen.tokenizer.codes.format import CodeFiles

from .part import ABSENT, Part, Rows, is_absent

FILE = "text_tokenizer.json"
MAX_FILE = 2**22
"""Largest `text_tokenizer.json`, in bytes; one of 4,096 ids has about 2^18."""
USUAL_LENGTH, WHOLE = 64, 0.99
"""By default a prior reads the fewest tokens that hold this share of the training captions whole, at most so many."""
_CHUNK = 10_000  # captions read at once


@dataclass(frozen=True)
class _Model:
    vocab: Annotated[dict[str, Annotated[int, Interval(ge=0, lt=MAX_TEXT_IDS)]], Len(1, MAX_TEXT_IDS)]
    merges: Annotated[list[tuple[str, str]], Len(0, MAX_TEXT_IDS)]


@dataclass(frozen=True)
class _File:
    """What is read of `text_tokenizer.json`; all else is the same for every prior, and is written for other readers."""

    model: _Model


class TextTokenizer:
    """Byte-level BPE of captions. Upper and lower case are one, and so are composed and decomposed letters."""

    def __init__(self, model: models.BPE) -> None:
        self.bpe = Tokenizer(model)
        self.bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        self.bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        self.bpe.decoder = decoders.ByteLevel()

    @classmethod
    def trained(cls, captions: Iterable[str], most: int) -> "TextTokenizer":
        """Train on captions: the 256 bytes and the most frequent merges, `most` ids at most; always the same ones."""
        found = cls(models.BPE())
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=most, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
        found.bpe.train_from_iterator(captions, trainer)
        return found

    @classmethod
    def read(cls, path: Path) -> "TextTokenizer":
        """Read `text_tokenizer.json`: vocabulary and merges, checked. Raises `UserError`."""
        try:
            model = as_record(path, parse_json(read_text(path, MAX_FILE)), _File).model
            missing = set(pre_tokenizers.ByteLevel.alphabet()) - model.vocab.keys()
            if missing or sorted(model.vocab.values()) != list(range(len(model.vocab))):
                raise ValueError("the vocabulary is not one id after another with all bytes among them")
            return cls(models.BPE(model.vocab, model.merges))
        except UserError:
            raise
        except Exception as error:  # tokenizers raises plain exceptions
            text = f"is no byte-level BPE ({' '.join(str(error).split())[:150]})"
            raise UserError(f"{path} {text}; restore it") from error

    @property
    def text(self) -> str:
        """Content of `text_tokenizer.json`, as `tokenizers` reads it."""
        return self.bpe.to_str()

    @property
    def fingerprint(self) -> str:
        """sha256 of vocabulary and merges, whatever version of `tokenizers` wrote them."""
        model = parse_json(self.text)["model"]
        return hashlib.sha256(repr((sorted(model["vocab"].items()), model["merges"])).encode()).hexdigest()

    def __len__(self) -> int:
        return self.bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, from 0 on."""
        # Composed by Python first: its tables of Unicode have marks that those of the library lack.
        return self.bpe.encode(unicodedata.normalize("NFC", text)).ids

    def rest(self, text: str, length: int) -> str:
        """What of a text comes after its first `length` tokens."""
        text = unicodedata.normalize("NFC", text)  # as `encode` does
        offsets = self.bpe.encode(text).offsets
        return text[offsets[length][0] :].strip() if len(offsets) > length else ""


def captions_of(files: CodeFiles) -> Iterator[str]:
    """The captions of all images that have one."""
    for start in range(0, len(files), _CHUNK):
        yield from filter(None, files.captions(np.arange(start, min(start + _CHUNK, len(files)))))


def usual_length(tokenizer: TextTokenizer, captions: Mapping[str, int]) -> int:
    """The fewest tokens that hold `WHOLE` of the captions, at most `USUAL_LENGTH`; `captions` has the count of each."""
    counts = np.zeros(USUAL_LENGTH + 1, dtype=np.int64)
    for caption, count in captions.items():
        counts[min(len(tokenizer.encode(caption)), USUAL_LENGTH)] += count
    return max(1, int(np.argmax(counts.cumsum() >= WHOLE * counts.sum())))


@dataclass(frozen=True)
class _About:
    """The key `text` of `vqgen.json`."""

    length: int
    ids: int
    dropout: float
    fingerprint: str
    uncaptioned: bool | None = None
    """Whether some training images have no caption, so that its absence is learned without dropout, too; None in
    folders of earlier versions, which do not say."""

    def __post_init__(self) -> None:
        for name, kind, least, most in (
            ("length", (int,), 1, MAX_TEXT_LENGTH),
            ("ids", (int,), 257, MAX_TEXT_IDS + 1),
            ("dropout", (int, float), 0, 1),
        ):
            value = getattr(self, name)
            if type(value) not in kind or not least <= value <= most:
                raise ValueError(f"{name} of text is {value!r}, expected {least} to {most}")
        if not isinstance(self.fingerprint, str):
            raise ValueError("fingerprint of text has to be text")
        if self.uncaptioned is not None and not isinstance(self.uncaptioned, bool):
            raise ValueError("uncaptioned of text has to be true or false")


class Text(Part):
    """The caption of an image: its first `length` tokens, null on the left where it has fewer; all null for none."""

    name, option, dropout_option = "text", "--prompt", "--text-dropout"
    tokenizer: TextTokenizer
    """Set by `read_files` in a prior that is loaded."""

    def __init__(self, about: _About) -> None:
        self.about, self.length, self.ids, self.dropout = about, about.length, about.ids, about.dropout

    @classmethod
    def for_files(cls, files: CodeFiles, options: ObjectiveConfig) -> "Text | None":
        wanted = options.text_length
        if not files.has_captions and wanted:
            text = f"{files.folder} has no captions; tokenize with --text-column, or leave the option out"
            raise UsageError(f"--text-length: {text}")
        if not files.has_captions or wanted == 0:
            return None
        captions = Counter(captions_of(files))
        if not captions:
            text = f"all captions of {files.split} are empty; give --text-length 0 to train without text"
            raise UserError(f"{files.folder}: {text}")
        tokenizer = TextTokenizer.trained(captions.elements(), options.text_vocabulary)
        length = wanted or usual_length(tokenizer, captions)
        uncaptioned = captions.total() < len(files)
        part = cls(_About(length, len(tokenizer) + 1, options.text_dropout, tokenizer.fingerprint, uncaptioned))
        part.tokenizer = tokenizer
        return part

    @classmethod
    def from_description(cls, about: Mapping[str, Any]) -> "Text | None":
        return cls(_About(**about["text"])) if "text" in about else None

    def describe(self) -> dict[str, Any]:
        return {"text": {name: value for name, value in asdict(self.about).items() if value is not None}}

    @property
    def guidable(self) -> bool:
        return self.dropout > 0 or self.about.uncaptioned is True

    @property
    def required(self) -> bool:
        return super().required and self.about.uncaptioned is not None

    def files(self) -> dict[str, str]:
        return {FILE: self.tokenizer.text}

    def read_files(self, folder: Path) -> None:
        self.tokenizer = TextTokenizer.read(folder / FILE)
        if (found := self.tokenizer.fingerprint) != self.about.fingerprint or len(self.tokenizer) != self.ids - 1:
            text = f"has fingerprint {found[:12]}, the prior needs {self.about.fingerprint[:12]}"
            raise UserError(f"{folder / FILE} {text}; restore it")

    def shares_ids(self, other: Part) -> bool:
        return isinstance(other, Text) and other.about.fingerprint == self.about.fingerprint

    def of_text(self, text: str) -> list[int]:
        """Token ids of a text, cut to the length."""
        ids = [self.first + each for each in self.tokenizer.encode(text)[: self.length]]
        return self.absent[len(ids) :] + ids

    def readable(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that are read whole; where there are none, the beginnings that are read."""
        if whole := [text for text in texts if not self.tokenizer.rest(text, self.length)]:
            return whole
        found = []
        for text in texts:
            while rest := self.tokenizer.rest(text, self.length):  # more than once where a letter has several tokens
                text = text.rstrip()[: -len(rest)].rstrip()
            found.append(text)
        return found

    def of_rows(self, rows: Rows) -> Tensor:
        if not rows.files.has_captions:
            return torch.tensor(self.absent).expand(len(rows.indices), -1)
        captions = rows.files.captions(rows.indices)
        return torch.tensor([self.of_text(caption) for caption in captions]).reshape(len(captions), self.length)

    def of_value(self, value: Any) -> list[int]:
        if rest := self.tokenizer.rest(value, self.length):
            found = f"{value[:80]!r} is longer than the {self.length} tokens that the prior reads"
            hint = "words that the captions do not have take several"
            raise UsageError(f"--prompt: {found} ({hint}); shorten it, for example by its end, {rest[:80]!r}")
        return self.of_text(value)

    def parse(self, given: Any) -> list[Any]:
        """Prompts with single spaces; an empty one is `ABSENT`."""
        found = [given] if isinstance(given, str) or is_absent(given) else list(given)
        for each in found:
            if not isinstance(each, str) and not is_absent(each):
                raise UsageError(f"--prompt: found {str(each)[:80]}, expected text")
        return [" ".join(each.split()) or ABSENT if isinstance(each, str) else each for each in found]

    def misfit(self, files: CodeFiles) -> str:
        return "" if files.has_captions else "has no captions, the prior was trained with some"

    def legend(self) -> str:
        return f"{self.first} to {self.absent[0] - 1} text, {self.absent[0]} no text"

    @property
    def note(self) -> str:
        return (
            f"The text takes {self.length} ids of the prefix, the first ones or those after the id of the scan order: "
            "the ids of "
            f'`Tokenizer.from_file("FOLDER/{FILE}").encode(prompt)` (library `tokenizers`), each plus {self.first}, '
            f"with {self.absent[0]} in front of them up to {self.length}."
        )
