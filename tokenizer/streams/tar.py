"""Tar shards as the library webdataset writes them: members of one sample are neighbours and differ in their endings.

They are read in one pass and never extracted. `datasets` reads them, too, but takes the fields of all samples from the
first five, decodes every member by its ending, whatever its size, and ends silently at a damaged header.
"""

import struct
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from tarfile import EOFHeaderError, HeaderError, ReadError, TarFile  # pyright: ignore[reportAttributeAccessIssue]
from typing import BinaryIO

from vqgen.config import shown
from vqgen.errors import UsageError, UserError
from vqgen.tokenizer.data.captions import as_caption
from vqgen.tokenizer.data.options import MAX_CAPTION, SUFFIXES

from .records import MAX_IMAGE, Record, as_label
from .transport import opened

MAX_HEADER = 2**20
"""Largest header that extends another (long names and the like), in bytes."""
MAX_PADDING = 2**20
"""Most zeros behind the marker that ends a file, in bytes: writers fill their last block, of 10 KiB as a rule."""
CLASS = "cls"
"""Ending of the members that are classes."""
MOST_ENDINGS = 100
"""Endings of members that are remembered for a message."""
_EXTENDING = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDING += (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error: `tarfile` takes it for the end of the file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        found = super().frombuf(buf, encoding, errors)
        if found.type in _EXTENDING and found.size > MAX_HEADER:  # it is read as a whole
            raise ReadError(f"a header of {found.size} bytes")
        return found

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> "_Member":
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"{error} at byte {tarfile.offset}") from error


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what `tarfile` itself raises on damaged data into a `ReadError`; elsewhere the same errors are defects."""
    try:
        yield
    except (LookupError, AttributeError, RecursionError, struct.error) as error:
        raise ReadError(f"{type(error).__name__} at a damaged header") from error


def _open(file: BinaryIO) -> TarFile:
    """Open a stream, which reads its first header."""
    with _reading():
        return tarfile.open(fileobj=file, mode="r|", tarinfo=_Member)


def check_captions(text_column: str | None) -> None:
    """Raise `UsageError` where captions are to be members that are classes or images."""
    if text_column == CLASS or f".{text_column}" in SUFFIXES:
        text = f"found {text_column}, the ending of {'classes' if text_column == CLASS else 'images'} in tar files"
        raise UsageError(f"--text-column: {text}; give that of the captions, e.g. txt")


def read_tar(url: str, text_column: str | None) -> Iterator[Record]:
    """Yield the records of a tar file: `KEY.jpg` or another image, and `KEY.cls` with its class, if there is one.

    Args:
        text_column: ending of the members that are captions, e.g. "txt"; one member at least has it.

    Images that are links, or larger than `MAX_IMAGE`, and samples without an image are records with a problem. Raises
    `UserError` for a damaged file, a label that is no class, and a caption that is no text.
    """
    where, endings = shown(url), dict[str, None]()
    try:
        with opened(url) as file, _open(file) as tar:
            for key, members in groupby(_members(tar, endings, text_column), key=lambda member: member[0]):
                yield _record(tar, key, (member[1:] for member in members), where, text_column)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # what `tarfile` raises on damaged data
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"--data: {where} cannot be read ({reason}); restore it or download it again") from error
    if text_column is not None and endings and text_column not in endings:
        found = f"{where} has no member that ends in {text_column}; its endings are {', '.join(endings)[:500]}"
        raise UserError(f"--text-column: {found}; give one of them")


def _members(tar: TarFile, endings: dict[str, None], wanted: str | None) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, ending in lower case and header of each member that is no folder and not hidden.

    `endings` gets the first of theirs, and `wanted` wherever it is.
    """
    while (member := _next(tar)) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else they stay in memory
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if stem and not member.isdir() and not folder.startswith("__MACOSX"):
            if len(endings) < MOST_ENDINGS or ending.lower() == wanted:
                endings.setdefault(ending.lower())
            yield f"{folder}/{stem}" if folder else stem, ending.lower(), member
    _check_end(tar)


def _next(tar: TarFile) -> tarfile.TarInfo | None:
    with _reading():
        return tar.next()


def _check_end(tar: TarFile) -> None:
    """Raise `ReadError` where anything but a little padding is behind the marker at which `tarfile` stops."""
    rest, size = tar.fileobj, 0
    assert rest is not None
    while data := rest.read(2**16):
        if data.strip(b"\0"):
            raise ReadError(f"data behind the marker of its end at byte {tar.offset}: tar files that were joined?")
        size += len(data)
        if size > MAX_PADDING:
            raise ReadError(f"it ends early: zeros from byte {tar.offset} on")


def _record(
    tar: TarFile,
    key: str,
    members: Iterable[tuple[str, tarfile.TarInfo]],
    where: str,
    text_column: str | None,
) -> Record:
    name, data, problem, label, caption, others = "", b"", "", -1, "", list[str]()
    for ending, member in members:
        if f".{ending}" in SUFFIXES:
            if name:
                text = f"{where} has {name} and {member.name}; call the other one NAME.SOMETHING.{ending}"
                raise UserError(f"--data: two images have one key: {text}")
            name = member.name
            if not member.isreg() or member.issparse():
                problem = "a link or a device, not a regular file"
            elif member.size > MAX_IMAGE:
                problem = f"{member.size} bytes, at most {MAX_IMAGE} are read"
            else:
                data = _bytes(tar, member)
        elif ending == CLASS:
            label = as_label(_text(tar, member, where), f"{where}: {member.name}")
        elif ending == text_column:
            caption = as_caption(_text(tar, member, where).removeprefix("\ufeff"), f"{where}: {member.name}")
        else:
            others.append(ending)
    if not name:
        problem = f"no image among its endings {', '.join(others)[:80] or CLASS}"
    return Record(key, f"{where}: {name or key}", data, label, caption, problem)


def _bytes(tar: TarFile, member: tarfile.TarInfo) -> bytes:
    with _reading():
        file = tar.extractfile(member)
        assert file is not None  # it is a regular file
        return file.read()


def _text(tar: TarFile, member: tarfile.TarInfo, where: str) -> str:
    found = f"{where}: {member.name}"
    if not member.isreg() or member.issparse() or member.size > 8 * MAX_CAPTION:
        raise UserError(f"--data: {found} is no regular file of at most {8 * MAX_CAPTION} bytes; remove it")
    try:
        return _bytes(tar, member).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {found} is no UTF-8 ({error}); correct it") from error
