"""Serving the page: on this machine alone unless asked otherwise, with no way to other files or other servers."""

import math
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from vqgen.errors import UsageError, UserError

from .program import AppConfig

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

# What the page and its API need of Gradio's routes. Others fetch from other servers, or show what nobody asked for.
ROUTES = re.compile(
    r"/|/(config|info|theme\.css|favicon\.ico|manifest\.json|pwa_icon|robots\.txt)/?|/(assets|static)/.+"
    r"|/gradio_api/(info|app_id|startup-events|theme\.css|upload|upload_progress|cancel|reset)/?"
    r"|/gradio_api/(queue/join|queue/data|heartbeat/.+|call/.+|run/.+)"
    r"|/gradio_api/file=(?!\w+:).+"
)
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio compiles templates in the browser
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
"""Content security policy: the browser itself refuses requests to other servers."""


UPLOAD = "/gradio_api/upload"


def stored(folder: str) -> int:
    """Bytes of all files below a folder, from which others may be removed meanwhile."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.lstat(os.path.join(place, name)).st_size
    return found


class Guard:
    """ASGI middleware: refuses all routes but `ROUTES`, and uploads while too much is stored; adds `POLICY` to every
    answer, notes when a request came.

    Args:
        folder: where uploads and drawn images are.
        most_stored: bytes in it from which on uploads are refused.
    """

    def __init__(
        self, app: Callable[[Message, Receive, Send], Awaitable[None]], folder: str = "", most_stored: float = math.inf
    ) -> None:
        self.app, self.folder, self.most_stored = app, folder, most_stored

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["arrived"] = time.monotonic()
        refused = None
        if not ROUTES.fullmatch(scope["path"]):
            refused = 404, "not found"
        elif scope["path"].rstrip("/") == UPLOAD and stored(self.folder) >= self.most_stored:
            most = f"{self.most_stored / 2**20:g} MB"
            refused = 507, f"This server keeps {most} of uploads and drawn images at most; try again in an hour."
        if refused:
            head = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": refused[0], "headers": head})
            await send({"type": "http.response.body", "body": refused[1].encode()})
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *own, (b"x-content-type-options", b"nosniff")]
            await send(message)

        await self.app(scope, receive, sent)


def check_address(host: str, port: int) -> None:
    """Raise `UsageError` where nothing can listen on an address: before seconds of imports."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"--port: {port} on {host} cannot be used ({reason}); name another --port or --host"
        ) from error


def _end(*_: Any) -> None:
    """Handle SIGTERM as an end like any other, after which the temporary folder is removed."""
    raise SystemExit(0)


def serve(config: AppConfig) -> None:
    """Serve the page until it is interrupted. Raises `UserError`, `UsageError`."""
    check_address(config.host, config.port)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    place = tempfile.mkdtemp(prefix="vqgen-app-")
    # Read when gradio is imported; uploads and drawn images are there, and drawings under way beside it.
    os.environ |= {"GRADIO_TEMP_DIR": os.path.join(place, "files"), "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        try:
            from .layout import CSS, HEAD, build, theme
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise UserError("vqgen-app needs the package gradio: pip install gradio") from error
        from starlette.middleware import Middleware

        from .drawing import Jobs
        from .models import Models

        models = Models(config.models, config.device, config.precision)
        page = build(models, config.limits, Jobs(config.limits.most_seconds))
        guard = Middleware(Guard, folder=place, most_stored=config.limits.stored_megabytes * 2**20)
        try:
            _, address, shared = page.launch(
                server_name=config.host,
                server_port=config.port,
                share=config.share,
                max_file_size=int(config.limits.upload_megabytes * 2**20),
                theme=theme(),
                css=CSS,
                head=HEAD,
                footer_links=["api"],
                app_kwargs={"middleware": [guard]},
                allowed_paths=[],
                prevent_thread_lock=True,
                quiet=True,
                inbrowser=False,
                ssr_mode=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                pwa=False,
            )
        except OSError as error:
            raise UsageError(f"--port: {config.port} cannot be used ({error}); name another") from error
        try:
            print(f"{len(models.names)} models: {', '.join(models.names)}")
            print(f"open {shared or address}", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    finally:
        shutil.rmtree(place, ignore_errors=True)
