"""Write the folder of vqgen-export; the options are in `program.py`, the model card in `card.py`."""

import shlex
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from vqgen.errors import UsageError, UserError
from vqgen.files import atomic_path, is_file, read_json, write_json, write_text
from vqgen.files.output_folder import new_folder
from vqgen.prior.model import Prior
from vqgen.prior.options import GENERATION
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.shipped import find_model, find_tokenizer

from .card import GRID, card, measured, recommended
from .program import ExportConfig


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast all weights. Raises `UsageError` where one overflows the type."""
    module.to(dtype)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UsageError(f"--dtype: {str(dtype)[6:]} cannot hold {name}; use bfloat16")


def export_prior(config: ExportConfig) -> None:
    """Write the folder; see `program.py`. Raises `UserError`."""
    with new_folder(config.output):
        _export(config)
    loader = "vqgen.Generator.load" if config.to == "vqgen" else "AutoModelForCausalLM.from_pretrained"
    print(f"exported to {config.output}: {loader}({str(config.output)!r}) loads it")
    repository = shlex.quote(f"USERNAME/{config.output.resolve().name}")
    print(f"to upload it to the hub: hf upload {repository} {shlex.quote(str(config.output))}")


def _replacement(folder: Path, former: Tokenizer) -> Tokenizer:
    """The tokenizer of --tokenizer. Raises `UserError` where it has other codes than the prior's own."""
    tokenizer = Tokenizer.load(folder)
    if not tokenizer.has_codes_of(former):
        text = "has another encoder or quantizer than the prior's, whose codes it cannot decode"
        raise UserError(f"--tokenizer: {folder} {text}; give one of vqgen-train-tokenizer --decoder-only")
    return tokenizer


def _check_samples(folder: Path, prior: Prior) -> None:
    """Raise `UserError` where --samples is no folder of samples of this prior and its tokenizer."""
    if not is_file(folder / GRID):
        raise UserError(f"--samples: {folder} holds no {GRID}; give a folder of vqgen-sample")
    about = read_json(folder / "samples.json")
    for kind, own in ("prior", prior.fingerprint), ("tokenizer", prior.tokenizer_fingerprint):
        found = about.get(f"{kind}_fingerprint")
        if found != own:
            text = f"are of the {kind} {str(found)[:12]}, expected {str(own)[:12]}; draw some from that"
            raise UserError(f"--samples: those in {folder} {text}")


def _export(config: ExportConfig) -> None:
    model = find_model(config.model)
    prior, source = Prior.load(model), model / "tokenizer"
    tokenizer = prior.load_tokenizer(source)
    if config.tokenizer is not None:
        source = find_tokenizer(config.tokenizer)
        tokenizer = _replacement(source, tokenizer)
        prior.tokenizer_fingerprint = str(tokenizer.fingerprint)
    if config.samples is not None:
        _check_samples(config.samples, prior)
    metrics, settings = measured(model, prior), recommended(model)
    dtype, generation = getattr(torch, config.dtype), prior.generation_config() | settings
    _cast(prior.backbone, dtype)
    with tempfile.TemporaryDirectory() as scratch, atomic_path(config.output) as folder:
        if config.to == "vqgen":
            _cast(tokenizer, dtype)
            source = Path(scratch)
            prior.tokenizer_fingerprint = tokenizer.save(source)
        prior.save(folder, source)
        if config.to == "transformers" or settings:
            write_json(folder / GENERATION, generation)
        if config.samples is not None:
            shutil.copyfile(config.samples / GRID, folder / GRID)
        write_text(folder / "README.md", card(prior, config, metrics, settings))
