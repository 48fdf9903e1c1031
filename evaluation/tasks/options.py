"""Options of the commands of vqgen-eval that measure uses of a prior."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from vqgen.errors import UsageError
from vqgen.evaluation.options import DeviceOptions, ExtractorOptions, Network, Precision, ReadingOptions, refuse_drawing
from vqgen.options import (
    MOST_IMAGES,
    Count,
    CountOrZero,
    Few,
    Positive,
    Range,
    Seed,
    Share,
    Size,
    option_name,
)
from vqgen.sampling.sample import check_boxes
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.data.options import Split
from vqgen.tokenizer.losses.options import PerceptualOptions


@dataclass
class TaskConfig(ReadingOptions):
    """Options of every measurement of a prior on images of --data."""

    model: Path
    """Run or model folder of the prior."""
    data: str
    """Images: as for vqgen-train-tokenizer."""
    split: Split = "heldout"
    """Split of the images; publish metrics of test, on which no model was selected."""
    n: CountOrZero = 0
    """Images to measure, always the same ones, spread over the split; 0 = all."""
    output: Path | None = None
    """Receipt to write or replace; by default COMMAND-SPLIT.json in --model, where vqgen-report finds it."""
    seed: Seed = 0
    """Seed of what is drawn."""
    precision: Precision = "fp32"
    """Arithmetic of the prior; auto takes 16 bits if the hardware supports them, and the NLL changes by about 0.1 %."""
    unconditional: bool = False
    """Leave out the class of every image."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass
class PicturesConfig(PerceptualOptions, TaskConfig):
    """Options of every measurement that compares images that are drawn with those of --data."""

    text_column: str | None = None
    """Where the captions of --data are, as for vqgen-tokenize, for a prior that reads text; none = it is given none."""


@dataclass
class InpaintingConfig(PicturesConfig):
    """Options of `vqgen-eval inpainting`."""

    COMMON: ClassVar = ("model", "data", "split", "n", "box", "plain", "output", "perceptual_weights")

    box: list[CountOrZero] | None = None
    """The hole in pixels of the fitted images: X Y WIDTH HEIGHT, one rectangle or several; by default the central half
    of the height and of the width."""
    plain: Path | None = None
    """Another prior of the same tokenizer, whose NLL of the hole given the codes before it is reported beside."""
    fillings: Annotated[int, Range(least=2, most=100)] = 10
    """Fillings of one image whose differences are measured."""
    diverse: Annotated[int, Range(least=1, most=10_000)] = 20
    """Images of which so many fillings are drawn: the first of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_boxes(self.box)


@dataclass
class TranslationConfig(PicturesConfig):
    """Options of `vqgen-eval translation`."""

    COMMON: ClassVar = ("model", "data", "split", "n", "source", "source_data", "output", "perceptual_weights")

    source: list[str] = field(default_factory=list)
    """Degradations of the images as for vqgen-tokenize, one after the other; by default those that the prior was
    trained on."""
    source_data: str | None = None
    """In place of --source the data in which each image of --data has the partner that it is translated from."""
    pair_by: str = "name"
    """What partners have in common, as for vqgen-tokenize: a column of tables, or for folders `name`."""
    unpaired: Literal["error", "skip"] = "error"
    """Images without a partner end the measurement with an error, or are left out."""
    paste: bool = True
    """Keep what the source shows exactly, as vqgen-sample does for priors trained on --source grey."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_data and self.source:
            raise UsageError("--source: found with --source-data; give one of them")
        for name, default in ("pair_by", "name"), ("unpaired", "error"):
            if (found := getattr(self, name)) != default and not self.source_data:
                raise UsageError(f"{option_name(name)}: found {found} without --source-data; add it, or leave it out")


@dataclass(kw_only=True)
class TextConfig(ExtractorOptions, TaskConfig):
    """Options of `vqgen-eval text`."""

    COMMON: ClassVar = (
        "model", "data", "text_column", "split", "n", "output", "extractor", "weights", "guidance_scale",
    )  # fmt: skip

    text_column: str = "text"
    """Where the captions of --data are, as for vqgen-tokenize."""
    n: Annotated[int, Range(least=2, most=1000)] = 100
    """Captions that are ranked, all different, with one image each, always the same ones, spread over the split."""
    per_prompt: Few = 1
    """Images drawn of each caption."""
    extractor: Literal["none"] | Network = "fd-vgg16"
    """Network whose features are compared; none = rank by the prior's likelihood alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor == "none":
            refuse_drawing(self, "--extractor none, for which nothing is drawn", "seed", "per_prompt")


@dataclass
class WindowsConfig(DeviceOptions):
    """Options of `vqgen-eval windows`."""

    COMMON: ClassVar = ("model", "size", "n", "output", "seed")

    model: Path
    """Run or model folder of the prior."""
    size: list[Size]
    """Height and width of the images in pixels, larger than in training."""
    n: Annotated[int, Range(least=1, most=MOST_IMAGES)] = 100
    """Images to draw."""
    output: Path | None = None
    """Receipt to write or replace; by default windows.json in --model, where vqgen-report finds it."""
    seed: Seed = 0
    """Seed of the images."""
    batch_size: Size = 64
    """Images per batch."""
    precision: Precision = "fp32"
    """Arithmetic of the prior; auto takes 16 bits if the hardware supports them."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass(kw_only=True)
