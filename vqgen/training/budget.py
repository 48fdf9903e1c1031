"""A budget of minutes or epochs in place of a number of steps.

The steps follow from the budget before the run begins, and are saved with its configuration. What is counted in steps
is then changed in the proportion of these steps to those configured: warm-up, intervals and so on.
"""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from vqgen.config import read_saved
from vqgen.devices import keep_memory, on_main, release_memory
from vqgen.errors import UsageError, UserError
from vqgen.options import changed, key_of

from .finite import REMEDY, NonFinite
from .folder import CONFIG, has_trained, run_folder
from .options import RunConfig
from .run import Run
from .trainer import Trainer

C = TypeVar("C")
IN_STEPS = {"lr_warmup", "validate_every", "checkpoint_every", "log_every"}
IN_STEPS |= {"gan_start", "gan_warmup", "gan_ramp", "revive_after"}
"""Options that are a number of steps."""
NO_LONGER = {"checkpoint_every", "log_every"}
"""Those of them that a longer run leaves as they are: they bound what a kill costs, and what is seen late."""
BUDGETS = ("minutes", "epochs")
"""Options that take the place of a number of steps."""
TRIAL_STEPS, TRIAL_SECONDS = 30, 20.0
"""A trial takes so many steps at most, and ends after so many seconds if it has taken four."""
EPOCHS_VALIDATIONS = 10
"""Most validations of a run that is given epochs, whose time is not known."""
VALIDATION = 0.2
"""Share of the time that validations may take, where the command line does not say how often there is one."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a trial run took, in seconds."""

    start: float
    """Until the first step, without the reading of images that are then kept in memory."""
    step: float
    validation: float
    reading: float = 0.0
    """Of one training image that is kept, when a step first needs it; 0 where none are kept."""
    cached: int = 0
    """Training images that are kept."""
    batch: int = 1
    """Images of a step that this process reads."""

    def held(self, left: float, per_step: float) -> float:
        """Seconds of `left` for steps of so many seconds, after the images that they need first were read."""
        slow = per_step + self.reading * self.batch  # until every image was read
        reached = self.cached / self.batch * slow
        return left - self.cached * self.reading if left > reached else left * per_step / slow

    def read_in(self, steps: int) -> float:
        """Seconds of so many steps in which images are read that are then kept."""
        return self.reading * min(self.cached, steps * self.batch)

    def steps(self, seconds: float, validations: int, every: int | None = None) -> tuple[int, int]:
        """Steps that fit into a time, and the number of validations in it.

        Args:
            validations: most of them; no more are counted than take their share of the time.
            every: steps between validations, where that is fixed: then all are counted, that after the last step too.
        """
        per_step = self.step + (self.validation / every if every is not None else 0.0)
        left = self.held(seconds - self.start, per_step)
        if every is not None:
            whole = max(0, int(left / (every * self.step + self.validation)))
            rest = left - whole * (every * self.step + self.validation)
            steps = whole * every + max(0, int((rest - self.validation) / self.step))
            return steps, math.ceil(steps / every)
        affordable = max(1, min(validations, int(VALIDATION * left / max(self.validation, 1e-9))))
        return int((left - affordable * self.validation) / self.step), affordable


def _changed(config: C, change: Callable[[str, Any], Any]) -> C:
    """The configuration with `change(name, value)` for each option that the command line did not set."""
    given = config.given  # type: ignore[attr-defined]

    def of(section: Any) -> Any:
        values = {field.name: (key_of(field), getattr(section, field.name)) for field in dataclasses.fields(section)}
        return changed(
            section,
            **{
                field: of(value) if dataclasses.is_dataclass(value) else value if name in given else change(name, value)
                for field, (name, value) in values.items()
            },
        )

    return of(config)


def scaled(config: C, steps: int, validations: int | None = None) -> C:
    """The configuration for another number of steps: what is counted in steps changes in proportion.

    Options of the command line stay as they are, and intervals of checkpoints and logs become no longer. The decay of
    averaged weights, unless the user chose it, keeps its share of the run. `validations` bounds their number.
    """
    run: RunConfig = config.run  # type: ignore[attr-defined]
    chosen: Set[str] = config.chosen  # type: ignore[attr-defined]
    factor = steps / run.steps

    def change(name: str, value: Any) -> Any:
        if name == "steps":
            return steps
        if name == "ema_decay" and name not in chosen:
            return max(0.0, 1 - (1 - value) / factor) if factor < 1 else value
        if name not in IN_STEPS or value < 1:  # a start below 1 is a share of the steps
            return value
        if name in NO_LONGER and factor > 1:
            return value
        least = math.ceil(steps / validations) if name == "validate_every" and validations else 1
        return max(least, round(value * factor))

    return _changed(config, change)


