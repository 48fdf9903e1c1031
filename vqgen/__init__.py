"""vqgen: two-stage image generation with a VQ tokenizer and a GPT-style prior on its codes.

Public names load on first use, so that `import vqgen` costs nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_PUBLIC = {
    "Tokenizer": ".tokenizer.model",
    "CodeFiles": ".tokenizer.codes.format",
    "Prior": ".prior.model",
    "CodesOnly": ".prior.export.logits_processor",
    "Generator": ".sampling.generator",
    "UserError": ".errors",
}
__all__ = ["CodeFiles", "CodesOnly", "Generator", "Prior", "Tokenizer", "UserError", "__version__"]

if TYPE_CHECKING:
    from vqgen.prior.export.logits_processor import CodesOnly  # pyright: ignore[reportMissingImports]
    from vqgen.prior.model import Prior  # pyright: ignore[reportMissingImports]
    from vqgen.sampling.generator import Generator  # pyright: ignore[reportMissingImports]
    from vqgen.tokenizer.codes.format import CodeFiles  # pyright: ignore[reportMissingImports]
    from vqgen.tokenizer.model import Tokenizer  # pyright: ignore[reportMissingImports]

    from .errors import UserError


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module 'vqgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
