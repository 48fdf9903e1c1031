"""Images and weights that `shared/realdata/prepare.py` puts on a machine; tests of them skip elsewhere."""

import os
from pathlib import Path

import pytest

REALDATA = Path(os.environ.get("VQGEN_REALDATA", "~/.cache/vqgen-realdata")).expanduser()
_BACKBONES = {"vgg": "vgg16_features.safetensors", "alex": "alexnet_features.safetensors"}


def real(name: str) -> Path:
    """A file or folder of the real data, for a test that skips without; `.ci/run` fails where one does."""
    path = REALDATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def backbone(net: str) -> Path:
    """Weights of the backbone of an LPIPS network."""
    return real(f"weights/{_BACKBONES[net]}")
