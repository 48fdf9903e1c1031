"""The stages from images to new images, each a program that is called with the words of its command line."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqgen.config import parse
from vqgen.config_layers import merged, read_arguments, read_file
from vqgen.errors import OtherRun, UsageError
from vqgen.evaluation.tasks.options import SettingsConfig
from vqgen.files import is_file, read_json
from vqgen.options import Options
from vqgen.prior.options import GENERATION
from vqgen.prior.train import PriorTraining
from vqgen.sampling.sample import SampleConfig
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.train import TokenizerTraining
from vqgen.training.folder import read_sessions

from .plan import Plan, file_of, saved_plan, unedited


@dataclass(frozen=True)
class Stage:
    """A stage of the whole path."""

    title: str
    program: str
    config: type[Options]
    run: Callable[[Any], None]

    def parsed(self, words: Sequence[str]) -> Any:
        """The configuration of a command line. Raises `UsageError` that names the program."""
        try:
            return parse(self.config, words)
        except UsageError as error:
            raise UsageError(f"{self.program}: {error}") from error

    def __call__(self, words: Sequence[str], place: str) -> None:
        """Announce and run the stage; `place` is its number and theirs, as 2/5."""
        print(f"\n[{place}] {self.title}", file=sys.stderr, flush=True)
        from vqgen.devices import release_memory

        self.run(self.parsed(words))
        release_memory()  # the next stage is in this process, and needs none of it


def _train_tokenizer(config: TokenizerTraining) -> None:
    from vqgen.tokenizer.train import train

    train(config)


def _tokenize(config: TokenizeConfig) -> None:
    from vqgen.tokenizer.codes.writer import tokenize

    tokenize(config)


def _train_prior(config: PriorTraining) -> None:
    from vqgen.prior.train import train

    train(config)


def _search(config: SettingsConfig) -> None:
    from vqgen.evaluation.program import settings

    folder = config.model.parent
    if (plan := saved_plan(folder)) and "settings" in unedited(plan, folder):
        config.holdout = None  # that of the run, which plans of former versions do not follow
    if settings_are_found(config.model):
        print(f"{config.model} recommends the settings that were found for it already", file=sys.stderr)
        return
    settings(config)


def settings_are_found(prior: Path) -> bool:
    """Return whether `prior` recommends settings, and holds the receipt of their search with its weights."""
    receipt, fingerprint = prior / RECEIPT, read_json(prior / "vqgen.json").get("fingerprint")
    found = read_json(receipt).get("fingerprints") if is_file(receipt) and is_file(prior / GENERATION) else None
    return isinstance(found, dict) and found.get("prior") == fingerprint is not None


def settings_given(words: Sequence[str]) -> bool:
    """Return whether words of vqgen-sample set how codes are drawn, so that no search is wanted."""
    return bool(STAGES["samples"].parsed(words).given_settings)


def _draw(config: SampleConfig) -> None:
    from vqgen.prior.model import Prior
    from vqgen.sampling.output import UNFINISHED
    from vqgen.sampling.write_samples import write_samples

    if config.model is not None and samples_are_drawn(config.output, config.model):
        print(f"{config.output} holds the samples of this prior already", file=sys.stderr)
        return
    if config.model is not None:
        recommend(config, config.model)
        folder = config.output.parent
        own = (plan := saved_plan(folder)) and "samples" in unedited(plan, folder)
        if own and config.prompt and "prompt" not in config.given:  # planned before it was known how much is read
            part = Prior.load(config.model).conditioning.text
            config.prompt = part.readable(config.prompt) if part else config.prompt
    try:
        write_samples(config)
        return
    except OtherRun:
        if not is_file(config.output / UNFINISHED):
            raise
    text = f"{config.output} holds some images of a run with other weights or settings, which are replaced"
    print(text, file=sys.stderr)
    config.overwrite = True
    write_samples(config)


def recommend(config: SampleConfig, prior: Path) -> None:
    """Let a prior's folder recommend the settings that `config` states, unless it recommends some already."""
    from vqgen.prior.model import Prior
    from vqgen.sampling.settings import combined, write_recommended

    if config.given_settings and not is_file(prior / GENERATION):
        write_recommended(prior, combined(config.given_settings, {}), Prior.load(prior).generation_config())


def samples_are_drawn(samples: Path, prior: Path) -> bool:
    """Return whether `samples` holds a finished run of vqgen-sample with the weights in `prior`."""
    path, fingerprint = samples / "samples.json", read_json(prior / "vqgen.json").get("fingerprint")
    return is_file(path) and fingerprint is not None and read_json(path).get("prior_fingerprint") == fingerprint


