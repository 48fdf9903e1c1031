"""How the plan of vqgen-train is made: choose by the rules, try it, and choose less where that would not fit."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqgen.config import parse
from vqgen.config_layers import find_preset
from vqgen.errors import UsageError, UserError
from vqgen.files import write_text
from vqgen.files.yaml_text import dump_yaml, parse_yaml
from vqgen.prior.train import PriorTraining
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.train import TokenizerTraining

from . import rules
from .machine import Machine
from .plan import HEADING, TRIAL, Expected, Request, Row, file_of
from .stages import settings_given
from .survey import Survey
from .trial import Measured, Stage, tried

LEAST = 20
"""Fewest steps of a training that are planned at all."""
MEMORY = 0.8
"""Share of the free memory that a stage may take."""
CACHE_MB = 2048
"""Decoded images that are kept in memory."""


class TooSlow(UsageError):
    """Raised where images of a size leave too little time; the message is the reason."""


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one; the later wins."""
    found: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            former = found.get(key)
            found[key] = merged(former, value) if isinstance(former, dict) and isinstance(value, dict) else value
    return found


@dataclass(frozen=True)
class Tried:
    """A training: its configuration, and what its trial measured."""

    values: dict[str, Any]
    measured: Measured

    def expected(self, seconds: float) -> Expected:
        """What it takes to train for so many seconds."""
        return Expected(seconds + TRIAL, self.measured.memory, max(0, self.measured.steps(seconds)))

    def __str__(self) -> str:
        parts, found = self.values["run"].get("accumulate", 1), self.measured
        divided = f" in {parts} parts, to fit into the memory" * (parts > 1)
        return f"batch size {found.batch}{divided}, {found.step:.2g} s a step; {found.memory / 1e9:.1f} GB"


@dataclass(frozen=True)
class Draft:
    """Everything for one size of the images."""

    size: list[int]
    shares: rules.Time
    tokenizer: Tried
    prior: Tried
    search: rules.Search | None
    why_size: str
    why_shape: str

    @property
    def expected(self) -> dict[str, Expected]:
        """What each stage is expected to take, in order."""
        memory = self.prior.measured.drawing_memory
        return {
            "tokenizer": self.tokenizer.expected(self.shares.tokenizer),
            "codes": Expected(self.shares.encoding, 0.0, 0),
            "prior": self.prior.expected(self.shares.prior),
            **({"settings": Expected(self.shares.settings, memory, 0)} if self.search else {}),
            "samples": Expected(self.shares.drawing, memory, 0),
        }


