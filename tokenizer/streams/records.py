"""Records: encoded images of a shard with their labels and captions."""

import re
from dataclasses import dataclass

from vqgen.errors import UserError
from vqgen.tokenizer.data.tables import MAX_CLASSES

MAX_IMAGE = 2**28
"""Largest encoded image, in bytes."""


@dataclass(frozen=True)
class Record:
    """One image of a shard as it is stored."""

    key: str
    """Decides the split."""
    name: str
    """Shard and place in it, for messages."""
    data: bytes
    label: int = -1
    caption: str = ""
    problem: str = ""
    """Why there are no bytes; "" where there are."""


def as_label(text: str, where: str) -> int:
    """A label from text, -1 for none. Raises `UserError`."""
    text = text.strip()
    if not re.fullmatch("-?[0-9]{1,80}", text) or not -1 <= int(text) < MAX_CLASSES:
        expected = f"a class from 0 to {MAX_CLASSES - 1}, or -1 for none"
        raise UserError(f"--data: {where} holds {text[:80]!r}, expected {expected}")
    return int(text)
