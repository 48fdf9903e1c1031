"""Requests that no test makes: to anything but this machine."""

import errno
import ipaddress
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest


def _is_local(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    with suppress(ValueError):
        address = ipaddress.ip_address(name.partition("%")[0])
        return address.is_loopback or address.is_unspecified
    return False


def _is_by_gradios_client() -> bool:
    """Whether the caller is the client with which tests call the page; it asks the hub for a list of its own."""
    return any(frame.filename.endswith("gradio_client/client.py") for frame in traceback.extract_stack())


@contextmanager
def no_requests() -> Iterator[list[str]]:
    """Refuse to look up or connect to other machines in this process; yield what was asked for, as it happens.

    Programs may turn the error into one line of their own.
    """
    asked: list[str] = []

    def refuse(what: Any) -> OSError:
        if not _is_by_gradios_client():
            asked.append(str(what))
        return OSError(errno.ENETUNREACH, f"tests make no request: {what}")

    look_up, connect, connect_ex = socket.getaddrinfo, socket.socket.connect, socket.socket.connect_ex

    def local_look_up(host: Any, *given: Any, **more: Any) -> Any:
        if not _is_local(host):
            raise refuse(host)
        return look_up(host, *given, **more)

    def is_refused(self: socket.socket, address: Any) -> OSError | None:
        inet = self.family in (socket.AF_INET, socket.AF_INET6)
        return refuse(address) if inet and not _is_local(address[0]) else None

    def local_connect(self: socket.socket, address: Any) -> None:
        if error := is_refused(self, address):
            raise error
        connect(self, address)

    def local_connect_ex(self: socket.socket, address: Any) -> int:
        return errno.ENETUNREACH if is_refused(self, address) else connect_ex(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", local_look_up)
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setattr(socket.socket, "connect_ex", local_connect_ex)
        yield asked
