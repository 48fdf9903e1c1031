"""Files of a stream, local or through fsspec; a connection that breaks is opened again where it was."""

import asyncio
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from vqgen.errors import UserError
from vqgen.files import open_regular

TRIES = 6
"""How often a read is tried before it is an error."""
PAUSE = 1.0
"""Seconds before the second try; each further pause is twice as long."""
SILENCE = 60.0
"""Seconds without a byte after which a connection counts as broken."""
_BUFFER = 2**20  # bytes that are read at once
_PERMANENT = {400, 401, 403, 404, 405, 410, 451}  # of HTTP


def shown(url: str) -> str:
    """A URL without its query, which may hold a secret."""
    return url.split("?")[0] if "://" in url else url


@contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """Open a path or a URL for reading. Raises `UserError` where it cannot be read, at any time."""
    if "://" not in url:
        with open_regular(url) as file:
            yield file
        return
    with io.BufferedReader(_Remote(url), _BUFFER) as file:
        yield file  # type: ignore[misc]


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


class _Remote(io.RawIOBase):
    """A file of fsspec that outlives its connections."""

    def __init__(self, url: str):
        super().__init__()
        self.url, self.at = url, 0
        self._file: Any = None
        self.size: int | None = self._tried(lambda file: getattr(file, "size", None))

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
        def read(file: Any) -> bytes:
            self._go_to(file, self.at)
            found = file.read(len(buffer))
            if not found and self.size is not None and self.at < self.size:
                raise OSError(f"it ends after {self.at} of {self.size} bytes")
            return found

        data = self._tried(read)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _go_to(self, file: Any, place: int) -> None:
        """Move an open file to a place, where its server sends no ranges by reading up to it."""
        if (at := file.tell()) == place:
            return
        with suppress(ValueError):  # raised where the server sends no ranges
            file.seek(place)
            return
        if at > place:
            raise OSError("its server sends no ranges")  # it is opened again
        while at < place:
            skipped = file.read(min(_BUFFER, place - at))
            if not skipped:
                raise OSError(f"it ends after {at} bytes")
            at += len(skipped)

    def _tried(self, act: Any) -> Any:
        """The result of `act(file)`; after an error of the connection the file is opened again. Raises `UserError`."""
        errors = _errors()
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                self._file = self._file or _open(self.url)
                return act(self._file)
            except (ImportError, ValueError) as error:  # a scheme that fsspec does not know, or lacks a library for
                raise UserError(f"--data: {shown(self.url)} cannot be opened ({_reason(error)})") from error
            except errors as error:
                self._forget()
                lasting = isinstance(error, (FileNotFoundError, PermissionError))
                if lasting or getattr(error, "status", None) in _PERMANENT:
                    raise UserError(f"--data: {shown(self.url)} cannot be read ({_reason(error)}); check it") from error
                last = error
        tries = f"after {TRIES} tries in {PAUSE * (2 ** (TRIES - 1) - 1):.0f} s"
        advice = "check the network and the server, then give the same command again"
        raise UserError(f"--data: {shown(self.url)} cannot be read {tries} ({_reason(last)}); {advice}") from last

    def _forget(self) -> None:
        with suppress(Exception):  # a broken connection need not close well
            if self._file is not None:
                self._file.close()
        self._file = None

    def close(self) -> None:
        self._forget()
        super().close()


def _open(url: str) -> Any:
    import fsspec

    settings: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        # By default a file must have been read within five minutes, and a silent server is waited for as long.
        timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        settings = {"client_kwargs": {"timeout": timeout}}
    system, path = fsspec.core.url_to_fs(url, **settings)
    return system.open(path, "rb")


def _errors() -> tuple[type[Exception], ...]:
    """What reading through the network raises."""
    import httpx
    from aiohttp import ClientError

    return OSError, EOFError, asyncio.TimeoutError, ClientError, httpx.HTTPError


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
