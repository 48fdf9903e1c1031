"""No test asks another machine for anything, whatever library it goes through."""

import socket
import urllib.request
from typing import Any

import pytest
from helpers.network import no_requests


def test_requests_to_other_machines_are_refused_and_noted() -> None:
    for act in (
        lambda: urllib.request.urlopen("http://example.com/a"),
        lambda: urllib.request.urlopen("http://93.184.215.14/a"),
        lambda: socket.create_connection(("2606:2800::1", 80)),
    ):
        with no_requests() as asked, pytest.raises(OSError, match="no request"):
            act()
        assert len(asked) == 1
    with no_requests() as asked, socket.socket() as client:
        assert client.connect_ex(("93.184.215.14", 80)) != 0
        assert len(asked) == 1


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_this_machine_may_be_asked(tmp_path: Any, family: int) -> None:
    place = ("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "socket")
    with no_requests() as asked, socket.socket(family) as server, socket.socket(family) as client:
        server.bind(place)
        server.listen()
        client.connect(server.getsockname())
        assert not asked and socket.getaddrinfo("localhost", 80)
