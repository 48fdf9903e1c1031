"""The models in the package, and where the prior or the tokenizer of a program is."""

import os
from pathlib import Path

from vqgen.files import DESCRIPTION

DEFAULT_MODEL = Path("runs/demo/prior")
_PRETRAINED = Path(__file__).parents[1] / "sampling" / "pretrained"
SHIPPED = {file.parent.name: file.parent for file in sorted(_PRETRAINED.glob(f"*/{DESCRIPTION}"))}
"""The models in the package, by name; the README.md of each says how it was made."""
DEFAULT = SHIPPED["cifar10"]


def _named(folder: Path) -> Path | None:
    """The model of the package of that name, where no run or model folder of the user has it, begun or finished."""
    # The first file of a run is machine.json, of vqgen-train the folder plan; code files have neither.
    own = any((folder / name).exists() for name in (DESCRIPTION, "machine.json", "plan"))
    return None if own else SHIPPED.get(str(folder))


def find_model(model: Path | None) -> Path:
    """The given folder, or model of the package by name; else $VQGEN_MODEL, the demo's prior, or `DEFAULT`."""
    if model is None and os.environ.get("VQGEN_MODEL"):
        model = Path(os.environ["VQGEN_MODEL"])
    if model is not None:
        return _named(model) or model
    return DEFAULT_MODEL if (DEFAULT_MODEL / DESCRIPTION).is_file() else DEFAULT


def find_tokenizer(folder: Path) -> Path:
    """The given folder, or the tokenizer of a model of the package by its name."""
    named = _named(folder)
    return named / "tokenizer" if named else folder
