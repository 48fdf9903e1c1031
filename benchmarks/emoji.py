"""How well a prior of emoji draws the right one in the right style: from its text, and from another style.

    python benchmarks/plain_emoji.py EMOJI DATA
    vqgen-eval classifier --data DATA/train.parquet --size 64 --output CLASSIFIER
    python benchmarks/emoji.py --model MODEL --data DATA --classifier CLASSIFIER --output emoji.json

DATA has train, heldout and novel.parquet of `image`, `text`, `label` (the style) and `key` (the emoji). Of each
drawing of `heldout` (its emoji is in `train`, in another style) and `novel` (in no style), and of some of `train`, the
model draws the same from its text and style, with its recommended settings, and, if it was trained on pairs, from a
drawing in another style. Each is compared with all drawings of that style in the three files, by the features of a
network less their mean, by cosine: `first` and `five` are the shares whose nearest, or five nearest, include the right
emoji. `style` is the share that the classifier assigns to the style. The reconstructions of the drawings say what the
tokenizer leaves to reach.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vqgen.evaluation.classifier import Classifier
from vqgen.evaluation.extractors import Extractor, extract, extractor_for
from vqgen.evaluation.receipt import environment
from vqgen.evaluation.tasks.text import rank
from vqgen.prior.parts.text import Text
from vqgen.sampling.generator import Generator
from vqgen.seeding import hash64
from vqgen.tokenizer.data.decoding import decode

SPLITS = "train", "heldout", "novel"
MOST_TRAINED = 300
"""Drawings of `train` that are drawn again, by default."""
CPU = torch.device("cpu")


@dataclass
class Drawings:
    """The real drawings of some files."""

    keys: list[str]
    texts: list[str]
    styles: list[int]
    splits: list[str]
    images: Tensor  # uint8 (N, 3, H, W)

    def __post_init__(self) -> None:
        self.row = {place: row for row, place in enumerate(zip(self.keys, self.styles, strict=True))}

    def of(self, split: str) -> list[int]:
        return [row for row, name in enumerate(self.splits) if name == split]

    def partner(self, row: int) -> int | None:
        """The same emoji in another style, of `train` or, for a novel one, of `novel`; always the same one."""
        wanted = "novel" if self.splits[row] == "novel" else "train"
        styles = sorted(set(self.styles) - {self.styles[row]}, key=lambda style: hash64(self.keys[row], style))
        found = (self.row.get((self.keys[row], style)) for style in styles)
        return next((other for other in found if other is not None and self.splits[other] == wanted), None)


def read(data: Path, size: int) -> Drawings:
    """All drawings, at the size of the model."""
    tables = {split: pq.read_table(data / f"{split}.parquet").to_pylist() for split in SPLITS}
    rows = [row for split in SPLITS for row in tables[split]]

    def pixels(row: dict[str, Any]) -> Tensor:
        return tv.resize(decode(row["image"]["bytes"], 3), [size, size], antialias=True)

    return Drawings(
        [row["key"] for row in rows],
        [row["text"] for row in rows],
        [row["label"] for row in rows],
        [split for split in SPLITS for _ in tables[split]],
        torch.stack([pixels(row) for row in rows]),
    )


def features(extractor: Extractor, images: Tensor) -> Tensor:
    return torch.cat([extract(extractor, part, CPU)[0] for part in images.split(64)])


def as_read(generator: Generator, texts: list[str]) -> list[str]:
    """Texts without the ends that the prior does not read: it was trained on the beginnings of long captions."""
    part = next(part for part in generator.conditioning.parts if isinstance(part, Text))
    texts = [" ".join(text.split()) for text in texts]
    rests = [part.tokenizer.rest(text, part.length) for text in texts]
    return [text[: len(text) - len(rest)].rstrip() for text, rest in zip(texts, rests, strict=True)]


class Judge:
    """Compares drawn images with the real ones of their style."""

    def __init__(self, drawings: Drawings, extractor: Extractor, classifier: Classifier) -> None:
        self.drawings, self.extractor, self.classifier = drawings, extractor, classifier
        found, self.styles = features(extractor, drawings.images), torch.tensor(drawings.styles)
        self.centres = torch.stack([found[self.styles == style].mean(0) for style in range(int(self.styles.max()) + 1)])
        self.real = F.normalize(found - self.centres[self.styles], dim=1)

    def __call__(self, rows: list[int], images: Tensor) -> dict[str, float]:
        """Metrics of images that should show the drawings of these rows."""
        styles = self.styles[rows]
        found = F.normalize(features(self.extractor, images) - self.centres[styles], dim=1)
        scores = (found @ self.real.T).masked_fill(styles[:, None] != self.styles, -2)
        ranks = rank(scores, torch.tensor(rows))
        judged = torch.cat([self.classifier.choose(part) for part in images.split(64)])
        return {
            "images": len(rows),
            "first": (ranks <= 1).double().mean().item(),
            "five": (ranks <= 5).double().mean().item(),
            "style": (judged == styles).double().mean().item(),
        }


def contact_sheet(path: Path, images: Tensor, columns: int = 20) -> None:
    """Write images to one PNG, row by row."""
    blank = torch.full((-len(images) % columns, *images.shape[1:]), 255, dtype=torch.uint8)
    rows = torch.cat([images, blank]).unflatten(0, (-1, columns))
    tv.to_pil_image(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="folder for contact sheets, drawn and real")
    parser.add_argument("--extractor", default="fd-efficientnet-lite0", choices=("fd-efficientnet-lite0", "fd-vgg16"))
    parser.add_argument("--weights", help="those of fd-vgg16")
    parser.add_argument("--n", type=int, help="most drawings of a split; by default all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = Generator.load(args.model, CPU)
    drawings = read(args.data, generator.tokenizer.config.image_size[0])
    extractor = extractor_for(args.extractor, args.weights, CPU)
    classifier = Classifier.load(args.classifier, CPU)
    judge, metrics = Judge(drawings, extractor, classifier), {}
    names = generator.conditioning.classes.names or []
    if names != classifier.config.class_names:
        raise SystemExit(f"{args.classifier} is of {classifier.config.class_names}, {args.model} of {names}")

    def put(name: str, rows: list[int], images: Tensor) -> None:
        metrics[name] = judge(rows, images)
        print(name, json.dumps(metrics[name]), flush=True)
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            for what, found in ("real", drawings.images[rows[:200]]), ("drawn", images[:200]):
                contact_sheet(args.pictures / f"{name.replace(' ', '-')}-{what}.png", found)
            text = "\n".join(f"{names[drawings.styles[row]]}: {drawings.texts[row]}" for row in rows[:200])
            (args.pictures / f"{name.replace(' ', '-')}.txt").write_text(text + "\n")

    for split in SPLITS:
        rows = drawings.of(split)[: MOST_TRAINED if split == "train" and args.n is None else args.n]
        codes = torch.cat([generator.encode(part) for part in drawings.images[rows].split(64)])
        put(f"{split} reconstructed", rows, torch.cat([generator.decode(part) for part in codes.split(64)]))
        given = {
            "class": [drawings.styles[row] for row in rows],
            "text": as_read(generator, [drawings.texts[row] for row in rows]),
        }
        put(f"{split} from text", rows, generator.sample(len(rows), seed=args.seed, conditions=given).images)
        if not generator.conditioning.paired_source:
            continue
        paired = [row for row in rows if drawings.partner(row) is not None]
        sources = drawings.images[[drawings.partner(row) for row in paired]]
        given = {"class": [drawings.styles[row] for row in paired]}
        put(f"{split} from style", paired, generator.translate(sources, seed=args.seed, conditions=given).images)
    found = {
        "model": generator.prior.fingerprint,
        "tokenizer": generator.tokenizer.fingerprint,
        "classifier": classifier.fingerprint,
        "extractor": [args.extractor, extractor.fingerprint],
        "settings": dict(generator.recommended),
        "seed": args.seed,
        "environment": environment(CPU, generator.precision, 1),
        "metrics": metrics,
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
