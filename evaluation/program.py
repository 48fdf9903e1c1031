"""vqgen-eval: metrics of reconstructions, priors and samples, each with a receipt by which it can be measured again."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqgen.config import commands, values_of
from vqgen.config import options as known_options
from vqgen.errors import UsageError
from vqgen.evaluation.tasks.options import (
    AccuracyConfig,
    InpaintingConfig,
    SettingsConfig,
    TextConfig,
    TranslationConfig,
    WindowsConfig,
)
from vqgen.metric import written
from vqgen.options import option_name

from . import options
from .receipt import flatten, read_receipt, write_receipt

if TYPE_CHECKING:
    from .measurement import Measurement


def _measure_with_receipt(program: str, config: Any, write: "Callable[[Any, Measurement], None] | None" = None) -> None:
    """Measure; the main process prints the metrics, writes what follows from them, and then the receipt."""
    from vqgen.devices import processes, rank_and_world
    from vqgen.files import check_writable

    from .measurement import label_of, measure, settle_holdout

    path, said = receipt_path(program, config), settle_holdout(config)
    check_writable(path)  # before hours of measuring
    if path.exists():
        former = read_receipt(path)  # raises: only a receipt may be replaced
        if config.output is None and not write:  # what is written besides replaces the former in any case
            _refuse_other(path, program, former, config)
    found = measure(program, config)
    if rank_and_world()[0] == 0:
        for name, value in flatten(found.metrics):
            title, unit = label_of(program, name)
            print(f"{title:<40} {written(value, unit, 5)}")
        if write:
            write(config, found)
        write_receipt(path, program, values_of(config), found)
        counts = ", ".join(f"{count} {what}" for what, count in found.counts.items())
        print(f"of {counts}; receipt: {path}" + f"\n{said}" * bool(said))
    processes().destroy_process_group()


IN_CURRENT_FOLDER = ("samples", "accuracy")
"""Commands whose receipt is by default `receipt.json` in the current folder."""
OPERATIONAL = {"output", "device", "batch_size", "workers", "map", "cache"}
"""Options that do not change what is measured, but for the batches of the classifiers that `accuracy` trains."""


def _refuse_other(path: Path, program: str, former: Mapping[str, Any], config: Any) -> None:
    """Raise `UsageError` where a receipt that has its name by default is of another command or of other options: it is
    kept."""
    advice = "name another file, or remove that one"
    if former["program"] != program:
        raise UsageError(f"--output: found none, but {path} is of vqgen-eval {former['program']}; {advice}")

    def plain(value: Any) -> Any:
        return os.path.realpath(value) if isinstance(value, (str, Path)) and os.path.exists(value) else value

    defaults = {option.name: option.default for option in known_options(type(config))}
    own = None if program in IN_CURRENT_FOLDER else os.path.realpath(path.parent)  # the model's, which may have moved
    for name, value in values_of(config).items():
        before = former["options"].get(name, defaults[name])
        counts = name not in OPERATIONAL or (name, program) == ("batch_size", "accuracy")
        if counts and plain(before) != plain(value) and (own is None or plain(value) != own):
            was, now = ("nothing" if each in (None, "", []) else each for each in (before, value))
            text = f"{path} is of another measurement, with {option_name(name)} {was} and not {now}"
            raise UsageError(f"--output: found none, but {text}; {advice}")


def receipt_path(program: str, config: Any) -> Path:
    """Path of the receipt: --output, or by default a file in the folder of the model that is measured.

    Of samples, which may be of no model, it is by default in the current folder. Raises `UsageError` where the model is
    one of the package.
    """
    from vqgen.tokenizer.shipped import find_model, find_tokenizer

    from .measurement import is_shipped

    if config.output is not None:
        return config.output
    if program in IN_CURRENT_FOLDER:
        return Path("receipt.json")
    parts = [program, config.split] if hasattr(config, "split") else [program]
    parts += ["unconditional"] * getattr(config, "unconditional", False)
    parts += [str(config.n)] * (config.n != type(config).n) + [config.precision] * (config.precision != "fp32")
    folder = find_tokenizer(config.tokenizer) if program == "reconstruction" else find_model(config.model)
    if is_shipped(folder):
        text = f"{folder} is in the installed package, where no receipt belongs"
        raise UsageError(f"--output: found none, but {text}; name a file")
    return folder / f"{'-'.join(parts)}.json"


def reconstruction(config: options.ReconstructionConfig) -> None:
    """Measure a tokenizer's reconstructions: PSNR, SSIM, LPIPS, rFID, usage and perplexity of the codebook."""
    _measure_with_receipt("reconstruction", config)


def likelihood(config: options.LikelihoodConfig) -> None:
    """Measure a prior's negative log-likelihood of code files, overall, by class and by position."""
    _measure_with_receipt("likelihood", config)


def inpainting(config: InpaintingConfig) -> None:
    """Measure how a prior fills in a hole in images: NLL, PSNR and LPIPS, steps across its border, variety."""
    _measure_with_receipt("inpainting", config)


def windows(config: WindowsConfig) -> None:
    """Draw pictures larger than in training, and measure the steps across the seams of their windows."""
    _measure_with_receipt("windows", config)


def translation(config: TranslationConfig) -> None:
    """Measure how a prior restores degraded images: NLL, PSNR, SSIM, LPIPS, colourfulness."""
    _measure_with_receipt("translation", config)


def text(config: TextConfig) -> None:
    """Measure how images drawn of captions, and the likelihood, find the captions' own images among others."""
    _measure_with_receipt("text", config)


def samples(config: options.SamplesConfig) -> None:
    """Compare samples with real images: FID, KID, Inception Score, precision, recall, density, coverage and more."""
    _measure_with_receipt("samples", config)


def accuracy(config: AccuracyConfig) -> None:
    """Train classifiers on samples alone, and test them on real images: the classification accuracy score."""
    _measure_with_receipt("accuracy", config)


def settings(config: SettingsConfig) -> None:
    """Try sampling settings of a prior on validation images, and write the best as those that it recommends."""
    from vqgen.tokenizer.shipped import find_model

    from .tasks.settings import check_folder, write_choice

    check_folder(find_model(config.model))
    _measure_with_receipt("settings", config, write_choice)


def classifier(config: options.ClassifierTraining) -> None:
    """Train a classifier on real images, by which `vqgen-eval samples` measures the classes of samples."""
    from .classifier import train_classifier

    train_classifier(config)


def codebook(config: options.CodebookConfig) -> None:
    """Show a tokenizer's codebook: what each code decodes to, how often it is used, and its nearest codes."""
    from .codebook import inspect_codebook

    inspect_codebook(config)


def replay(config: options.ReplayConfig) -> None:
    """Repeat the measurements of receipts, and say whether they come out the same, or what differs."""
    from .receipt import replay_receipts

    replay_receipts(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return commands(
        "vqgen-eval",
        {
            "reconstruction": (options.ReconstructionConfig, reconstruction),
            "likelihood": (options.LikelihoodConfig, likelihood),
            "samples": (options.SamplesConfig, samples),
            "accuracy": (AccuracyConfig, accuracy),
            "inpainting": (InpaintingConfig, inpainting),
            "windows": (WindowsConfig, windows),
            "translation": (TranslationConfig, translation),
            "text": (TextConfig, text),
            "classifier": (options.ClassifierTraining, classifier),
            "codebook": (options.CodebookConfig, codebook),
            "settings": (SettingsConfig, settings),
            "replay": (options.ReplayConfig, replay),
        },
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