class Planner:
    """Makes a plan: chooses by the rules, tries what it chose, and chooses less where that would not fit.

    Args:
        deadline: of the whole, by `time.perf_counter`.
        output: folder that gets plan/, with a YAML file for each stage.
    """

    def __init__(self, request: Request, survey: Survey, machine: Machine, deadline: float, output: Path) -> None:
        self.request, self.survey, self.machine, self.deadline, self.output = request, survey, machine, deadline, output
        self.rows: list[Row] = []
        self.too_long = math.inf
        """Codes of an image of which the prior has too few steps, whatever the size of the image."""

    @property
    def seconds(self) -> float:
        """Time that is left for the stages."""
        return self.deadline - time.perf_counter() - 2 * TRIAL

    def plan(self) -> tuple[list[Row], dict[str, Expected]]:
        """Write the configurations; returns the choices and what each stage is expected to take.

        Raises `UserError`.
        """
        given, survey = self.request.size, self.survey
        grids = rules.grids(given, survey.side, survey.train)
        why = "--size" if given else f"the shorter side of half of the images has {survey.side} pixels or more"
        while True:
            (size, most), *grids = grids
            factor = rules.factor(size, most)
            length = size[0] * size[1] // factor**2
            if grids and length >= self.too_long:
                continue
            try:
                draft = self._draft(size, factor, length, why, last=not grids)
                break
            except TooSlow as found:
                if not grids:
                    raise
                why = f"with {size[0]}x{size[1]} pixels as {length} codes {str(found).removeprefix('--minutes: ')}"
        self._describe(draft)
        return self.rows, draft.expected

    def _draft(self, size: list[int], factor: int, length: int, why: str, last: bool) -> Draft:
        """Choose the rest for images of this size, and write the configurations.

        Raises `TooSlow` where a training would have too few steps, unless there is no smaller choice, and `UserError`.
        """
        if any(side % factor for side in size):
            raise UsageError(f"--size: found {size[0]}x{size[1]}, expected multiples of {factor} pixels")
        survey = self.survey
        tokens = survey.train * length
        tokenizer = self._fitting("tokenizer", self._tokenizer(size, factor, tokens))
        steps = tokenizer.measured.steps(self.seconds * 0.45)
        self._enough("tokenizer", steps, rules.LEAST_STEPS, last)
        if (seen := steps * tokenizer.measured.batch * length) < tokens:
            fewer = {"quantizer": {"codebook_size": rules.codebook_size(seen)}}
            tokenizer = replace(tokenizer, values=merged(tokenizer.values, fewer))
            self._write("tokenizer", tokenizer.values)
        views = rules.views(survey.train)
        while (encoding := self._encoding(tokenizer.measured, views)) > self.seconds * rules.ENCODING and views > 1:
            views //= 2
        self._write("codes", self._codes(views))
        index, reason = rules.prior_for(tokens), "for so many codes of training images"
        while True:
            prior = self._fitting("prior", self._prior(index, length), tokenizer.measured.kept)
            found = prior.measured
            least = rules.least_prior_steps(length)
            passes = rules.MOST_EPOCHS * survey.train / found.batch
            search = self._search(tokenizer.measured.judged, found.drawn)
            searching = search.seconds if search else 0.0
            shares = rules.share_time(self.seconds, encoding, max(passes, 2.0 * least) * found.step, searching)
            if shares is None:
                needed = 2 * (encoding + rules.DRAWING[0]) + 4 * TRIAL
                text = f"encoding the images takes about {encoding / 60:.1f} min"
                raise TooSlow(f"--minutes: {text}, which leaves too little to train; give {needed / 60:.0f} or more")
            steps = max(found.steps(shares.prior), 0)
            if rules.affordable(index, steps * found.batch * length) or self._given("prior", "dim", "layers"):
                break
            reason = f"a larger one would see only {steps * found.batch * length:,} codes in its time"
            index -= 1
        if steps < least:
            self.too_long = length
        self._enough("prior", steps, least, last)
        if search:
            self._write("settings", self._settings(search))
            self._write("samples", {"n": 64})
        return Draft(size, shares, tokenizer, prior, search, why, reason)

    def _enough(self, stage: str, steps: int, least: int, last: bool) -> None:
        wanted = LEAST if last else least
        if steps < wanted:
            raise TooSlow(f"--minutes: only {max(steps, 0)} steps of the {stage} would fit into the time, not {wanted}")

    def _say(self, name: str, choice: str, why: str = "") -> None:
        self.rows.append(Row(name, choice, why))

    def _write(self, stage: str, values: dict[str, Any]) -> None:
        heading = f"{HEADING} for {self.request.data!r}; change it before the stage begins.\n"
        write_text(file_of(self.output, stage), heading + dump_yaml(values))

    def _describe(self, draft: Draft) -> None:
        """Put the choices into words."""
        s, flips = self.survey, self.request.flip
        labels = [f"{s.classes} classes"] * (s.classes > 0) + [f"{s.captions:,} captions"] * (s.captions > 0)
        broken = f", {s.unreadable:.0%} of those looked at cannot be read" if s.unreadable else ""
        what = ", ".join([f"{s.train:,} to train on, {s.heldout:,} held out, {s.test:,} for tests", *labels])
        self._say("images", what, f"median {s.height}x{s.width} pixels{broken}")
        self._say("machine", self.machine.name, f"{self.machine.memory / 1e9:.1f} GB free")
        tokenizer = parse(TokenizerTraining, self._words("tokenizer"))
        (height, width), factor = tokenizer.images.size, tokenizer.model.factor
        self._say("size", f"{height}x{width} pixels, {tokenizer.images.channels} channels", draft.why_size)
        rows, columns = height // factor, width // factor
        why = f"{rows * columns * s.train:,} codes of training images"
        self._say("codes", f"{rows}x{columns} of {tokenizer.quantizer.codes}", why)
        losses = "squared error, LPIPS and a discriminator"
        if not self.request.perceptual_weights:
            losses = "squared error alone; --perceptual-weights gives sharper pictures"
        preset = rules.TOKENIZERS[rules.image_side(min(draft.size))]
        self._say("tokenizer", f"{preset}, {losses}", str(draft.tokenizer))
        codes = parse(TokenizeConfig, self._words("codes"))
        if codes.views > 1:
            self._say("views", f"{codes.views} of each image", f"{'flips and ' * flips}crops, against overfitting")
        model = parse(PriorTraining, [*self._words("prior"), "--codes", "codes"]).model
        text = f"{12 * model.dim**2 * model.layers / 1e6:.1f} M parameters: {model.dim} wide, {model.layers} layers"
        self._say("prior", text, f"{draft.why_shape}; {draft.prior}")
        if found := draft.search:
            tried = math.prod(map(len, rules.candidates(self._guided()).values()))
            text = f"the best of {tried} on held-out images, {found.images} samples of each"
            self._say("settings", text, f"by a classifier of {found.steps} steps")
        else:
            short = "the time is too short" if draft.tokenizer.measured.judged else "it takes 16 pixels a side"
            self._say("settings", "not searched", self._unsearched() or short)

    def _words(self, stage: str) -> list[str]:
        """The configuration of a stage, with what the user has set."""
        return ["--config", str(file_of(self.output, stage)), *getattr(self.request, stage)]

    # ---- the configurations ----

    def _tokenizer(self, size: list[int], factor: int, tokens: int) -> dict[str, Any]:
        request, survey, side = self.request, self.survey, rules.image_side(min(size))
        images: dict[str, Any] = {"size": size, "channels": request.channels or survey.channels}
        images |= {"flip": request.flip, "random_crop": 0.1, "cache_mb": CACHE_MB}
        changed: dict[str, Any] = {
            "data": request.data,
            "images": images,
            "model": rules.network(factor, side, self.machine.cuda),
            "quantizer": {"codebook_size": rules.codebook_size(tokens)},
            "loss": {"perceptual_weights": request.perceptual_weights},
        }
        if not request.perceptual_weights:
            changed = merged(changed, {"loss": {"perceptual_weight": 0.0}, "gan": {"gan_weight": 0.0}})
        return merged(parse_yaml(find_preset(rules.TOKENIZERS[side])[1]), changed)

    def _encoding(self, tokenizer: Measured, views: int) -> float:
        """Seconds that encoding takes."""
        return 5 + (self.survey.train * views + self.survey.heldout + self.survey.test) / tokenizer.encoded

    def _given(self, stage: str, *names: str) -> bool:
        """Whether the user has set one of these options of a stage."""
        given = {word.partition("=")[0].replace("_", "-") for word in getattr(self.request, stage)}
        return bool(given & {f"--{name}" for name in names})

    def _codes(self, views: int) -> dict[str, Any]:
        values: dict[str, Any] = {"data": self.request.data, "views": views}
        if views > 1 and "--views=1" not in self.request.codes:  # a single view is not augmented
            values["images"] = {"flip": self.request.flip, "random_crop": 0.1}
        if self.request.text_column:
            values["text_column"] = self.request.text_column
        return values

    def _prompts(self) -> list[str]:
        """Captions that samples are drawn of; none where the user says what they are drawn of."""
        other = ("prompt", "prompt-file", "class", "num-per-class", "init-image", "source-image")
        return [] if self._given("samples", *other) else list(self.survey.prompts)

    def _guided(self) -> bool:
        """Whether samples have classes or captions that the prior learns to do without."""
        objective = parse(PriorTraining, [*self._words("prior"), "--codes", "codes"]).objective
        dropout = objective.text_dropout if self._prompts() else objective.label_dropout
        return dropout > 0 and bool(self._prompts() or self.survey.classes)

    def _samples(self) -> dict[str, Any]:
        sampling = {"min_p": 0.05, **({"guidance_scale": 2.0} if self._guided() else {})}
        prompts = self._prompts()
        return {"n": 64, **({"prompt": prompts} if prompts else {}), "sampling": sampling}

    def _unsearched(self) -> str:
        """Why settings of sampling are not searched; nothing where they are, if there is time."""
        survey = self.survey
        if settings_given(self.request.samples):
            return "--samples gives them"
        if self._prompts():
            return "samples are drawn of captions"
        if survey.classes < 2:
            return "it takes classes, by which samples are judged"
        if survey.rarest < rules.LEAST_HELDOUT:
            return f"a class has {survey.rarest} held-out images, fewer than {rules.LEAST_HELDOUT}"
        return "--codes gives a source" if self._given("codes", "source", "source-data") else ""

    def _search(self, step: float, drawn: float) -> rules.Search | None:
        """How settings of sampling are searched; None where they are not, also where no classifier was tried."""
        if self._unsearched() or not step:
            return None
        return rules.search(self.seconds, step, drawn, self._guided(), self.survey.classes)

    def _settings(self, search: rules.Search) -> dict[str, Any]:
        values = {"data": self.request.data, "n": search.images, "classifier_steps": search.steps}
        return values | {"precision": "auto"} | rules.candidates(self._guided())

    def _prior(self, index: int, length: int) -> dict[str, Any]:
        shape = rules.PRIORS[index]
        values = {
            "model": {"dropout": rules.dropout(self.survey.train)},
            "optimizer": {"lr_warmup": 200, "weight_decay": 0.1, "ema_decay": 0.999},
            "run": {
                "steps": 5000,
                "batch_size": rules.prior_batch(length, self.machine.cuda),
                "validate_every": 250,
                "checkpoint_every": 250,
            },
            "patience": 5,
        }
        return merged(shape.values(), values)

    # ---- trials ----

    def _fitting(self, stage: str, values: dict[str, Any], kept: float = 0.0) -> Tried:
        """Write and try the configuration of a stage, its steps in more parts until it fits into the memory.

        `kept` are the bytes that a stage before it keeps.
        """
        memory = MEMORY * self.machine.memory
        while True:
            self._write(stage, values)
            found, (batch, parts) = tried(self._trial(stage)), self._batch(stage)
            if found and (found := found.after(kept)).memory <= memory:
                return Tried(values, found)
            if parts == batch:
                short = f"{found.memory / 1e9:.1f} GB" if found else "more memory than there is"
                free = f"{memory / 1e9:.1f} GB are free for it"
                raise UserError(f"--data: the {stage} would take {short}, {free}; choose a smaller --size")
            more = next(p for p in range(2 * parts, batch + 1) if batch % p == 0) if 2 * parts <= batch else batch
            values = merged(values, {"run": {"accumulate": more}})

    def _batch(self, stage: str) -> tuple[int, int]:
        """Batch size of a training, and the parts it is split into."""
        codes = ["--codes", "codes"] if stage == "prior" else []
        run = parse(PriorTraining if stage == "prior" else TokenizerTraining, [*self._words(stage), *codes]).run
        return run.batch_size, run.accumulate

    def _trial(self, stage: str) -> Stage:
        request, survey = self.request, self.survey
        images, prior, samples = [survey.train, max(survey.heldout, 1)], [], []
        if stage == "prior":
            self._write("samples", self._samples())
            prior, samples = self._words("prior"), self._words("samples")
        return Stage(self._words("tokenizer"), prior, samples, images, survey.classes, request.text_column)
