"""vqgen-app: options and entry point; `server.py` serves the page."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from vqgen.config import command
from vqgen.options import Options, Range

MASK_BYTES = 2**24
"""Characters of a painted mask, a PNG in base64."""
SECONDS_KEPT, SWEEP = 3600, 600
"""For how long uploads and drawn images are kept, and how often those that are older are removed, in seconds."""


@dataclass
class LimitConfig(Options):
    """What one request may ask for, and how many may wait."""

    most_images: Annotated[int, Range(least=1, most=1000)] = 100
    """Images of one request."""
    most_megapixels: Annotated[float, Range(above=0, most=1000)] = 16.0
    """Pixels of all images of one request together, in millions."""
    upload_megapixels: Annotated[float, Range(above=0, most=80)] = 64.0
    """Pixels of an uploaded image, in millions."""
    upload_megabytes: Annotated[float, Range(above=0, most=1000)] = 20.0
    """Size of an uploaded file."""
    prompt_characters: Annotated[int, Range(least=1, most=100_000)] = 500
    """Length of all prompts of one request together."""
    most_seconds: Annotated[float, Range(above=0, most=10**6)] = 600.0
    """Time that a drawing may take; then it ends with the images that are there."""
    most_waiting: Annotated[int, Range(least=1, most=1000)] = 20
    """Requests that wait; further ones are refused. One is worked on at a time."""
    stored_megabytes: Annotated[float, Range(above=0, most=10**6)] = 2000.0
    """Uploads and drawn images of all visitors that are kept; uploads beyond it are refused."""


@dataclass
class AppConfig(Options):
    """Options of vqgen-app."""

    COMMON: ClassVar[tuple[str, ...]] = ("models", "host", "port", "device", "precision")

    models: Path | None = None
    """Folder whose sub-folders are offered: model folders, run folders of priors, or folders with one as `prior`. The
    models in the package are always offered; no other file on disk can be read from the page."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, who need no password."""
    port: Annotated[int, Range(least=1, most=65535)] = 7860
    """Port to listen on."""
    share: bool = False
    """Make the page public through a Gradio server, for as long as Gradio keeps the link; visitors need no password."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """Arithmetic of the prior: auto, fp32, bf16 or fp16."""
    limits: LimitConfig = field(default_factory=LimitConfig)


def app(config: AppConfig) -> None:
    """Serve a page to draw, edit, translate and reconstruct images in the browser, and to look at codebooks. Needs the
    extra `app` (Gradio)."""
    from .server import serve

    serve(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-app", AppConfig, app, arguments)


if __name__ == "__main__":
    sys.exit(main())
