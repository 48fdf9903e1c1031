"""Serving the page: on this machine alone unless asked otherwise, with no way to other files or other servers."""

import asyncio
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

from .program import MASK_BYTES, SECONDS_KEPT, SWEEP, AppConfig

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
FORM = 2**16
"""Bytes of an upload beside its file."""
JSON = MASK_BYTES + 2**20
"""Most bytes of a request that is no upload: a painted mask, and the rest."""


def stored(folder: str) -> int:
    """Bytes on the disk below a folder, from which others may remove files meanwhile; what is old is removed.

    Gradio removes files that it knows of: no folders, nor the zip of every drawing, nor uploads that were broken off.
    """
    found, oldest = 0, time.time() - SECONDS_KEPT
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(place, name)
            with suppress(FileNotFoundError):
                about = os.lstat(path)
                if about.st_ctime < oldest:
                    os.unlink(path)
                else:
                    found += about.st_blocks * 512
        with suppress(OSError):  # it has files, or is gone
            if place != folder and os.lstat(place).st_mtime < oldest:
                os.rmdir(place)
                continue
        found += 4096  # of the folder itself
    return found


def sweep(folder: str, done: threading.Event) -> None:
    """Remove what is old in a folder, again and again until all is done."""
    while not done.wait(SWEEP):
        stored(folder)


class Guard:
    """ASGI middleware: refuses all routes but `ROUTES`, requests that are too large or do not say how large they are,
    and uploads that are too large with all that is kept.

    It adds `POLICY` to every answer, and notes when a request came.

    Args:
        folder: where uploads and drawn images are, for `SECONDS_KEPT`.
        most_uploaded: bytes of an uploaded file.
        most_stored: bytes in the folder, with the uploads on their way.
    """

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        folder: str = "",
        most_uploaded: float = math.inf,
        most_stored: float = math.inf,
    ) -> None:
        self.app, self.folder = app, folder
        self.most_uploaded, self.most_stored = most_uploaded, most_stored
        self.arriving = 0
        """Bytes of the uploads on their way."""

    async def refuses(self, scope: Message, length: int | None) -> tuple[int, str] | None:
        """Status and text that refuse a request of `length` bytes (None: it does not say how many); None accepts it."""
        if not ROUTES.fullmatch(scope["path"]):
            return 404, "not found"
        upload = _is_upload(scope)
        if length is None:
            return 411, "Found a request that does not say its length; give content-length, and no transfer-encoding."
        if length > (self.most_uploaded + FORM if upload else JSON):
            what = f"an upload of more than {self.most_uploaded / 2**20:,g} MB" if upload else f"{length} bytes"
            return 413, f"Found {what}; give a smaller file."
        if not upload:
            return None
        used = await asyncio.to_thread(stored, self.folder)
        if used + self.arriving + length > self.most_stored:
            most = f"{self.most_stored / 2**20:,g} MB"
            return 507, f"This server keeps {most} of uploads and drawn images, for an hour; try again later."
        return None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["arrived"] = time.monotonic()

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *own, (b"x-content-type-options", b"nosniff")]
            await send(message)

        length = stated_length(scope)
        if refused := await self.refuses(scope, length):
            head = [(b"content-type", b"text/plain; charset=utf-8")]
            await sent({"type": "http.response.start", "status": refused[0], "headers": head})
            await sent({"type": "http.response.body", "body": refused[1].encode()})
            return
        arriving = length or 0 if _is_upload(scope) else 0
        self.arriving += arriving
        try:
            await self.app(scope, receive, sent)
        finally:
            self.arriving -= arriving


def _is_upload(scope: Message) -> bool:
    return scope["path"].rstrip("/") == UPLOAD and scope["method"] == "POST"


def stated_length(scope: Message) -> int | None:
    """Bytes of the body of a request, to which the server holds it; None where it does not say.

    A body in chunks has the length that it turns out to have, whatever else the request says.
    """
    headers = dict(scope["headers"])
    stated = headers.get(b"content-length", b"" if scope["method"] == "POST" else b"0")
    return int(stated) if stated.isdigit() and b"transfer-encoding" not in headers else None


def check_address(host: str, port: int) -> None:
    """Raise `UsageError` where nothing can listen on an address: before seconds of imports."""
    try:
        host = host.strip("[]")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"--port: {port} on {host} cannot be used ({reason}); name another --port or --host"
        ) from error


def _end(*_: Any) -> None:
    """Handle a signal as an end like any other, after which the temporary folder is removed."""
    raise SystemExit(0)


def serve(config: AppConfig) -> None:
    """Serve the page until it is interrupted. Raises `UserError`, `UsageError`."""
    check_address(config.host, config.port)
    if threading.current_thread() is threading.main_thread():
        # SIGHUP where a terminal is closed, unless nohup ignores it; Windows has none.
        for number in filter(None, (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end)
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
        limits = {"most_uploaded": config.limits.upload_megabytes, "most_stored": config.limits.stored_megabytes}
        sizes = {name: megabytes * 2**20 for name, megabytes in limits.items()}
        files, done = os.environ["GRADIO_TEMP_DIR"], threading.Event()
        guard = Middleware(Guard, folder=files, **sizes)
        try:
            _, address, shared = page.launch(
                server_name=f"[{plain}]" if ":" in (plain := config.host.strip("[]")) else plain,
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
            threading.Thread(target=sweep, args=(files, done), daemon=True).start()
            done.wait()
        finally:
            done.set()
            page.close(verbose=False)
    finally:
        shutil.rmtree(place, ignore_errors=True)