def measured(
    config: Any,
    build: Callable[[Any], tuple[Run, Trainer] | None],
    steps: int = TRIAL_STEPS,
    seconds: float = TRIAL_SECONDS,
) -> Trial:
    """Time at most `steps` steps and a validation of a run, in a folder that is removed again.

    After four steps it ends with the step that `seconds` fall into, by the clock of the main process.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vqgen-trial-") as folder:
        # With the discriminator from the first step: the run is no slower than this.
        parts = {"gan": dataclasses.replace(config.gan, gan_start=0, gan_warmup=0)} if hasattr(config, "gan") else {}
        # Uncompiled, unless that was asked for: a compilation takes longer than all of the trial.
        settings = changed(config.run, compile=bool(config.run.compile))
        built = build(changed(config, output=Path(folder), overwrite=False, run=settings, **parts))
        assert built is not None, "a new folder holds no finished run"
        run, trainer = built
        run.quiet = True
        keep_memory(run.device)  # as the run does: it changes the time of a step and the peak
        trainer.begin(0)
        start, taken, first = time.perf_counter() - began, list[float](), trainer.loading()
        while len(taken) < steps and not (len(taken) >= 4 and on_main(lambda: sum(taken) > seconds)):
            before = time.perf_counter()
            try:
                trainer.step(len(taken))
                run.finite.check()  # waits for the device
            except NonFinite as error:
                text = f"not finite: {error}, in the trial that times a step; it began in {trainer.origin()}"
                raise UserError(f"{text}; use {REMEDY}") from error
            taken.append(time.perf_counter() - before)
        before = time.perf_counter()
        trainer.validate(0)
        validation = time.perf_counter() - before
        run.accelerator.free_memory()
    # The first step allocates; steps may be of several kinds, so their mean counts.
    step = statistics.fmean(taken[1:])
    # Images of which the decoded pixels are kept: the trial read them for the first time, the run does so once.
    share = config.run.batch_size / run.accelerator.num_processes
    new = min(1.0, trainer.examples / (share * len(taken)))
    later = max(step - first * share * new, step / 10)
    # Held-out images are read before the first validation, whatever the number of steps.
    begun, judged = start + first * trainer.validated, max(validation - first * trainer.validated, validation / 10)
    return Trial(begun, later, judged, first, trainer.examples if first else 0, max(1, round(share)))


def _before(config: Any) -> Mapping[str, Any] | None:
    """Options that the run in the folder was begun with, None where there is none to be resumed."""
    found = None
    if not config.overwrite and run_folder(config.output).recognised:
        with suppress(UserError):  # the run itself says what is wrong with it
            found = read_saved(config.output / CONFIG, type(config))
    return found


def _derived(before: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of a run, those that followed from its budget besides the steps."""
    return {key: before[key] for key in (*IN_STEPS, "ema_decay") if key in before}


def _by_steps(config: C) -> C:
    """The configuration with --steps, which take the place of a budget in a --config file.

    A run that was begun with a budget and is resumed keeps what followed from it, and has as much more of it.
    """
    others: dict[str, Any] = dict.fromkeys(BUDGETS)
    output, steps = config.output, config.run.steps  # type: ignore[attr-defined]
    before = on_main(lambda: _before(config) if has_trained(output) else None) or {}
    if name := next((name for name in BUDGETS if before.get(name)), None):
        others |= _derived(before) | {name: before[name] * steps / before["steps"]}
    found = _changed(config, lambda key, value: others.get(key, value))
    vars(found.run).update(given=config.given)  # type: ignore[attr-defined]  # for `length`
    return found


def settled(config: C, build: Callable[[Any], tuple[Run, Trainer] | None], examples: Callable[[], int]) -> C:
    """The configuration with a number of steps in place of its budget, if it has one.

    A run that is resumed keeps its steps, in proportion to its budget where that has changed. --steps on the command
    line come before a budget in a file.

    Args:
        build: opens a run and its trainer.
        examples: returns the number of training images.

    Raises `UsageError` where the budget holds no step.
    """
    run: RunConfig = config.run  # type: ignore[attr-defined]
    given: Set[str] = config.given  # type: ignore[attr-defined]
    name, budget = ("minutes", run.minutes) if run.minutes is not None else ("epochs", run.epochs)
    if "steps" in given and name not in given:
        return _by_steps(config)
    if budget is None:
        return config
    if "steps" in given:
        raise UsageError(f"--{name}: --steps is given too; give one of them")
    before = on_main(lambda: _before(config) if has_trained(config.output) else None)  # type: ignore[attr-defined]
    validations = max(1, round(run.steps / run.validate_every))
    if before and before.get(name):
        steps = max(1, round(before["steps"] * budget / before[name]))
    elif name == "epochs":
        steps, validations = max(1, math.ceil(budget * examples() / run.batch_size)), EPOCHS_VALIDATIONS
    else:
        # The trial is new where the run is not, which goes on with options that a new run refuses.
        tried = changed(config)
        vars(tried).update(given=given & {"validate_every"} if before else given)
        steps, validations = _fitting(tried, build, budget, validations)
    if before:  # a run that is resumed keeps what followed from its length, whichever option that was
        kept = _derived(before) | {"steps": steps}
        return _changed(config, lambda key, value: kept.get(key, value))
    return scaled(config, steps, validations)


def _fitting(
    config: Any, build: Callable[[Any], tuple[Run, Trainer] | None], minutes: float, validations: int
) -> tuple[int, int]:
    """Steps that fit into a time by a trial run, and how many validations. Raises `UsageError` where it holds none."""
    trial = measured(config, build)
    release_memory()  # the model of the trial is gone, and the run needs the same again
    every = config.run.validate_every if "validate_every" in config.given else None
    found = trial.steps(60 * minutes, validations, every)
    steps, validations = on_main(lambda: found)  # that of the main process in all of them
    if steps < 1:
        times = f"{trial.start:.0f} s to start, {trial.step:.2g} s a step, {trial.validation:.0f} s a validation"
        raise UsageError(f"--minutes: found {minutes:g}, which hold no step ({times}); give more")
    return steps, validations
