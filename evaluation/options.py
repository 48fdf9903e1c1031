"""Options of the commands of vqgen-eval."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from vqgen.errors import UsageError
from vqgen.files import cache_folder
from vqgen.options import (
    MOST_IMAGES,
    Count,
    CountOrZero,
    NotNegative,
    Options,
    Positive,
    Range,
    Seed,
    Share,
    Size,
    option_name,
)
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.data.options import Split, Workers
from vqgen.tokenizer.losses.options import PerceptualOptions

Network = Literal["inception", "fd-vgg16", "fd-efficientnet-lite0"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Holdout = Annotated[float, Range(above=0, below=1)]


SMALLEST = 16
"""Pixels a side that a classifier needs."""


@dataclass(kw_only=True)
class DeviceOptions(Options):
    """Where a command computes."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(kw_only=True)
class DecodingOptions(DeviceOptions):
    """How images of --data are decoded."""

    max_broken: Share = 0.01
    """Largest share of broken images that is skipped, as for vqgen-train-tokenizer."""
    batch_size: Size = 64
    """Images per batch."""
    workers: Workers = 0
    """Processes that decode images; -1 = one per free core."""


@dataclass(kw_only=True)
class ReadingOptions(DecodingOptions):
    """How images of --data are read that a run may have held out."""

    holdout: Holdout | None = None
    """Share of the images held out if the source has no validation split; by default that of the run, where it is
    recorded, else 0.05."""


@dataclass(kw_only=True)
class ExtractorOptions(Options):
    """Weights of the network whose features are compared."""

    extractor: Literal["none"] | Network = "none"
    """Feature extractor; none = features are not compared."""
    weights: str | None = None
    """Weights of --extractor: a local file, or download; fd-efficientnet-lite0 has them from an installed package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor == "none" and self.weights:
            raise UsageError("--weights: found with --extractor none, which has none; name the extractor they are for")


def refuse_drawing(config: Any, where: str, *others: str) -> None:
    """Raise `UsageError` for settings of drawing, or values of `others`, that are not the defaults."""
    plain = {name: getattr(type(config), name) for name in others} | vars(SamplingSettings())
    for name, value in {**{name: getattr(config, name) for name in others}, **vars(config.sampling)}.items():
        if value != plain[name]:
            raise UsageError(f"{option_name(name)}: found {value} with {where}; leave it out")


@dataclass(kw_only=True)
class ReconstructionConfig(PerceptualOptions, ExtractorOptions, ReadingOptions):
    """Options of `vqgen-eval reconstruction`."""

    COMMON: ClassVar = ("tokenizer", "data", "split", "n", "output", "perceptual_weights", "extractor", "weights")

    tokenizer: Path
    """Run or model folder of the tokenizer, or the name of a model in the package."""
    data: str
    """Images: as for vqgen-train-tokenizer."""
    split: Split = "heldout"
    """Split of the images; publish metrics of test, on which no model was selected."""
    n: CountOrZero = 0
    """Images to measure, always the same ones, spread over the split; 0 = all."""
    output: Path | None = None
    """Receipt to write or replace; by default reconstruction-SPLIT.json in --tokenizer, where vqgen-report finds it."""
    extractor: Literal["none"] | Network = "none"
    """Feature extractor of the distance of reconstructions from originals (rFID with inception); none = no distance."""
    precision: Precision = "fp32"
    """Autocast of the tokenizer; metrics are computed in float32."""


@dataclass
class LikelihoodConfig(Options):
    """Options of `vqgen-eval likelihood`."""

    COMMON: ClassVar = ("model", "codes", "split", "n", "output", "map")

    model: Path
    """Run or model folder of the prior."""
    codes: Path
    """Folder of code files made by the tokenizer that the prior was trained with."""
    split: Split = "heldout"
    """Split of the code files; publish metrics of test, on which no model was selected."""
    n: CountOrZero = 0
    """Images to measure, always the same ones, spread over the split; 0 = all."""
    unconditional: bool = False
    """Leave out the class and every other condition that training has images without, as classifier-free guidance
    does."""
    output: Path | None = None
    """Receipt to write or replace; by default likelihood-SPLIT.json in --model, where vqgen-report finds it; other
    options that change the result are part of the name."""
    map: Path | None = None
    """PNG file for the heat map of the NLL by position."""
    batch_size: Size = 64
    """Images per batch."""
    precision: Precision = "fp32"
    """Autocast; auto takes 16 bits if the hardware supports them: faster, and the NLL changes by about 0.1 %."""


@dataclass(kw_only=True)
class SamplesConfig(ExtractorOptions, ReadingOptions):
    """Options of `vqgen-eval samples`."""

    COMMON: ClassVar = ("model", "samples", "data", "split", "n", "output", "extractor", "weights", "classifier", "at")

    data: str = ""
    """Real images to compare with: as for vqgen-train-tokenizer."""
    samples: Path | None = None
    """Folder written by vqgen-sample, or any folder of images; or --model."""
    model: Path | None = None
    """Prior to draw samples from; no image is written."""
    n: Annotated[int, Range(least=0, most=MOST_IMAGES)] = 0
    """Samples to measure: the first of vqgen-sample, a fixed subset of another folder; 0 = all, 10,000 of --model."""
    split: Split = "train"
    """Split of the real images."""
    reference_n: CountOrZero = 0
    """Real images to compare with, always the same ones, spread over the split; 0 = all."""
    fit: Literal["crop", "pad"] | None = None
    """How real images are brought to the size of --samples, by default as those in training were where samples.json
    says that, else crop. With --model the tokenizer decides."""
    at: list[Annotated[int, Range(least=2)]] = field(default_factory=list)
    """Also report the metrics of the first N samples, for each N: distances depend on the number of samples."""
    output: Path | None = None
    """Receipt to write or replace; by default receipt.json in the current folder."""
    extractor: Literal["none"] | Network = "inception"
    """Network whose features are compared: inception for FID, fd-vgg16, fd-efficientnet-lite0,
    or none to use --classifier alone."""
    classifier: Path | None = None
    """Classifier of `vqgen-eval classifier`, to measure how many samples are of the class they were drawn as."""
    cache: Path = field(default_factory=lambda: cache_folder() / "references")
    """Folder that keeps the feature statistics of real images for later evaluations; in $XDG_CACHE_HOME where it is
    set."""
    seed: Seed = 0
    """Seed of the samples of --model."""
    precision: Precision = "auto"
    """Arithmetic of --model; features are computed in float32."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        # Before what is said of --weights, which such a call does not need.
        if self.extractor == "none" and self.classifier is None:
            raise UsageError("--extractor: found none and no --classifier, so there is nothing to measure; give one")
        super().__post_init__()
        if self.extractor != "none" and not self.data:
            raise UsageError("--data: found nothing; name the real images to compare with, or use --extractor none")
        if (self.samples is None) == (self.model is None):
            raise UsageError("--samples or --model: give one of them, the samples or the prior to draw them from")
        if self.extractor == "none" and self.reference_n:
            text = f"found {self.reference_n} with --extractor none, which compares with no real images"
            raise UsageError(f"--reference-n: {text}; leave it out")
        if self.model is not None and self.fit:
            raise UsageError(f"--fit: found {self.fit} with --model, whose tokenizer decides; leave it out")
        if self.samples is not None:
            refuse_drawing(self, "--samples, which are drawn", "seed", "precision")