class AccuracyConfig(ReadingOptions):
    """Options of `vqgen-eval accuracy`."""

    COMMON: ClassVar = ("samples", "data", "split", "n", "tokenizer", "output", "seeds", "steps")

    samples: Path
    """Labelled samples: a folder written by vqgen-sample, or any folder of images whose subfolders are classes."""
    data: str
    """Real images of the same classes: as for vqgen-train-tokenizer. Those of train are what samples compete with."""
    split: Literal["heldout", "test"] = "test"
    """Split of the real images on which the classifiers are tested; of heldout a model may have been selected."""
    n: CountOrZero = 0
    """Images in each training set: the first samples, and as many real ones; 0 = all samples."""
    tokenizer: Path | None = None
    """Run or model folder of a tokenizer, whose reconstructions of the real images are a third training set."""
    output: Path | None = None
    """Receipt to write or replace; by default receipt.json in the current folder."""
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    """One classifier of each training set is trained with each of these seeds; accuracies are means over them."""
    steps: Count = 1500
    """Optimizer steps of each classifier."""
    lr: Positive = 4e-3
    """Peak learning rate of AdamW under a one-cycle schedule."""
    width: Size = 32
    """Channels at the first level of the classifier, a multiple of 8."""
    flip: bool = True
    """Mirror half of the training images at random."""
    fit: Literal["crop", "pad"] | None = None
    """How real images are brought to the size of --samples, by default as those in training were where samples.json
    says that, else crop."""
    batch_size: Size = 64
    """Images per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 8:
            raise UsageError(f"--width: found {self.width}, expected a multiple of 8")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"--seeds: found {' '.join(map(str, self.seeds)) or 'none'}, expected different ones")


PARTS = 10
"""Parts of images without classes, over which the distance of samples from them has a standard error."""


def least_classes(count: int) -> float:
    """Of so many classes, how many have to have enough validation images for a search of settings."""
    return max(2, count / 2)


@dataclass
class SettingsConfig(ReadingOptions):
    """Options of `vqgen-eval settings`: a prior, what its samples are judged by, and candidates, all combined."""

    COMMON: ClassVar = (
        "model", "data", "classifier", "n", "temperature", "guidance_scale", "guidance_schedule", "min_p", "top_p",
        "output",
    )  # fmt: skip

    model: Path
    """Run or model folder of the prior, into which generation_config.json is written."""
    data: str
    """Real images: as for vqgen-train-tokenizer. Samples are compared with those of its heldout split."""
    classifier: Path | None = None
    """Classifier of `vqgen-eval classifier` of the same classes, trained on other images than those of heldout. By
    default one is trained on those of train, and not kept; without classes it learns how images are turned."""
    classifier_steps: Count = 600
    """Optimizer steps of a classifier that is trained here."""
    flip: bool = True
    """Mirror half of its training images at random; --no-flip for digits, letters and the like."""
    n: Annotated[int, Range(least=20, most=MOST_IMAGES)] = 1000
    """Images drawn with each candidate, always with the same random numbers."""
    temperature: list[Annotated[float, Range(above=0, most=1e6)]] = field(default_factory=lambda: [1.0])
    """Temperatures to try."""
    guidance_scale: list[Annotated[float, Range(least=0, most=1e6)]] = field(default_factory=lambda: [1.0, 1.5, 2.0])
    """Scales of classifier-free guidance to try; by default none but 1 for a prior that was never trained without a
    class, or has no classes."""
    guidance_schedule: list[Literal["constant", "linear", "cosine", "power-cosine"]] = field(
        default_factory=lambda: ["constant"]
    )
    """How guidance grows over the codes of an image, as for vqgen-sample."""
    min_p: list[Share] = field(default_factory=lambda: [0.0, 0.05, 0.1])
    """Values of min-p to try."""
    top_p: list[Annotated[float, Range(above=0, most=1)]] = field(default_factory=lambda: [1.0])
    """Values of top-p to try."""
    output: Path | None = None
    """Receipt to write or replace; by default settings.json in --model, with --n and the precision where these are not
    the defaults."""
    seed: Seed = 0
    """Seed of the samples."""
    precision: Precision = "fp32"
    """Arithmetic of the prior; auto takes 16 bits if the hardware supports them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classifier and (self.classifier_steps != type(self).classifier_steps or not self.flip):
            name = "--classifier-steps" if self.flip else "--no-flip"
            raise UsageError(f"{name}: found with --classifier, which is trained already; leave it out")
