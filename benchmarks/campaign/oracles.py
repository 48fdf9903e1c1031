"""What a program that ended well must have written. Each oracle returns what is wrong with the result, or ""."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .mutations import Change
from .place import Place
from .runner import Ended

TIMING = ("per_second", "mfu", "seconds", "peak_memory_gb")
"""Ends of the names of what metrics.jsonl has of time and memory, which differ from run to run."""
Results = dict[str, str]
"""Relative name of a result -> its digest."""


@dataclass(frozen=True)
class Run:
    """A program's run on mutated input, beside what it gives on the unmutated one."""

    place: Place
    stock: Path
    output: Path
    """Of the program."""
    target: str
    """The mutated file, relative to the current folder of the program; empty for command lines."""
    change: Change
    ended: Ended
    results: Results
    reference: Results
    reference_output: Path
    """What the program wrote for the unmutated input."""
    words: Sequence[str] = ()


Oracle = Callable[[Run], str]


def digests(output: Path, patterns: tuple[str, ...]) -> Results:
    """Digests of the results of a program; of JSON files the content, without what differs from run to run."""
    found = {}
    for path in sorted(output.rglob("*")) if output.is_dir() else [output]:
        name = path.relative_to(output).as_posix() if path != output else "."
        if path.is_file() and any(fnmatch(name, pattern) for pattern in patterns):
            found[name] = sha256(_lasting(path)).hexdigest()
    return found


def _lasting(path: Path) -> bytes:
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return json.dumps([{k: v for k, v in row.items() if not k.endswith(TIMING)} for row in rows]).encode()
    if path.suffix == ".json":
        tree = json.loads(path.read_text())
        if tree.get("kind") == "vqgen receipt":
            tree = {key: tree[key] for key in ("program", "metrics", "counts", "fingerprints")}
        return json.dumps(tree, sort_keys=True).encode()
    if path.suffix == ".png" and (pixels := _pixels(path, upright=False)) is not None:
        return pixels.tobytes()
    return path.read_bytes()


def nothing(run: Run) -> str:
    """Any result is right."""
    return ""


def same(run: Run) -> str:
    """The result equals that of unmutated input, whatever the mutation: the program's own or checksummed files."""
    for name, right in run.reference.items():
        if run.results.get(name) != right:
            return f"{name} is {'another' if name in run.results else 'missing'}"
    return ""


def same_but_shards(run: Run) -> str:
    """As `same`; of a run that has no manifest yet, nothing says what the codes of a shard were."""
    return "" if run.target.endswith(".safetensors") and (run.place.work / run.target).is_file() else same(run)


def _tree(path: Path) -> Any:
    try:
        text = path.read_bytes()
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def same_or_said(run: Run) -> str:
    """As `same`, but a description (JSON, YAML) whose content has changed describes something else."""
    path = run.place.work / run.target
    if path.suffix in (".json", ".yaml") and path.is_file() and path.stat().st_size < 1_000_000:
        now, before = _tree(path), _tree(run.stock / run.target)
        if now is not None and now != before:
            return ""
    return same(run)


