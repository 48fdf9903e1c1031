"""Which program reads which input, and what its result must equal."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from . import stock
from .oracles import (
    Oracle,
    codes_of_images,
    damage_is_found,
    finite,
    nothing,
    rows_of_table,
    same,
    same_but_shards,
    same_or_said,
)

WEIGHTS = ("model.safetensors", "*/model.safetensors")
SHARDS = ("codes-*.safetensors",)
PNG = ("*.png",)


@dataclass(frozen=True)
class Scenario:
    """A command line on valid inputs, and which of these are mutated."""

    kind: str
    """Row of the table."""
    words: Sequence[str]
    inputs: tuple[str, ...]
    """Paths in the stock that the program reads, its output included where it continues one."""
    targets: tuple[str, ...]
    """Patterns of the files that are mutated; none for command lines."""
    results: tuple[str, ...]
    """Patterns of what the program computes, in its output."""
    oracle: Oracle = same_or_said
    weight: int = 1

    @property
    def name(self) -> str:
        """What identifies it in reports, e.g. for its control."""
        return f"{self.kind}: {' '.join(self.words)}"

    @property
    def program(self) -> str:
        """The program, with its command where it has several."""
        return " ".join(self.words[:2]) if self.words[0] == "vqgen-eval" else self.words[0]

    @property
    def output(self) -> str:
        """What the program may write."""
        return self.words[self.words.index("--output") + 1] if "--output" in self.words else "nowhere"

    @property
    def planted(self) -> bool:
        """Whether the output holds files of the user besides."""
        return self.output in self.inputs


def _to(words: Sequence[str], output: str = "out", *more: str) -> list[str]:
    return [*(words.split() if isinstance(words, str) else words), "--output", output, *more]


def _short(words: Sequence[str], steps: int = 2) -> list[str]:
    return [*words, "--steps", str(steps)]


def _images() -> list[Scenario]:
    both, targets = ("images", "tokenizer"), ("images/train/*/*",)
    encode = Scenario("images", _to(stock.CODES_RUN), both, targets, SHARDS, codes_of_images, 6)
    pictures = "vqgen-reconstruct images/train --tokenizer tokenizer --split train --holdout 0.5 --precision fp32"
    one = "images/train/cat/00-rgb.png"
    drawn = f"vqgen-sample --model prior --n 4 --batch-size 4 --precision fp32 --init-image {one}"
    return [
        encode,
        replace(encode, words=[*encode.words, "--workers", "2"], weight=1),
        Scenario("images", _to(_short(stock.TOKENIZER_RUN)), ("images",), targets, WEIGHTS, nothing),
        Scenario("images", _to(pictures), both, targets, PNG, nothing),
        Scenario("images", _to(drawn), ("images", "prior"), (one,), PNG, nothing),
        Scenario("images", _to(stock.CLASSIFIER), ("images",), targets, (), nothing),
    ]


def _tables() -> list[Scenario]:
    words = "vqgen-tokenize --tokenizer tokenizer --max-broken 0.5 --data"
    saved = ("dataset/*", "dataset/*/*")
    return [
        *(
            Scenario(
                "parquet", _to(f"{words} {name}"), (name, "tokenizer"), (f"{name}/*.parquet",), SHARDS, rows_of_table, 2
            )
            for name in ("parquet-bytes", "parquet-struct", "parquet-paths")
        ),
        Scenario("datasets", _to(f"{words} dataset"), ("dataset", "tokenizer"), saved, SHARDS, nothing, 2),
    ]


MEASURED = "vqgen-eval likelihood --model prior --codes codes"


def _models() -> list[Scenario]:
    """Model folders, read by whoever uses them."""
    one, prior = ("tokenizer/vqgen.json", "tokenizer/model.safetensors"), ("prior/*", "prior/tokenizer/*")
    both = ("images", "tokenizer")
    measured = "vqgen-eval reconstruction --tokenizer tokenizer --data images --precision fp32"
    codebook = "vqgen-eval codebook --tokenizer tokenizer --codes codes"
    model = partial(Scenario, "model folders")
    return [
        model(_to(stock.CODES_RUN), both, one, SHARDS, weight=2),
        model(_to(measured, "r.json"), both, one, (".",)),
        model(_to(stock.SAMPLES_RUN), ("prior",), prior, PNG, weight=4),
        model(_to(MEASURED, "r.json"), ("prior", "codes"), prior, (".",)),
        model(_to("vqgen-export --model prior"), ("prior",), prior, WEIGHTS),
        model(_to("vqgen-export --model prior --to vqgen"), ("prior",), prior, WEIGHTS),
        model(_to("vqgen-convert --input tokenizer --to diffusers"), ("tokenizer",), one, ("*.safetensors",)),
        model(_to(codebook), ("tokenizer", "codes"), one, PNG),
    ]


def _codes() -> list[Scenario]:
    targets = ("codes/*", "codes/*.json", "codes/codes-*", "codes/tokenizer/*")
    stopped, sources = "codes-stopped", ("images", "tokenizer")
    codes = partial(Scenario, "code files")
    return [
        codes(_to(_short(stock.PRIOR_RUN)), ("codes",), targets, WEIGHTS, weight=4),
        codes(_to(MEASURED, "r.json"), ("prior", "codes"), targets, (".",)),
        codes(_to("vqgen-tokenize --verify", "codes"), ("codes",), targets, (), damage_is_found, 2),
        codes(_to(stock.CODES_RUN, stopped), (*sources, stopped), (f"{stopped}/*",), SHARDS, same_but_shards, 2),
        codes(_to(stock.CODES_RUN, "codes", "--overwrite"), (*sources, "codes"), targets, SHARDS, same),
    ]


def _runs() -> list[Scenario]:
    """Run folders: resumed, replaced, lengthened, shown."""
    found = []
    for words, name, other in ((stock.TOKENIZER_RUN, "tokenizer", "images"), (stock.PRIOR_RUN, "prior", "codes")):
        stopped = f"{name}-stopped"
        targets = (f"{stopped}/*", f"{stopped}/checkpoints/*/*", f"{stopped}/checkpoints/step-00000004/*")
        resumed, both = ("model.safetensors", "checkpoints/step-00000006/*.safetensors"), (other, name)
        done = (f"{name}/*", f"{name}/checkpoints/*/*")
        run = partial(Scenario, "run folders")
        found += [
            Scenario("checkpoints", _to(words, stopped), (other, stopped), targets, resumed, same, 5),
            run(_to(words, name, "--overwrite"), both, done, resumed, same, 2),
            run(_to(words, name), both, done, (), nothing),
            run(_to(_short(words, 8), name), both, done, (), nothing),
            run(_to(f"vqgen-report {name}", "report.html"), (name,), done, (), nothing),
        ]
    return found


def _samples() -> list[Scenario]:
    listed, stopped = ("samples/*", "samples/samples.json"), "samples-stopped"
    partly = (f"{stopped}/*", f"{stopped}/samples.partial.json")
    pictures = ("pictures/*", "pictures/metrics.json")
    classified = "vqgen-eval samples --samples samples --extractor none --classifier classifier --data images"
    again, compare = _to(stock.SAMPLES_RUN, "samples"), _to(stock.RECONSTRUCT_RUN, "pictures", "--overwrite")
    samples, inputs = partial(Scenario, "samples"), ("prior", "samples")
    return [
        samples(again, inputs, listed, PNG, same, 2),
        samples([*again, "--overwrite"], inputs, listed, PNG, same, 2),
        samples(_to(stock.SAMPLES_RUN, stopped), ("prior", stopped), partly, PNG, same, 2),
        samples(compare, ("images", "tokenizer", "pictures"), pictures, PNG, same, 2),
        samples(
            _to(classified, "r.json"), ("samples", "classifier", "images"), (*listed, "classifier/*"), (".",), nothing
        ),
    ]


def _archives() -> list[Scenario]:
    restored, inputs = "vqgen-decompress archive --model prior", ("archive", "prior")
    packed = Scenario("images", _to(stock.COMPRESS_RUN), ("images", "prior"), ("images/train/cat/*",), (), nothing)
    return [Scenario("archives", _to(restored), inputs, ("archive/*", "archive/images.vqc"), PNG, same, 3), packed]


def _configs() -> list[Scenario]:
    def config(words: str, name: str, inputs: tuple[str, ...], results: tuple[str, ...], weight: int = 1) -> Scenario:
        file = f"configs/{name}.yaml"
        line = _to(words.replace("FILE", file))
        return Scenario("configurations", line, (*inputs, file), ("configs/*",), results, weight=weight)

    return [
        config("vqgen-train-tokenizer --config FILE --steps 2", "tokenizer", ("images",), WEIGHTS, 3),
        config("vqgen-train-prior --config FILE --steps 2", "prior", ("codes",), WEIGHTS, 2),
        config("vqgen-tokenize --config FILE --views 2", "codes", ("images", "tokenizer"), SHARDS),
        config("vqgen-sample --config FILE --model prior --n 4", "samples", ("prior",), PNG),
    ]


def _foreign() -> list[Scenario]:
    """Weights of other projects."""
    foreign, found = partial(Scenario, "foreign weights"), []
    for name in ("taming.ckpt", "taming.safetensors", "llamagen.pt", "llamagen.safetensors"):
        about, file = stock.FOREIGN[name.partition(".")[0]], f"foreign/{name}"
        found.append(foreign(_to(f"vqgen-convert --input {file} {about}"), (file,), (file,), WEIGHTS, finite))
    config, files = "foreign/taming.yaml", ("foreign/taming.ckpt", "foreign/taming.yaml")
    words = _to(f"vqgen-convert --input {files[0]} --taming-config {config}")
    lpips = _to(_short(["vqgen-train-tokenizer", "--data", "images", *stock.LPIPS]))
    return [
        *found,
        foreign(words, files, (config,), WEIGHTS, finite),
        foreign(
            _to("vqgen-convert --input diffusers --size 16 16"), ("diffusers",), ("diffusers/*",), WEIGHTS, finite, 2
        ),
        foreign(lpips, ("images", "lpips"), ("lpips/*",), WEIGHTS, nothing),
    ]


def _receipts() -> list[Scenario]:
    receipt, histories = "receipts/likelihood.json", ("tokenizer/metrics.jsonl", "tokenizer/machine.json")
    replay = f"vqgen-eval replay {receipt} receipts/reconstruction.json".split()
    inputs = ("prior", "codes", "tokenizer", "images", "receipts")
    shown = _to("vqgen-report tokenizer", "report.html")
    receipts = partial(Scenario, "receipts")
    return [
        receipts(replay, inputs, ("receipts/*",), (), nothing, 2),
        receipts(_to(MEASURED, receipt), ("prior", "codes", "receipts"), (receipt,), (".",), same),
        receipts(shown, ("tokenizer", "images"), histories, (), nothing),
    ]


def scenarios() -> list[Scenario]:
    """All of them, each as often as its weight says; command lines are those of the others."""
    found = [
        *_images(),
        *_tables(),
        *_models(),
        *_codes(),
        *_runs(),
        *_samples(),
        *_archives(),
        *_configs(),
        *_foreign(),
        *_receipts(),
    ]
    lines: dict[str, Scenario] = {}
    for each in found:
        if each.kind != "foreign weights":
            fresh = replace(each, kind="command lines", targets=(), oracle=nothing, weight=1)
            lines.setdefault(each.program, fresh)
    return [*found, *lines.values()]
