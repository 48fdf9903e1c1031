"""The models in the package, and where the prior of a program is."""

import os
from pathlib import Path

from vqgen.files import DESCRIPTION

DEFAULT_MODEL = Path("runs/demo/prior")
_PRETRAINED = Path(__file__).parents[1] / "sampling" / "pretrained"
SHIPPED = {file.parent.name: file.parent for file in sorted(_PRETRAINED.glob(f"*/{DESCRIPTION}"))}
"""The models in the package, by name; the README.md of each says how it was made."""
DEFAULT = SHIPPED["cifar10"]


def find_model(model: Path | None) -> Path:
    """The given folder, or model of the package by name; else $VQGEN_MODEL, the demo's prior, or `DEFAULT`."""
    if model is None and os.environ.get("VQGEN_MODEL"):
        model = Path(os.environ["VQGEN_MODEL"])
    if model is not None:
        return model if (model / DESCRIPTION).exists() else SHIPPED.get(str(model), model)
    return DEFAULT_MODEL if (DEFAULT_MODEL / DESCRIPTION).is_file() else DEFAULT
