"""The model card of vqgen-export: README.md with the hub's front matter. It states what files say, and nothing else."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vqgen import __version__
from vqgen.errors import UserError
from vqgen.files import is_file, read_json
from vqgen.prior.model import Prior
from vqgen.prior.options import GENERATION, RECOMMENDED, SHARED
from vqgen.prior.selection import NATS, NATS_OF_HOLES, best_validation, finite
from vqgen.training.folder import FINISHED
from vqgen.training.trackers import read_rows

from .program import ExportConfig

GRID = "grid.png"


@dataclass(frozen=True)
class Row:
    """One metric in the card."""

    name: str
    value: float
    source: str
    """What it was measured on."""


def recommended(model: Path) -> dict[str, Any]:
    """The generation_config.json of a prior's folder where it holds recommended settings (`vqgen`); else nothing."""
    path = model / GENERATION
    found = read_json(path) if is_file(path) else {}
    if not isinstance(own := found.get(RECOMMENDED, {}), dict):
        raise UserError(f"{path}: found {RECOMMENDED} {own!r:.80}, expected settings; correct or remove it")
    return found if RECOMMENDED in found else {}


def measured(model: Path, prior: Prior) -> list[Row]:
    """The metrics in a run folder: those of the best validation, and of the receipts of vqgen-eval of these weights."""
    rows, source = [], prior.conditioning.masked_source
    if best := best_validation(_logged(model), source.inpainting if source else 0.0):
        for name in (NATS, NATS_OF_HOLES, "bits_per_dimension"):
            if finite(value := best.get(f"heldout/{name}")):
                rows.append(Row(name, value, f"validation images, step {best['step']}"))
    for path in sorted(model.glob("*.json")):
        with suppress(UserError):  # other files, damaged or not, are none of the card's business
            rows += _of_receipt(read_json(path), prior)
    return rows


def _of_receipt(receipt: Mapping[str, Any], prior: Prior) -> list[Row]:
    """The metrics of a receipt but those by class or by number of samples; none of other weights or other JSON."""
    parts = [receipt.get(part) for part in ("metrics", "fingerprints", "options", "counts")]
    if receipt.get("kind") != "vqgen receipt" or not all(isinstance(part, dict) for part in parts):
        return []
    metrics, fingerprints, options, counts = (dict(part or {}) for part in parts)
    if fingerprints.get("prior") != prior.fingerprint:
        return []
    decoded = receipt.get("program") != "likelihood"  # else all is of codes, which another decoder leaves as they are
    if decoded and fingerprints.get("tokenizer") not in (None, prior.tokenizer_fingerprint):
        return []
    split = [f"{options['split']} split"] if options.get("split") else []
    source = ", ".join([f"vqgen-eval {receipt.get('program')}", *split, *(f"{n} {name}" for name, n in counts.items())])
    values: dict[str, Any] = {}
    for name, value in metrics.items():
        if not isinstance(value, dict):
            values[name] = value
        elif name != "at" and not name.endswith("_by_class"):  # e.g. the PSNR of restored and of degraded images
            values |= {f"{name}.{each}": part for each, part in value.items()}
    return [Row(name, value, source) for name, value in values.items() if finite(value)]


def _logged(run: Path) -> list[dict[str, Any]]:
    """The readable rows of a run's metrics.jsonl; none where the run goes on from the weights that it has."""
    return read_rows(run / "metrics.jsonl")[0] if is_file(run / FINISHED) else []


def task_of(prior: Prior) -> str:
    """The hub's name of the task, by the parts of the prefix; it has none for classes."""
    conditioning = prior.conditioning
    if conditioning.paired_source is not None:
        return "image-to-image"
    texts = any(part.name == "text" for part in conditioning.parts)
    return "text-to-image" if texts else "unconditional-image-generation"


def _front_matter(prior: Prior, config: ExportConfig) -> str:
    about: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task_of(prior)}
    about["tags"] = ["vqgen", "image-generation", "autoregressive", "vq"]
    if config.license:
        about["license"] = config.license
    if config.dataset:
        about["datasets"] = config.dataset
    return yaml.safe_dump(about, sort_keys=False)


def _settings(settings: Mapping[str, Any]) -> str:
    """Recommended settings as options of vqgen-sample."""
    chosen = {name: settings[name] for name in SHARED if name in settings} | dict(settings.get(RECOMMENDED, {}))
    if settings.get("do_sample") is False:
        chosen["temperature"] = 0
    words = []
    for name, value in chosen.items():
        values = value if isinstance(value, list) else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    if not words:
        return "None were searched for this model: `vqgen-sample` draws at temperature 1 from all codes."
    return f"`{' '.join(words)}` of `vqgen-sample`, which takes them from `generation_config.json` by itself."


def _metrics(found: Sequence[Row], dtype: str) -> str:
    if not found:
        return "No measurements of this model were found beside it."
    rows = "".join(f"\n| {row.name} | {row.value:.4g} | {row.source} |" for row in found)
    before = "" if dtype == "float32" else f"\n\nMeasured before the weights were rounded to {dtype}."
    return f"| metric | value | measured on |\n|---|---|---|{rows}{before}"


def card(prior: Prior, config: ExportConfig, metrics: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """Text of the model card, README.md; `settings` is what `recommended` returned."""
    vocabulary, conditioning, depth = prior.vocabulary, prior.conditioning.plain, prior.vocabulary.depth
    positions = vocabulary.to_grid(torch.arange(vocabulary.length)[None]).flatten().tolist()
    example = conditioning.prefixes(conditioning.conditions(), [0])[0].tolist()
    absent = conditioning.without(torch.tensor([example]))[0].tolist()
    guided = [part.name for part in conditioning.parts if part.informative and part.guidable]
    channels, height, width = prior.image_shape
    legends = [part.legend() for part in reversed(prior.conditioning.parts)]
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    return template.format(
        front=_front_matter(prior, config),
        picture=f"![samples]({GRID})\n\n" if config.samples else "",
        license=config.license or "not stated",
        data=", ".join(config.dataset) or "not stated",
        settings=_settings(settings),
        metrics=_metrics(metrics, config.dtype),
        version=__version__,
        backbone=prior.config.backbone,
        parameters=sum(p.numel() for p in prior.backbone.parameters()) / 1e6,
        dtype=config.dtype,
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
            else "Classifier-free guidance: the ids of an absent part (above) in place of those of "
            f"{' and '.join(guided)} in the prefix give logits without that condition."
            if guided
            else "It was trained without dropping its conditions, so there is no guidance."
            if any(part.informative for part in conditioning.parts)
            else "It is unconditional."
        ),
        notes="".join(f"\n{part.note}" for part in prior.conditioning.parts if part.note),
        example=example,
        reorder=f"[:, {positions}]" if vocabulary.order != "raster" else "",
        shape=", ".join(map(str, vocabulary.shape)),
        unshift=f" % {vocabulary.codebook_size}" if depth > 1 else "",
    )
