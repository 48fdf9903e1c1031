"""Files of a stream: local, by HTTP, or through fsspec. A connection that breaks is opened again where it was."""

import io
import os
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, unquote_to_bytes
from urllib.request import Request, urlopen

from vqgen.config import shown
from vqgen.errors import DataError, UserError
from vqgen.files import open_regular
from vqgen.tokenizer.data.loader import pause

T = TypeVar("T")

TRIES = 6
"""How often in a row a read is tried before it is an error."""
PAUSE = 1.0
"""Seconds before the second try; each further pause is twice as long."""
SILENCE = 60.0
"""Seconds without a byte after which an HTTP connection counts as broken."""
_BUFFER = 2**20  # bytes that are read at once
_PERMANENT = {400, 401, 403, 404, 405, 410, 416, 451}  # answers of HTTP that a second try does not change
USER = re.compile("://([^/?#]*)@")
"""User and password of a URL, and what they stand between."""


@contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """Open a path or a URL for reading. Raises `UserError` where a URL cannot be read, at any time; else `OSError`."""
    if "://" not in url:
        with open_regular(url) as file:
            yield file
        return
    with io.BufferedReader(_Remote(url), _BUFFER) as file:
        yield cast(BinaryIO, file)


def size_of(url: str) -> int | None:
    """The bytes of a file; None where its server does not say. Raises `UserError`."""
    if "://" not in url:
        try:
            with open_regular(url) as file:
                return os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"--data: {url} cannot be read ({error.strerror}); restore it") from error
    with _Remote(url) as file:
        return file.size


def _request(url: str, start: int) -> Request:
    """Ask for the bytes of an HTTP URL from `start` on.

    Its user and password become a header, which is not sent to where the server redirects to.
    """
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity", "User-Agent": "vqgen"}
    user = USER.match(url, url.index(":"))
    if user is None:
        return Request(url, headers=headers)
    request = Request(f"{url[: user.start(1)]}{url[user.end() :]}", headers=headers)
    parts = user[1].encode("utf-8", "surrogateescape").partition(b":")
    given = b":".join(unquote_to_bytes(part) for part in (parts[0], parts[2]))
    request.add_unredirected_header("Authorization", f"Basic {b64encode(given).decode()}")
    return request


def _without_secrets(text: str, url: str) -> str:
    """A text of an error without query, user and password of a URL, which it may repeat."""
    users = USER.findall(url)
    passwords = [user.partition(":")[2] for user in users]
    secrets = {url.partition("?")[2], *users, *passwords, *map(unquote, passwords)} - {""}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "…")
    return text


class _Remote(io.RawIOBase):
    """A file behind a URL that outlives its connections."""

    def __init__(self, url: str):
        super().__init__()
        self.url, self.at = url, 0  # where the next read begins
        self._file: Any = None  # an open connection
        self._place = 0  # of it
        self.size: int | None = None
        self._tried(lambda: None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.size is not None

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.size is None:
            raise io.UnsupportedOperation(f"the server of {shown(self.url)} does not say its size")
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        if self.size is not None and self.at >= self.size:
            return 0
        data = self._tried(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        """Read from the open connection, or raise an error of it."""
        data = self._file.read(count)
        if not data and self.size is not None:
            raise OSError(f"it ends after {self.at} of {self.size} bytes")
        self._place += len(data)
        return data

    def _connect(self) -> None:
        """Have an open connection at `at`."""
        if self._file is not None and self._place == self.at:
            return
        if self.url.startswith(("http://", "https://")):
            self._forget()
            self._file = answer = cast(HTTPResponse, urlopen(_request(self.url, self.at), timeout=SILENCE))
            total = answer.headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else ""
            self.size = int(total) if total.isdigit() else answer.length if answer.status == 200 else self.size
            self._place = self.at if answer.status == 206 else 0
            while self._place < self.at:  # its server sends no ranges
                if not (skipped := answer.read(min(_BUFFER, self.at - self._place))):
                    raise OSError(f"it ends after {self._place} of {self.at} bytes")
                self._place += len(skipped)
            return
        if self._file is None:
            import fsspec

            system, path = fsspec.core.url_to_fs(self.url)
            self._file = system.open(path, "rb")
            self.size = getattr(self._file, "size", None)
        self._place = self._file.seek(self.at)

    def _tried(self, act: Callable[[], T]) -> T:
        """The result of `act` on a connection at the right place, which is opened again after its errors.

        Raises `UserError` after errors that another try does not change, and after `TRIES` of the others.
        """
        errors, advice, last = self._errors(), "check the address", Exception()
        began = time.monotonic()
        for attempt in range(TRIES):
            if attempt:
                pause(PAUSE * 2 ** (attempt - 1))
            try:
                self._connect()
                return act()
            except (ImportError, ValueError, InvalidURL) as error:  # or a scheme that fsspec has no library for
                reason, last = "cannot be opened", error
                break
            except errors as error:
                self._forget()
                reason, last = "cannot be read", error
                if isinstance(error, (FileNotFoundError, PermissionError)) or getattr(error, "code", 0) in _PERMANENT:
                    break
        else:
            reason = f"cannot be read after {TRIES} tries in {time.monotonic() - began:.0f} s"
            advice = "check the network and the server, then give the same command again"
        text = _without_secrets(str(last), self.url)
        found = f"{type(last).__name__}: {' '.join(text.split())[:150]}"
        raise DataError(f"--data: {shown(self.url)} {reason} ({found}); {advice}") from last

    def _errors(self) -> tuple[type[Exception], ...]:
        """What a connection raises: of object stores anything, as their libraries have exceptions of their own."""
        return (OSError, HTTPException) if self.url.startswith(("http://", "https://")) else (Exception,)

    def _forget(self) -> None:
        with suppress(Exception):  # a broken connection need not close well
            if self._file is not None:
                self._file.close()
        self._file = None

    def close(self) -> None:
        self._forget()
        super().close()
