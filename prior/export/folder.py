"""Write the folder and the model card of vqgen-export; the options are in `program.py`."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from vqgen import __version__
from vqgen.artifact import copy_artifact, fingerprint, write_tensors
from vqgen.errors import UsageError
from vqgen.files import atomic_path, write_json, write_text
from vqgen.files.output_folder import new_folder
from vqgen.prior.model import Prior

from .program import ExportConfig


def card(prior: Prior, dtype: str) -> str:
    """Text of the model card, README.md."""
    vocabulary, conditioning, depth = prior.vocabulary, prior.conditioning.plain, prior.vocabulary.depth
    positions = vocabulary.to_grid(torch.arange(vocabulary.length)[None]).flatten().tolist()
    example = conditioning.prefixes(conditioning.conditions(), [0])[0].tolist()
    absent = conditioning.without(torch.tensor([example]))[0].tolist()
    channels, height, width = prior.image_shape
    legends = [part.legend() for part in reversed(prior.conditioning.parts)]
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    return template.format(
        version=__version__,
        backbone=prior.config.backbone,
        parameters=sum(p.numel() for p in prior.backbone.parameters()) / 1e6,
        dtype=dtype,
        image=f"{height}x{width}, {channels} channel{'s' * (channels > 1)}",
        grid="x".join(map(str, vocabulary.grid)) + (f", {depth} a position" if depth > 1 else ""),
        codebook_size=vocabulary.codebook_size,
        length=vocabulary.length,
        depth=", the codes of a position one after another" if depth > 1 else "",
        prior=prior.fingerprint,
        tokenizer=prior.tokenizer_fingerprint,
        prefix=conditioning.length,
        parts=", ".join(f"{part.name}: {part.length}" for part in conditioning.parts),
        order=vocabulary.order,
        ids=", ".join([f"0 to {vocabulary.size - 1} are codes", *legends]),
        ranges=f": of depth j those from j * {vocabulary.codebook_size}" if depth > 1 else "",
        guidance=(
            f"Classifier-free guidance: the prefix {absent} in place of, for example, {example} gives logits without "
            "the condition."
            if absent != example
            else "It was trained without dropping its conditions, so there is no guidance."
            if any(part.informative for part in conditioning.parts)
            else "It is unconditional."
        ),
        notes="".join(f"\n{part.note}" for part in prior.conditioning.parts if part.note),
        example=example,
        reorder=f"[:, {positions}]" if vocabulary.order != "raster" else "",
        each=depth,
        shape=", ".join(map(str, vocabulary.shape)),
        unshift=f" % {vocabulary.codebook_size}" if depth > 1 else "",
    )


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


def _export(config: ExportConfig) -> None:
    prior = Prior.load(config.model)
    tokenizer = prior.load_tokenizer(config.model / "tokenizer")
    dtype = getattr(torch, config.dtype)
    _cast(prior.backbone, dtype)
    if config.to == "vqgen":
        _cast(tokenizer, dtype)
        with tempfile.TemporaryDirectory() as scratch:
            prior.tokenizer_fingerprint = tokenizer.save(Path(scratch))
            with atomic_path(config.output) as folder:
                prior.save(folder, Path(scratch))
                write_text(folder / "README.md", card(prior, config.dtype))
        print(f"exported to {config.output}: vqgen.Generator.load({str(config.output)!r}) loads it")
        return
    prior.fingerprint = fingerprint(prior.backbone.state_dict())
    length = prior.vocabulary.length
    generation = {"bos_token_id": prior.conditioning.null, "do_sample": True, "top_k": 0}
    generation |= {"max_new_tokens": length, "min_new_tokens": length}
    with atomic_path(config.output) as folder:
        folder.mkdir(parents=True)
        prior.write_config(folder / "config.json")
        prior.conditioning.write_files(folder)
        write_json(folder / "generation_config.json", generation)
        write_tensors(folder / "model.safetensors", prior.backbone.state_dict())
        write_text(folder / "README.md", card(prior, config.dtype))
        copy_artifact(config.model / "tokenizer", folder / "tokenizer")
    print(f"exported to {config.output}: AutoModelForCausalLM.from_pretrained({str(config.output)!r}) loads it")