@dataclass(kw_only=True)
class ClassifierTraining(DecodingOptions):
    """Options of `vqgen-eval classifier`."""

    COMMON: ClassVar = ("data", "output", "size", "channels", "steps")

    data: str
    """Labelled images: as for vqgen-train-tokenizer."""
    output: Path
    """Folder for the classifier; must be new or empty."""
    size: list[Size]
    """Height and width in pixels of the samples to classify, at least 16 a side; one number means a square."""
    channels: int = 3
    """3 for colour, 1 for grey."""
    steps: Count = 3000
    """Optimizer steps."""
    batch_size: Size = 64
    """Images per step."""
    lr: Positive = 4e-3
    """Peak learning rate of AdamW under a one-cycle schedule."""
    width: Size = 32
    """Channels at the first level."""
    holdout: Holdout = 0.05
    """Share of the images held out if the source has no validation split."""
    flip: bool = True
    """Mirror half of the training images at random; --no-flip for digits, letters and the like."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the images and the flips."""
    fit: Literal["crop", "pad"] = "crop"
    """How images of another aspect ratio are fitted: as those of the samples were."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 8:
            raise UsageError(f"--width: found {self.width}, expected a multiple of 8")
        if min(self.size) < SMALLEST:
            found = " ".join(map(str, self.size))
            raise UsageError(f"--size: found {found}, expected at least {SMALLEST} pixels a side")


@dataclass
class CodebookConfig(Options):
    """Options of `vqgen-eval codebook`."""

    tokenizer: Path
    """Run or model folder of the tokenizer, or the name of a model in the package."""
    codes: Path | None = None
    """Folder of code files made by the tokenizer, to count how often each code is used; none = codes in order of
    index."""
    neighbours: list[int] = field(default_factory=list)
    """Codes whose nearest codes are listed; with several depths, depth * codebook size + code."""
    k: Count = 8
    """Number of nearest codes."""
    output: Path = Path("codebook")
    """Folder for atlas.png, codebook.json and neighbours.png, which are replaced there."""


@dataclass
class ReplayConfig(Options):
    """Options of `vqgen-eval replay`: receipts, and where this machine keeps what they were measured on."""

    COMMON: ClassVar = (
        "receipts", "tolerance", "data", "tokenizer", "samples", "model", "codes", "classifier", "weights",
        "perceptual_weights", "device", "without_classifier",
    )  # fmt: skip

    receipts: list[Path] = field(metadata={"positional": "RECEIPT"})
    """Receipts to measure again."""
    tolerance: NotNegative = 1e-3
    """Largest relative difference of a metric that counts as the same."""
    data: str | None = None
    """In place of the receipts' --data; likewise the options below."""
    split: Split | None = None
    """Split of the images or code files."""
    tokenizer: Path | None = None
    """Run or model folder of the tokenizer."""
    samples: Path | None = None
    """Folder of samples."""
    model: Path | None = None
    """Run or model folder of the prior."""
    plain: Path | None = None
    """Run or model folder of the plain prior beside it."""
    source_data: str | None = None
    """Data of the partners of the images."""
    codes: Path | None = None
    """Folder of code files."""
    classifier: Path | None = None
    """Folder of the classifier."""
    weights: str | None = None
    """Weights of the extractor."""
    perceptual_weights: str | None = None
    """Convolutions of the LPIPS backbone."""
    cache: Path | None = None
    """Folder of the feature statistics of real images; the receipt's own is never used, as it was another machine's."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    without_classifier: bool = False
    """Leave out the metrics of the classifier, if it is not available."""
