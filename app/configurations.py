"""The configurations of a plan's stages: what the rules choose, and what the user has set, as files of plan/."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqgen.config_layers import find_preset
from vqgen.evaluation.tasks.options import PARTS, least_classes
from vqgen.files import read_text, write_text
from vqgen.files.yaml_text import dump_yaml, parse_yaml

from . import rules
from .given import explained, given_options
from .machine import Machine
from .plan import HEADING, Plan, Request, file_of, unedited, written
from .stages import STAGES, settings_given
from .survey import Survey

CACHE_MB = 2048
"""Decoded images that are kept in memory."""


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one; the later wins."""
    found: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            former = found.get(key)
            found[key] = merged(former, value) if isinstance(former, dict) and isinstance(value, dict) else value
    return found


@dataclass(frozen=True)
class Configurations:
    """Makes the configuration of each stage, and writes it."""

    request: Request
    survey: Survey
    machine: Machine
    output: Path
    """Folder that has plan/."""

    def write(self, stage: str, values: dict[str, Any]) -> None:
        """Write the file of a stage."""
        heading = f"{HEADING} for {self.request.data!r}; change it before the stage begins.\n"
        write_text(file_of(self.output, stage), heading + dump_yaml(values))

    def words(self, stage: str) -> list[str]:
        """The configuration of a stage, with what the user has set."""
        return ["--config", str(file_of(self.output, stage)), *getattr(self.request, stage)]

    def parsed(self, stage: str, *more: str) -> Any:
        """The configuration of a stage as its program reads it. Raises `UsageError`."""
        with explained(stage):
            return STAGES[stage].parsed([*self.words(stage), *more])

    def tokenizer(self, size: list[int], factor: int, tokens: int) -> dict[str, Any]:
        """Of the tokenizer, for images of this size and so many codes of the training images."""
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

    def given(self, stage: str, *names: str) -> bool:
        """Whether the user has set one of these options of a stage."""
        given = {word.partition("=")[0].replace("_", "-") for word in getattr(self.request, stage)}
        return bool(given & {f"--{name}" for name in names})

    def value(self, stage: str, name: str) -> Any:
        """The value that the user has set for an option of a stage; None where there is none."""
        return given_options(self.request, stage).get(name)

    def codes(self, views: int) -> dict[str, Any]:
        """Of the encoding."""
        values: dict[str, Any] = {"data": self.request.data, "views": views}
        if (self.value("codes", "views") or views) > 1:  # a single view is not augmented
            values["images"] = {"flip": self.request.flip, "random_crop": 0.1, "cache_mb": CACHE_MB}
        if self.request.text_column:
            values["text_column"] = self.request.text_column
        if (most := self.value("tokenizer", "max_broken")) is not None:  # the same images are read
            values.setdefault("images", {})["max_broken"] = most
        return values

    def prompts(self) -> list[str]:
        """Captions that samples are drawn of; none where the user says what they are drawn of, or the prior reads
        none."""
        other = ("prompt", "prompt-file", "class", "num-per-class", "init-image", "source-image")
        if self.given("samples", *other) or self.value("prior", "text_length") == 0:
            return []
        return list(self.survey.prompts)

    def guided(self) -> bool:
        """Whether samples have classes or captions that the prior learns to do without."""
        objective = self.parsed("prior", "--codes", "codes").objective
        told = bool(self.prompts()) or self.given("samples", "prompt", "prompt-file")
        # By default images have classes, unless they have prompts, or are made of another image.
        classed = self.given("samples", "class") or not (told or self.given("samples", "source-image", "init-image"))
        by_text = told and self.reads_captions() and objective.text_dropout > 0
        return by_text or (classed and self.survey.classes > 0 and objective.label_dropout > 0)

    def reads_captions(self) -> bool:
        """Whether the prior is trained on captions."""
        return self.survey.captions > 0 and self.parsed("prior", "--codes", "codes").objective.text_length != 0

    def samples(self, searched: bool = False) -> dict[str, Any]:
        """Of drawing, where settings are searched or where they are not."""
        values: dict[str, Any] = {} if self.given("samples", "num-per-class") else {"n": 64}
        if searched:
            return values
        if prompts := self.prompts():
            values["prompt"] = prompts
        return values | {"sampling": {"min_p": 0.05, **({"guidance_scale": 2.0} if self.guided() else {})}}

    def unsearched(self) -> str:
        """Why settings of sampling are not searched; nothing where they are, if there is time."""
        survey = self.survey
        with explained("samples"):
            given = settings_given(self.request.samples)
        if given:
            return "--samples gives them"
        reads = self.reads_captions()
        if self.prompts() or (reads and survey.classes < 2):
            return "samples are drawn of captions"
        if reads:
            return "the prior reads captions, and the search draws without them"
        if survey.classes < 2 and survey.heldout < (least := rules.LEAST_HELDOUT * PARTS):
            return f"there are {survey.heldout} held-out images, fewer than {least}"
        if survey.classes > 1 and survey.judged < least_classes(survey.classes):
            sparse = f"{survey.classes - survey.judged} of {survey.classes} classes"
            return f"{sparse} have fewer than {rules.LEAST_HELDOUT} held-out images"
        return "--codes gives a source" if self.given("codes", "source", "source-data") else ""

    def settings(self, search: rules.Search) -> dict[str, Any]:
        """Of the search of sampling settings."""
        values = {"data": self.request.data, "n": search.images, "classifier_steps": search.steps}
        values |= {"flip": self.request.flip, "max_broken": self.parsed("codes").images.max_broken}
        return values | {"precision": "auto"} | rules.candidates(self.guided())

    def adapted(self, plan: Plan, begun: Sequence[str]) -> Plan:
        """The plan with the request's options of stages that have not begun: writes anew what follows from these,
        but for files that were edited, and leaves out the search of settings where they rule it out."""
        own = unedited(plan, self.output)
        planned = {name: parse_yaml(read_text(file_of(self.output, name))) for name in own}
        expected, unsearched = dict(plan.expected), ""
        for name in ("tokenizer", "prior"):
            if (shared := expected[name].shared) and not self.given(name, "steps", "epochs"):
                expected[name] = shared
        if "codes" not in begun and "codes" in own:
            self.write("codes", self.codes(planned["codes"]["views"]))
        if "settings" in expected:
            unsearched = self.unsearched()
        if "samples" in own:
            self.write("samples", self.samples(searched="settings" in expected and not unsearched))
        if "settings" in own:
            found = planned["settings"]
            search = rules.Search(expected["settings"].seconds, found["n"], found["classifier_steps"])
            self.write("settings", self.settings(search))
        digests = {name: digest for name, digest in written(self.output).items() if name in own}
        return replace(plan, expected=expected, unsearched=unsearched, written=plan.written | digests)

    def prior(self, index: int, length: int) -> dict[str, Any]:
        """Of the prior with this index in `rules.PRIORS`, for so many codes an image."""
        shape = rules.PRIORS[index]
        values = {
            "model": {"dropout": rules.MOST_DROPOUT},  # in the trial; then by the number of passes
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
