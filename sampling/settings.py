"""Options of drawing codes, and those that a prior's folder recommends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from vqgen.config import check_types, from_dict
from vqgen.errors import UsageError, UserError
from vqgen.files import is_file, read_json, write_json
from vqgen.options import CountOrZero, Options, Range, Share, option_name
from vqgen.prior.options import GENERATION, RECOMMENDED, SHARED

SCHEDULES = ("constant", "linear", "cosine", "power-cosine", "interval")
EXPONENT = 2.75
NotNegative = Annotated[float, Range(least=0, most=1e6)]


SCALES = ("guidance_scale", "source_guidance_scale")


@dataclass(frozen=True)
class SamplingOptions(Options):
    """Settings one by one, as options give them: what they need of each other is not checked."""

    temperature: NotNegative = 1.0
    """Divides the logits: below 1 safer, above 1 more varied, 0 = always the most likely code."""
    top_k: CountOrZero = 0
    """Draw from the k most likely codes only (those tied with the last of them stay too); 0 = from all."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Draw from the fewest codes that hold this share of the probability (Holtzman et al. 2020); 1 = from all."""
    min_p: Share = 0.0
    """Drop codes less likely than this share of the most likely one (Nguyen et al. 2024); 0 = none."""
    guidance_scale: NotNegative = 1.0
    """Classifier-free guidance: 1 = none, more = closer to class and text and less varied, 0 = both ignored."""
    source_guidance_scale: NotNegative = 1.0
    """Classifier-free guidance by the --source-image, or by what surrounds the holes of --init-image: 1 = none, more =
    closer to it, 0 = ignored. It adds to that of --guidance-scale (Brooks et al. 2023, eq. 3)."""
    guidance_schedule: Literal["constant", "linear", "cosine", "power-cosine", "interval"] = "constant"
    """How both scales grow from 1 at the first code to their value at the last; power-cosine = late, by
    --guidance-exponent (Yu et al. 2024); interval = full within --guidance-interval and none outside (Kynkaanniemi et
    al. 2024)."""
    guidance_exponent: Annotated[float, Range(above=0, most=100)] = EXPONENT
    """Exponent of --guidance-schedule power-cosine: more = later; 1 is cosine."""
    guidance_interval: list[Share] = field(default_factory=lambda: [0.0, 1.0])
    """First and last share of an image's codes that --guidance-schedule interval guides."""
    oversample: Annotated[float, Range(least=1, most=100)] = 1.0
    """Images drawn for each one kept. Images of a class are drawn in groups of 16, even for a smaller --n; the most
    likely under the prior are kept. 1.25 rejects the least likely fifth (after Razavi et al. 2019, section 3.3)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_schedule not in SCHEDULES:
            expected = ", ".join(SCHEDULES)
            raise UsageError(f"--guidance-schedule: found {self.guidance_schedule}, expected one of {expected}")
        interval = self.guidance_interval
        if not isinstance(interval, (list, tuple)) or len(interval) != 2 or not interval[0] < interval[1]:
            raise UsageError(f"--guidance-interval: found {interval}, expected two ascending shares, as 0.2 0.8")


@dataclass(frozen=True)
class SamplingSettings(SamplingOptions):
    """How codes are drawn. Applied in this order: guidance, temperature, top-k, top-p, min-p."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.guidance_interval) != [0.0, 1.0] and self.guidance_schedule != "interval":
            raise UsageError("--guidance-interval: needs --guidance-schedule interval")
        if self.guidance_exponent != EXPONENT and self.guidance_schedule != "power-cosine":
            raise UsageError("--guidance-exponent: needs --guidance-schedule power-cosine")
        if self.guidance_schedule != "constant" and not self.guided:
            needed = "a --guidance-scale or --source-guidance-scale other than 1"
            raise UsageError(f"--guidance-schedule: {self.guidance_schedule} needs {needed}")

    @property
    def guided(self) -> bool:
        """Whether logits with fewer conditions are needed at all."""
        return self.guidance_scale != 1 or self.source_guidance_scale != 1

    def without_source_guidance(self) -> "SamplingSettings":
        """The settings of the same series drawn without a source; without a schedule where nothing else is guided."""
        unscheduled = {"guidance_schedule": "constant", "guidance_exponent": EXPONENT, "guidance_interval": [0.0, 1.0]}
        return replace(self, source_guidance_scale=1.0, **unscheduled if self.guidance_scale == 1 else {})

    def guidance_at(self, scale: float, position: int, length: int) -> float:
        """What the schedule makes of a guidance scale at code `position` of an image's `length`."""
        if self.guidance_schedule == "constant":
            return scale
        if self.guidance_schedule == "interval":
            first, last = self.guidance_interval
            return scale if first <= (position + 0.5) / length <= last else 1.0
        share = position / max(length - 1, 1)
        if self.guidance_schedule != "linear":
            exponent = self.guidance_exponent if self.guidance_schedule == "power-cosine" else 1
            share = (1 - math.cos(math.pi * share**exponent)) / 2
        return 1 + (scale - 1) * share