STAGES = {
    "tokenizer": Stage(
        "train the tokenizer, which turns an image into codes and back",
        "vqgen-train-tokenizer",
        TokenizerTraining,
        _train_tokenizer,
    ),
    "codes": Stage("encode every image", "vqgen-tokenize", TokenizeConfig, _tokenize),
    "prior": Stage(
        "train the prior, which predicts each code from those before it",
        "vqgen-train-prior",
        PriorTraining,
        _train_prior,
    ),
    "settings": Stage("search the settings that images are drawn with", "vqgen-eval settings", SettingsConfig, _search),
    "samples": Stage("draw new images", "vqgen-sample", SampleConfig, _draw),
}
"""In order; each writes the folder of its name, `settings` into that of the prior, and reads those before it."""
TRAININGS = ("tokenizer", "prior")
RECEIPT = "settings.json"
"""Receipt of the search in the prior's folder."""


def outdated(samples: Path, prior: Path) -> bool:
    """Return whether `samples` holds a finished run of vqgen-sample with other weights than those in `prior`."""
    return is_file(samples / "samples.json") and not samples_are_drawn(samples, prior)


def folders(output: Path, name: str, overwrite: bool) -> list[str]:
    """The words of a stage that name what it reads and writes in `output`."""
    if name == "settings":
        return ["--model", str(output / "prior"), "--output", str(output / "prior" / RECEIPT)]
    reads = {"codes": ("--tokenizer", "tokenizer"), "prior": ("--codes", "codes"), "samples": ("--model", "prior")}
    words = ["--output", str(output / name), *["--overwrite"] * overwrite]
    if name in reads:
        option, folder = reads[name]
        words = [option, str(output / folder), *words]
    return words


def has_steps(words: Sequence[str]) -> bool:
    """Whether words given to a training say how long it is."""
    return bool({"--steps", "--epochs"} & {word.partition("=")[0] for word in words})


def planned_lengths(folder: Path) -> dict[str, int]:
    """Training -> steps in its configuration in the folder of a new plan, to which its intervals are in proportion."""
    files = {name: read_file(STAGES[name].config, str(file_of(folder, name))) for name in TRAININGS}
    return {name: file.values["steps"][0] for name, file in files.items()}


def times_of(output: Path) -> dict[str, float]:
    """Training that has begun in `output` -> its seconds by its own record."""
    sessions = {name: read_sessions(output / name) for name in TRAININGS}
    return {
        name: sum(float(found) for each in of if isinstance(found := each.get("seconds"), (int, float)))
        for name, of in sessions.items()
        if of
    }


def length_set(plan: Plan, output: Path, name: str) -> str:
    """The option, or the file that was edited, that says how long a training is, in place of its share of the time;
    empty where there is none.

    Files of plans of former versions say so by `epochs` alone: runs have begun without regard to the rest of them.
    Raises `UserError`.
    """
    config, given, file = STAGES[name].config, getattr(plan.request, name), file_of(output, name)
    if has_steps(given):
        return f"--{name}"
    if not is_file(file):
        return ""
    found = merged(config, [read_file(config, str(file)), read_arguments(config, given)[0]])
    planned = plan.lengths.get(name)
    edited = planned is not None and (found.get("steps", planned) != planned or found.get("minutes") is not None)
    return str(file) if edited or found.get("epochs") is not None else ""


def words_of(plan: Plan, output: Path, name: str, overwrite: bool = False) -> list[str]:
    """The command line of a stage, without its program. Raises `UserError`."""
    words = ["--config", str(file_of(output, name)), *folders(output, name, overwrite)]
    if name in TRAININGS and not length_set(plan, output, name):
        budget = plan.expected[name].minutes
        if name == "prior" and plan.prior_minutes:
            budget = plan.prior_minutes
        words += ["--minutes", f"{budget:.4g}"]
    return [*words, *getattr(plan.request, name, ())]


def check_folders(output: Path) -> None:
    """Raise `UsageError` where the folder of a stage holds files of something else, before any of them begins."""
    from vqgen.sampling.output import own_folder
    from vqgen.tokenizer.codes.plan import codes_folder
    from vqgen.training.folder import run_folder

    for name, folder in {"tokenizer": run_folder, "codes": codes_folder, "prior": run_folder}.items():
        folder(output / name).refuse_foreign()
    own_folder(output / "samples")


def write_page(output: Path) -> Path:
    """Write the report of the stages' folders. Raises `UserError`."""
    from vqgen.evaluation.report.program import ReportConfig, write_report

    write_report(ReportConfig([output], output / "report.html"))
    return output / "report.html"
