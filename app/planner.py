"""How the plan of vqgen-train is made: choose by the rules, try it, and choose less where that would not fit."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqgen.errors import UsageError, UserError

from . import rules
from .configurations import Configurations, merged
from .machine import Machine
from .plan import MOST_SECONDS, TRIAL, Expected, Request, Row
from .survey import Survey
from .trial import Measured, Stage, tried

LEAST = 20
"""Fewest steps of a training that are planned at all."""
MEMORY = 0.8
"""Share of the free memory that a stage may take."""


class TooSlow(UsageError):
    """Raised where images of a size leave too little time; the message is the reason."""


@dataclass(frozen=True)
class Tried:
    """A training: its configuration, and what its trial measured."""

    values: dict[str, Any]
    measured: Measured
    given: int | None
    """Steps where the user has set them."""

    def steps(self, seconds: float) -> int:
        """Steps that are taken: those given, or as many as fit into the time."""
        return self.given or max(0, self.measured.steps(seconds))

    def expected(self, seconds: float) -> Expected:
        """What it takes to train for so many seconds, or the steps given."""
        found = self.measured
        shared = Expected(seconds + TRIAL, found.memory, max(0, found.steps(seconds)))
        if not self.given:
            return shared
        needed = found.start + self.given * found.step + found.validations * found.validation
        needed += found.read_in(self.given)
        return Expected(min(needed, MOST_SECONDS), found.memory, self.given, shared)

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
        self.began = time.perf_counter()
        self.configurations = Configurations(request, survey, machine, output)
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
        given, survey, grids = self.request.size, self.survey, self._grids()
        why = "--size" if given else f"the shorter side of half of the images has {survey.side} pixels or more"
        while True:
            (size, factor, positions, depth), *grids = grids
            length = positions * depth
            if grids and length >= self.too_long:
                continue
            try:
                draft = self._draft(size, factor, positions, depth, why, last=not grids)
                break
            except TooSlow as found:
                if not grids:
                    raise
                reason = str(found).removeprefix("--minutes: ").partition(";")[0]
                why = f"with {size[0]}x{size[1]} pixels as {length} codes {reason}"
        self._describe(draft)
        return self.rows, draft.expected

    def _draft(self, size: list[int], factor: int, positions: int, depth: int, why: str, last: bool) -> Draft:
        """Choose the rest for images of this size, and write the configurations.

        Raises `TooSlow` where a training would have too few steps, unless there is no smaller choice, and `UserError`.
        """
        survey = self.survey
        length, tokens = positions * depth, survey.train * positions * depth
        tokenizer = self._fitting("tokenizer", self.configurations.tokenizer(size, factor, survey.train * positions))
        share = self.seconds * 0.45
        self._enough("tokenizer", tokenizer.measured, share, rules.LEAST_STEPS, last, lambda needed: needed / 0.45)
        if (seen := tokenizer.steps(share) * tokenizer.measured.batch * positions) < survey.train * positions:
            fewer = {"quantizer": {"codebook_size": rules.codebook_size(seen)}}
            tokenizer = replace(tokenizer, values=merged(tokenizer.values, fewer))
            self.configurations.write("tokenizer", tokenizer.values)
        views = rules.views(survey.train)
        self.configurations.write("codes", self.configurations.codes(views))
        while self._encoding(tokenizer.measured, views) > self.seconds * rules.ENCODING and views > 1:
            views //= 2
            self.configurations.write("codes", self.configurations.codes(views))
        encoding = self._encoding(tokenizer.measured, self.configurations.value("codes", "views") or views)
        self._share(encoding, math.inf, 0.0)  # before priors are tried for it
        index, reason = rules.prior_for(tokens), "for so many codes of training images"
        while True:
            prior = self._fitting("prior", self.configurations.prior(index, length), tokenizer.measured.kept)
            found = prior.measured
            least = rules.least_prior_steps(length)
            passes = rules.MOST_EPOCHS * survey.train / found.batch
            search = self._search(tokenizer.measured.judged, found.drawn)
            searching = search.seconds if search else 0.0
            shares = self._share(encoding, max(passes, 2.0 * least) * found.step, searching)
            steps = prior.steps(shares.prior)
            given = self.configurations.given("prior", "dim", "layers")
            if given or rules.affordable(index, steps * found.batch * length):
                break
            reason = f"a larger one would see only {steps * found.batch * length:,} codes in its time"
            index = rules.smaller(index, steps * found.batch * length)
        if found.steps(shares.prior) < least:
            self.too_long = length
        rest = encoding + rules.DRAWING[0]  # drawing and the search take a twentieth each of the whole besides
        self._enough("prior", found, shares.prior, least, last, lambda needed: (2 * needed + rest) / 0.9)
        found.check_drawn()  # now that images have this size
        dropout = {"model": {"dropout": rules.dropout(steps * found.batch / survey.train)}}
        prior = replace(prior, values=merged(prior.values, dropout))
        self.configurations.write("prior", prior.values)
        if search:
            self.configurations.write("settings", self.configurations.settings(search))
            self.configurations.write("samples", self.configurations.samples(searched=True))
        return Draft(size, shares, tokenizer, prior, search, why, reason)

    def _grids(self) -> list[tuple[list[int], int, int, int]]:
        """Sizes of images from the best to the cheapest, each with the downsampling and what `_codes` returns.

        Those that the downsampling, with what the user has set, does not divide are left out. Raises `UsageError` where
        none is left.
        """
        found, refused = [], None
        for size, most in rules.grids(self.request.size, self.survey.side, self.survey.train):
            factor = rules.factor(size, most)
            try:
                found.append((size, factor, *self._codes(size, factor)))
            except UsageError as error:
                refused = refused or error
        if refused and not found:
            raise refused
        return found

    def _codes(self, size: list[int], factor: int) -> tuple[int, int]:
        """Positions of codes in an image of this size, and codes a position, with what the user has set."""
        self.configurations.write("tokenizer", self.configurations.tokenizer(size, factor, 1))
        config = self.configurations.parsed("tokenizer")
        return size[0] * size[1] // config.model.factor**2, getattr(config.quantizer, "depth", 1)

    def _enough(
        self, stage: str, found: Measured, seconds: float, least: int, last: bool, whole: Callable[[float], float]
    ) -> None:
        """Raise `TooSlow` where a training has too few steps in its `seconds`; `whole` is the time of all stages in
        which it has so many."""
        wanted = LEAST if last else least
        if (steps := found.steps(seconds)) < wanted:
            text = f"only {max(steps, 0)} steps of the {stage} would fit into the time, not {wanted}"
            raise TooSlow(f"--minutes: {text}; give {self._minutes(whole(found.seconds(wanted)))} or more")

    def _minutes(self, seconds: float) -> int:
        """Minutes to ask for, so that the stages have so many seconds."""
        planning = 1.25 * (time.perf_counter() - self.began)  # done again, and not always as fast
        return math.ceil((seconds + planning + 2 * TRIAL) / 60)

    def _say(self, name: str, choice: str, why: str = "") -> None:
        self.rows.append(Row(name, choice, why))

    def _describe(self, draft: Draft) -> None:
        """Put the choices into words."""
        s, flips = self.survey, self.request.flip
        labels = [f"{s.classes} classes"] * (s.classes > 0) + [f"{s.captions:,} captions"] * (s.captions > 0)
        broken = f", {s.unreadable:.0%} of those looked at cannot be read" if s.unreadable else ""
        what = ", ".join([f"{s.train:,} to train on, {s.heldout:,} held out, {s.test:,} for tests", *labels])
        self._say("images", what, f"median {s.height}x{s.width} pixels{broken}")
        self._say("machine", self.machine.name, f"{self.machine.memory / 1e9:.1f} GB free")
        tokenizer = self.configurations.parsed("tokenizer")
        (height, width), factor = tokenizer.images.size, tokenizer.model.factor
        self._say("size", f"{height}x{width} pixels, {tokenizer.images.channels} channels", draft.why_size)
        rows, columns, depth = height // factor, width // factor, getattr(tokenizer.quantizer, "depth", 1)
        why = f"{rows * columns * depth * s.train:,} codes of training images"
        self._say("codes", f"{rows}x{columns}{f'x{depth}' * (depth > 1)} of {tokenizer.quantizer.codes}", why)
        losses = "squared error, LPIPS and a discriminator"
        if not self.request.perceptual_weights:
            losses = "squared error alone; --perceptual-weights gives sharper pictures"
        preset = rules.TOKENIZERS[rules.image_side(min(draft.size))]
        self._say("tokenizer", f"{preset}, {losses}", str(draft.tokenizer))
        codes = self.configurations.parsed("codes")
        if codes.views == 1:
            fewer = rules.views(s.train) > 1 and self.configurations.value("codes", "views") is None
            self._say("views", "1 of each image", "several would take too long to encode" * fewer)
        else:
            used = {"flips": flips, "crops": codes.images.random_crop, "shifts": codes.images.random_shift}
            why = f"{' and '.join(name for name, on in used.items() if on)}, against overfitting"
            self._say("views", f"{codes.views} of each image", why)
        model = self.configurations.parsed("prior", "--codes", "codes").model
        text = f"{12 * model.dim**2 * model.layers / 1e6:.1f} M parameters: {model.dim} wide, {model.layers} layers"
        self._say("prior", text, f"{draft.why_shape}; {draft.prior}")
        if found := draft.search:
            tried = math.prod(map(len, rules.candidates(self.configurations.guided()).values()))
            text = f"the best of {tried} on held-out images, {found.images} samples of each"
            self._say("settings", text, f"by a classifier of {found.steps} steps")
        else:
            short = "the time is too short" if draft.tokenizer.measured.judged else "it takes 16 pixels a side"
            self._say("settings", "not searched", self.configurations.unsearched() or short)

    # ---- trials ----

    def _share(self, encoding: float, most: float, searching: float) -> rules.Time:
        """The time that is left, divided, see `rules.share_time`. Raises `TooSlow` where encoding leaves too little."""
        if (shares := rules.share_time(self.seconds, encoding, most, searching)) is None:
            text = f"encoding the images takes about {encoding / 60:.1f} min, which leaves too little to train"
            raise TooSlow(f"--minutes: {text}; give {self._minutes(rules.least_time(encoding))} or more")
        return shares

    def _encoding(self, tokenizer: Measured, views: int) -> float:
        """Seconds that encoding takes, with the decoding of the images.

        Of several views the first is of the image itself, and the others of an enlarged one, which is kept where all
        of them fit into the cache.
        """
        survey, shown = self.survey, self.configurations.parsed("tokenizer").images
        images = replace(self.configurations.parsed("codes").images, size=shown.size, channels=shown.channels)
        enlarged = math.prod(images.enlarged()) * images.channels
        others = 1 if enlarged * survey.train <= images.cache_mb * 2**20 else views - 1
        decoded = survey.train * (1 + others * (views > 1)) + survey.heldout + survey.test
        encoded = survey.train * views + survey.heldout + survey.test
        return 5 + encoded / tokenizer.encoded + decoded * survey.decoding / max(1, images.workers)

    def _search(self, step: float, drawn: float) -> rules.Search | None:
        """How settings of sampling are searched; None where they are not, also where no classifier was tried."""
        if self.configurations.unsearched() or not step:
            return None
        decoded = (min(self.survey.train, 600 * 64) + self.survey.heldout) * self.survey.decoding
        return rules.search(self.seconds, step, drawn, self.configurations.guided(), self.survey.classes, decoded)

    def _fitting(self, stage: str, values: dict[str, Any], kept: float = 0.0) -> Tried:
        """Write and try the configuration of a stage, its steps in more parts until it fits into the memory.

        `kept` are the bytes that a stage before it keeps.
        """
        memory = MEMORY * self.machine.memory
        while True:
            self.configurations.write(stage, values)
            found, (batch, parts) = tried(self._trial(stage)), self._batch(stage)
            if found and (found := found.after(kept)).memory <= memory:
                return Tried(values, found, self._given_steps(stage, batch))
            if parts == batch or self.configurations.given(stage, "accumulate"):
                short = f"{found.memory / 1e9:.1f} GB" if found else "more memory than there is"
                free = f"{memory / 1e9:.1f} GB are free for it"
                other = f", or a larger --{stage} accumulate" * (parts < batch)
                raise UserError(f"--data: the {stage} would take {short}, {free}; choose a smaller --size{other}")
            more = next(p for p in range(2 * parts, batch + 1) if batch % p == 0) if 2 * parts <= batch else batch
            values = merged(values, {"run": {"accumulate": more}})

    def _given_steps(self, stage: str, batch: int) -> int | None:
        """Steps of a training where the user has set them, also as epochs."""
        epochs = self.configurations.value(stage, "epochs")
        return math.ceil(epochs * self.survey.train / batch) if epochs else self.configurations.value(stage, "steps")

    def _batch(self, stage: str) -> tuple[int, int]:
        """Batch size of a training, and the parts it is split into."""
        run = self.configurations.parsed(stage, *(["--codes", "codes"] if stage == "prior" else [])).run
        return run.batch_size, run.accumulate

    def _trial(self, stage: str) -> Stage:
        request, survey = self.request, self.survey
        images, prior, samples, codes = [survey.train, max(survey.heldout, 1)], [], [], []
        if stage == "prior":
            self.configurations.write("samples", self.configurations.samples())
            prior, samples, codes = (self.configurations.words(name) for name in ("prior", "samples", "codes"))
        words = self.configurations.words("tokenizer")
        names = list(survey.class_names)
        return Stage(words, prior, samples, images, names, request.text_column, codes, survey.unlabelled)