def read_recommended(folder: Path) -> dict[str, Any]:
    """Name -> value of the settings that a prior's folder recommends; none where its file is of transformers alone.

    Raises `UserError` for values that are no settings.
    """
    path = folder / GENERATION
    tree = read_json(path) if is_file(path) else {}
    if RECOMMENDED not in tree:
        return {}
    own, wanted = tree[RECOMMENDED], f"the settings that only vqgen knows below {RECOMMENDED}; correct or remove it"
    if not isinstance(own, dict):
        raise UserError(f"{path}: found {RECOMMENDED} {own!r:.80}, expected {wanted}")
    if misplaced := next((name for name in SHARED if name in own), None):
        raise UserError(f"{path}: found {RECOMMENDED}.{misplaced}, expected {wanted}")
    stated = {name: tree[name] for name in SHARED if name in tree} | own
    if tree.get("do_sample") is False:
        stated["temperature"] = 0.0
    try:
        settings = vars(from_dict(SamplingSettings, stated, str(path)))
    except UserError as error:
        text = str(error).rpartition("; it was written by")[0] or str(error)
        raise UserError(f"{text}; correct or remove it") from error
    return {name: settings[name] for name in stated}


def write_recommended(folder: Path, settings: SamplingSettings, generation: Mapping[str, Any]) -> None:
    """Write settings as those that a prior's folder recommends; `generation` is `Prior.generation_config()`.

    Transformers has no temperature 0: there `do_sample` is false.
    """
    plain = SamplingSettings()
    own = {name: value for name, value in vars(settings).items() if value != getattr(plain, name)}
    shared = {name: getattr(settings, name) for name in SHARED}
    if not settings.temperature:
        shared |= {"do_sample": False, "temperature": plain.temperature}
    further = {name: value for name, value in own.items() if name not in SHARED}
    write_json(folder / GENERATION, {**generation, **shared, RECOMMENDED: further})


def combined(given: Mapping[str, Any], recommended: Mapping[str, Any]) -> SamplingSettings:
    """The given settings, and the recommended ones for all others that these leave an effect. Raises `UsageError`."""
    given = {name: _plain(value) for name, value in given.items()}
    check_types(SamplingSettings, given)
    chosen = {**recommended, **given}
    plain = SamplingSettings()

    def without(name: str) -> None:
        if name not in given:
            chosen.pop(name, None)

    if not any(chosen.get(name, 1) != 1 for name in SCALES):
        without("guidance_schedule")
    schedule = chosen.get("guidance_schedule", plain.guidance_schedule)
    if schedule != "power-cosine":
        without("guidance_exponent")
    if schedule != "interval":
        without("guidance_interval")
    return SamplingSettings(**chosen)


def _plain(value: Any) -> Any:
    """A value given in Python as the command line would give it: numbers of numpy and torch, and tuples."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def in_words(values: Mapping[str, Any]) -> str:
    """Settings as words of a command line."""
    words = []
    for name, value in values.items():
        texts = (f"{each:g}" if isinstance(each, float) else str(each) for each in _as_list(value))
        words += [option_name(name), *texts]
    return " ".join(words)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
