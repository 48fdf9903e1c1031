"""Valid inputs of every kind, tiny, made once by the programs themselves."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from .runner import ROOT, Kill, Runner
from .zygote import MODULES

CLASSES = ("cat", "dog")
IMAGES = "--channels 3 --size 16 --max-broken 0.5".split()
TRAIN = (
    "--width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 --codebook-size 16 --code-dim 4 --batch-size 4 "
    "--validation-images 4 --precision fp32 --log-every 1 --validate-every 3 --checkpoint-every 2 --steps 6 --lr 1e-2 "
    "--lr-warmup 2"
).split()
PRIOR = (
    "--dim 16 --layers 1 --heads 2 --batch-size 4 --precision fp32 --log-every 1 --validate-every 3 --checkpoint-every "
    "2 --steps 6 --lr 1e-2 --lr-warmup 2 --preview-images 2"
).split()
LPIPS = [
    "--channels",
    "3",
    "--size",
    "32",
    *TRAIN,
    "--perceptual-net",
    "alex",
    "--perceptual-weights",
    "lpips/alex.safetensors",
]
TOKENIZER_RUN = ["vqgen-train-tokenizer", "--data", "images", *IMAGES, *TRAIN]
CODES_RUN = (
    "vqgen-tokenize --data images --tokenizer tokenizer --views 2 --flip --max-broken 0.5 --shard-size 8".split()
)
PRIOR_RUN = ["vqgen-train-prior", "--codes", "codes", *PRIOR]
SAMPLES_RUN = "vqgen-sample --model prior --n 8 --batch-size 4 --precision fp32 --seed 3".split()
RECONSTRUCT_RUN = "vqgen-reconstruct images --tokenizer tokenizer --split heldout --precision fp32".split()
COMPRESS_RUN = "vqgen-compress images/train/cat --model prior".split()
LIKELIHOOD = "vqgen-eval likelihood --model prior --codes codes".split()
CLASSIFIER = "vqgen-eval classifier --data images --size 16 --steps 3 --batch-size 4 --width 8".split()
FOREIGN = {"taming": "--size 32 32", "llamagen": "--size 16 16 --codebook-l2-norm true"}
"""Weights of other projects and what to say of them."""


def pictures() -> dict[str, bytes]:
    """File name -> bytes of images of six formats and the colour modes that people have."""
    random, found = np.random.default_rng(0), {}

    def add(name: str, image: Image.Image, **options: object) -> None:
        buffer = BytesIO()
        image.save(buffer, **options)  # type: ignore[arg-type]
        found[name] = buffer.getvalue()

    def colours(channels: int = 3, height: int = 20, width: int = 24) -> np.ndarray:
        coarse = random.integers(0, 256, (5, 6, channels), dtype=np.uint8)  # smooth areas, so that formats compress
        return np.kron(coarse, np.ones((height // 5, width // 6, 1), dtype=np.uint8))

    rgb = Image.fromarray(colours())
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a camera on its side"
    add("00-rgb.png", rgb, format="PNG")
    add("01-grey16.png", Image.fromarray(colours(1)[..., 0].astype(np.uint16) * 257), format="PNG")
    add("02-palette.png", rgb.quantize(16), format="PNG", transparency=3)
    add("03-alpha.png", Image.fromarray(colours(4), "RGBA"), format="PNG")
    add("04-rgb.jpg", Image.fromarray(colours()), format="JPEG", quality=90)
    add("05-exif.jpeg", Image.fromarray(colours()), format="JPEG", exif=exif)
    add("06-cmyk.jpg", Image.fromarray(colours(4), "CMYK"), format="JPEG")
    add("07-lossy.webp", Image.fromarray(colours()), format="WEBP")
    frames = [Image.fromarray(colours()).quantize(16) for _ in range(3)]
    add("08-moving.gif", frames[0], format="GIF", save_all=True, append_images=frames[1:])
    add("09-rgb.bmp", Image.fromarray(colours()), format="BMP")
    add("10-lzw.tiff", Image.fromarray(colours()), format="TIFF", compression="tiff_lzw")
    add("11-progressive.jpg", Image.fromarray(colours()), format="JPEG", progressive=True)
    return found


def _images(folder: Path) -> None:
    for label, name in enumerate(CLASSES):
        for split in ("train", "val"):
            place = folder / split / name
            place.mkdir(parents=True)
            for number, (file, data) in enumerate(pictures().items()):
                if split == "train" or number % 4 == label:
                    (place / file).write_bytes(data)


def _tables(folder: Path) -> None:
    """Parquet files and a `save_to_disk` dataset; own process, as `datasets` and pyarrow start threads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = list(pictures().items()) * 2
    labels = pa.array([number % 2 for number in range(len(files))], pa.int64())
    plain = pa.table({"image": pa.array([data for _, data in files], pa.binary()), "label": labels})
    structs = pa.array([{"bytes": data, "path": name} for name, data in files])
    paths = pa.array([{"bytes": None if i % 3 == 0 else d, "path": n} for i, (n, d) in enumerate(files)])
    for name, column in {"parquet-bytes": plain["image"], "parquet-struct": structs, "parquet-paths": paths}.items():
        (folder / name).mkdir()
        pq.write_table(pa.table({"image": column, "label": labels}), folder / name / "train.parquet")
        pq.write_table(pa.table({"image": column[:4], "label": labels[:4]}), folder / name / "validation.parquet")
    for name, data in pictures().items():
        (folder / "parquet-paths" / name).write_bytes(data)
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    both = {}
    for split, count in (("train", len(files)), ("validation", 4)):
        rows = {"image": [{"bytes": d, "path": n} for n, d in files[:count]], "label": labels.to_pylist()[:count]}
        both[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(both).save_to_disk(str(folder / "dataset"))


def _weights(folder: Path) -> None:
    """Weights of other projects, and an LPIPS backbone of random numbers; own process, as torch starts threads."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models import alexnet

    sys.path.insert(0, str(ROOT / "tests"))
    spec = importlib.util.spec_from_file_location("test_convert", ROOT / "tests" / "test_convert.py")
    assert spec and spec.loader
    tests = importlib.util.module_from_spec(spec)
    sys.modules["test_convert"] = tests
    spec.loader.exec_module(tests)
    (folder / "foreign").mkdir()
    taming, llamagen = (tests.fixture(name) for name in FOREIGN)
    tests.save_lightning(folder / "foreign" / "taming.ckpt", taming.weights)
    torch.save({"model": llamagen.weights, "steps": 10}, folder / "foreign" / "llamagen.pt")
    save_file(taming.weights, folder / "foreign" / "taming.safetensors")
    save_file(llamagen.weights, folder / "foreign" / "llamagen.safetensors")
    params = {**taming.arguments, "lossconfig": {"target": "x.Loss"}}
    text = json.dumps({"model": {"target": "x.VQModel", "params": params}}, indent=1)  # JSON is YAML
    (folder / "foreign" / "taming.yaml").write_text(text)
    torch.manual_seed(0)
    (folder / "lpips").mkdir()
    backbone = {k: v for k, v in alexnet(weights=None).state_dict().items() if k.startswith("features.")}
    save_file(backbone, folder / "lpips" / "alex.safetensors")


def _configs(folder: Path) -> None:
    """The options of each program as YAML."""
    folder.mkdir()
    for name in ("tokenizer", "prior", "codes"):
        shutil.copy(folder.parent / name / "config.yaml", folder / f"{name}.yaml")
    lines = [
        "n: 4",
        "batch_size: 4",
        "seed: 3",
        "precision: fp32",
        "class: [cat, dog]",
        "sampling:",
        "  temperature: 0.9",
        "  top_k: 8",
    ]
    (folder / "samples.yaml").write_text("\n".join(lines) + "\n")


def _options(folder: Path, run: Runner) -> None:
    """The options of each program, one a line."""
    measured = [f"vqgen-eval {name}" for name in "reconstruction likelihood samples classifier codebook replay".split()]
    for program in (*(name for name in MODULES if name != "vqgen-eval"), *measured):
        shown = run.run([*program.split(), "--help-all"], folder, folder / ".home").out
        found = sorted(set(re.findall(r"^  (--[a-z][a-z-]*)", shown, re.MULTILINE)))
        (folder / f"options-{program.replace(' ', '-')}.txt").write_text("\n".join(found))


def make(folder: Path, run: Runner) -> None:
    """Make all inputs in `folder`, an empty one. Raises `RuntimeError` where a program fails on valid input."""
    _images(folder / "images")
    code = "import sys; from pathlib import Path; from benchmarks.campaign import stock; "
    for part in ("_tables", "_weights"):
        words = [sys.executable, "-c", code + f"stock.{part}(Path(sys.argv[1]))", str(folder)]
        subprocess.run(words, cwd=ROOT, check=True)

    def do(words: Sequence[str], output: str, kill: Kill | None = None) -> None:
        ended = run.run([*words, "--output", output], folder, folder / ".home", kill)
        ended.expect(words, -9 if kill else 0)

    do(TOKENIZER_RUN, "tokenizer")
    do(TOKENIZER_RUN, "tokenizer-stopped", Kill(1, "step-00000006"))
    do(CODES_RUN, "codes")
    do(CODES_RUN, "codes-stopped", Kill(1, "codes-00002"))
    do(PRIOR_RUN, "prior")
    do(PRIOR_RUN, "prior-stopped", Kill(1, "step-00000006"))
    do(SAMPLES_RUN, "samples")
    do(SAMPLES_RUN, "samples-stopped", Kill(1, "00005.png"))
    do(RECONSTRUCT_RUN, "pictures")
    do(COMPRESS_RUN, "archive")
    do("vqgen-convert --input tokenizer --to diffusers".split(), "diffusers")
    (folder / "receipts").mkdir()
    do(LIKELIHOOD, "receipts/likelihood.json")
    words = "vqgen-eval reconstruction --tokenizer tokenizer --data images --precision fp32".split()
    do(words, "receipts/reconstruction.json")
    do(CLASSIFIER, "classifier")
    _configs(folder / "configs")
    _options(folder, run)
