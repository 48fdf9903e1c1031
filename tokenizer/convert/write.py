"""Write a tokenizer as a model folder of vqgen or as a diffusers VQModel."""

from pathlib import Path
from typing import Literal

from vqgen.artifact import write_tensors
from vqgen.files import atomic_path, write_json
from vqgen.tokenizer.model import Tokenizer

from .read import VQMODEL_CONFIG, VQMODEL_WEIGHTS
from .weights import to_diffusers


def save(tokenizer: Tokenizer, to: Literal["vqgen", "diffusers"], output: Path, where: str) -> None:
    """Write a tokenizer as the folder `output`, atomically; `where` names the tokenizer in errors."""
    keys, tensors = to_diffusers(tokenizer, where) if to == "diffusers" else ({}, {})
    with atomic_path(output) as temporary:
        temporary.mkdir()
        if to == "vqgen":
            tokenizer.save(temporary)
        else:
            write_tensors(temporary / f"{VQMODEL_WEIGHTS}.safetensors", tensors)
            write_json(temporary / VQMODEL_CONFIG, keys)