def _codes(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, …) and labels (n,) of one split of code files."""
    from safetensors.numpy import load_file

    manifest = json.loads((folder / "manifest.json").read_text())
    shards = [load_file(folder / shard["file"]) for shard in manifest["splits"][split]["shards"]]
    return np.concatenate([s["codes"] for s in shards]), np.concatenate([s["labels"] for s in shards])


def _pixels(path: Path, upright: bool = True) -> np.ndarray | None:
    """Pixels of the first frame as Pillow reads them, upright as EXIF says; None where it cannot."""
    from PIL import Image, ImageOps

    if not path.is_file():  # a pipe would block
        return None
    try:
        with Image.open(path) as image:
            return np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGBA"))
    except Exception:  # decoders of damaged data raise errors of any type
        return None


def codes_of_images(run: Run) -> str:
    """Codes of every other image as without the mutation; those of this image too where Pillow sees the same pixels.

    Where Pillow cannot read the image, it must be named as broken and have no codes.
    """
    names = sorted(
        p.relative_to(run.stock / "images/train").as_posix() for p in (run.stock / "images/train").rglob("*.*")
    )
    now = sorted(
        p.relative_to(run.place.work / "images/train").as_posix()
        for p in (run.place.work / "images/train").rglob("*.*")
    )
    target = run.target.removeprefix("images/train/")
    if set(now) - set(names) or "swapped" in run.change.text or target not in names:
        return ""  # classes and rows are others
    codes, labels = _codes(run.output, "train")
    right, right_labels = _codes(run.reference_output, "train")
    row, dropped = names.index(target), len(right) - len(codes)
    if dropped > 1 and run.ended.err.count("skipped, broken") >= dropped:
        return ""  # a folder that cannot be read
    if dropped not in (0, 1):
        return f"{len(codes)} images of {len(right)}"
    others = np.arange(len(right)) != row
    left = others if dropped == 0 else np.ones(len(codes), dtype=bool)
    if not (np.array_equal(codes[left], right[others]) and np.array_equal(labels[left], right_labels[others])):
        return "codes or labels of other images changed"
    seen, before = _pixels(run.place.work / run.target), _pixels(run.stock / run.target)
    if dropped == 0 and seen is None:
        return f"{target} has codes, but Pillow cannot read it"
    if (
        dropped == 0
        and seen is not None
        and before is not None
        and np.array_equal(seen, before)
        and not np.array_equal(codes[row], right[row])
    ):
        return f"{target} has the same pixels and other codes"
    if dropped and (run.place.work / run.target).is_file() and "broken" not in run.ended.err:
        return f"{target} was left out without a word"
    return ""


def rows_of_table(run: Run) -> str:
    """Every row of the parquet files has codes or is named as broken, and labels are those of the files.

    Rows that name the secret file, which is outside of the data, must be broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = run.place.work / Path(run.target).parent
    try:
        tables = {split: pq.read_table(folder / f"{split}.parquet") for split in ("train", "validation")}
    except (pa.ArrowException, OSError):
        return ""
    if len(list(folder.glob("*.parquet"))) > 2 or any(t.schema.names != ["image", "label"] for t in tables.values()):
        return ""
    codes, labels = _codes(run.output, "train")
    broken = len(set(re.findall(r"broken: (\S+ row \d+|\S+)", run.ended.err)))
    if len(codes) + broken < tables["train"].num_rows:
        return f"{len(codes)} of {tables['train'].num_rows} rows, {broken} named as broken"
    for split, table in tables.items():
        for number, row in enumerate(table["image"].to_pylist()):
            place = f"{split}.parquet row {number}"
            if isinstance(row, dict) and "secret" in str(row.get("path")) and place not in run.ended.err:
                return f"{place} names a file of somebody else, which was read"
    raw = tables["train"]["label"]
    if raw.null_count < len(raw) and len(set(map(str, raw.to_pylist()))) > 1 and (labels < 0).all():
        return f"labels of type {raw.type} were dropped without a word"
    return ""


def finite(run: Run) -> str:
    """No weight that is not finite; weights that were not changed give the same result."""
    from safetensors.numpy import load_file

    for path in sorted(run.output.rglob("*.safetensors")):
        for name, values in load_file(path).items():
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                return f"{path.name}: {name} is not finite"
    return same_or_said(run) if not run.target.endswith((".safetensors", ".pt", ".ckpt")) else ""


def damage_is_found(run: Run) -> str:
    """A check that ends well has seen the bytes that were written."""
    shard = run.place.work / run.target
    if shard.suffix != ".safetensors" or "tokenizer/" in run.target or not shard.is_file():
        return ""
    return "damage was not found" if shard.read_bytes() != (run.stock / run.target).read_bytes() else ""
