"""A training run: its folder, its Accelerator, and the loop that both stages share.

To a trainer the run adds precision, logging, checkpoints, exact resume, signal handling and the check for non-finite
numbers. A step is a function of (seed, step, state), and the state is what a checkpoint holds.
"""

import json
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from vqgen.devices import describe, keep_memory, on_main, peak_memory, precision_of, processes
from vqgen.errors import DataError, UsageError, UserError
from vqgen.files import write_text
from vqgen.progress import progress
from vqgen.seeding import step_seed
from vqgen.threads import oversubscription

from .checkpoint import SCALER, load_checkpoint, newest_checkpoint, read_state, rotate, save_checkpoint
from .finite import REMEDY, FiniteCheck, NonFinite, non_finite
from .folder import CHECKPOINTS, Session, check_folder, checkpoints, completed, finish, prepare_folder, save_options
from .fsdp import configure_fsdp, forget_former_run, full_tensors, is_sharded
from .health import Row
from .options import RunConfig
from .schedule import Plan
from .summary import changes, expectation, extent, summary
from .trackers import JsonlTracker, further_trackers, read_history, validated
from .trainer import Trainer

SHOWN = ("loss", "inpainting_loss", "reconstruction", "perceptual", "adversarial", "lr", "peak_memory_gb")
"""Training metrics beside the progress."""
EXPECT_AFTER = 10.0
"""Seconds of training after which a run says how long it is expected to take."""


class Run:
    """A run folder with its Accelerator.

    Args:
        folder: created if missing; one that holds the same run is resumed, one that holds another is refused.
        config: the whole resolved configuration, saved as `config.yaml`.
        overwrite: when training begins, remove an earlier run from `folder` and start from step 0.
        shardable: whether the stage can train with FSDP.

    Nothing in the folder changes before `fit`, so an error in the options or the data costs no earlier run.
    """

    def __init__(
        self, folder: Path, config: Any, settings: RunConfig, overwrite: bool, shardable: bool = False
    ) -> None:
        self.folder, self.config, self.settings, self.overwrite = folder, config, settings, overwrite
        mixed = precision_of(settings.precision, cast(torch.device, processes().device))
        forget_former_run()
        self.accelerator = Accelerator(
            mixed_precision=mixed,
            gradient_accumulation_steps=settings.accumulate,
            log_with=[JsonlTracker(folder / "metrics.jsonl"), *further_trackers(settings.log_with)],  # type: ignore[list-item]
            project_dir=str(folder / "logs"),
            # The quantizer keeps the codebook, the only buffer that changes, equal on all ranks.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            step_scheduler_with_optimizer=False,
        )
        configure_fsdp(self.accelerator)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.precision = self.accelerator.mixed_precision.replace("no", "fp32")
        self.sharded = is_sharded(self.accelerator)
        if self.sharded and not shardable:
            raise UsageError("accelerate: found FSDP; only the prior trains with it, start this without --use_fsdp")
        parts = self.accelerator.num_processes * settings.accumulate
        if settings.batch_size % parts:
            split = f"{self.accelerator.num_processes} processes x --accumulate {settings.accumulate}"
            raise UsageError(f"--batch-size: found {settings.batch_size}, expected a multiple of {parts} = {split}")
        self.micro_batch = settings.batch_size // parts
        on_main(lambda: check_folder(folder, config, overwrite))
        self.plan = Plan(settings.steps, bounded=True)
        self.quiet = False
        self.done = 0  # steps
        self.seconds = 0.0  # of the loop, those before a resume included
        self.unvalidated = False  # a validation was due after the last step and has not ended
        self.finite = FiniteCheck(self.accelerator)
        self.rows: list[Row] = []
        self._sums: dict[str, tuple[Tensor, int]] = {}  # metric -> sum and count since the last row
        self._signal = 0
        self.session: Session | None = None  # of the main process

    def say(self, text: str) -> None:
        """Print a line from the main process, above any progress bar."""
        if self.main and not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def completed(self) -> bool:
        """Whether the folder holds the finished run with at least the steps that are asked for, or stopped early.

        Then what a kill at the very end left in it is removed.
        """
        patience = getattr(self.config, "patience", 0)  # of a prior
        return not self.overwrite and completed(self.folder, self.settings.steps, patience, self.main)

    def _restore(self, trainer: Trainer) -> int:
        """Load the newest checkpoint, cut the history back to it, and return the number of steps done."""
        path, problems = on_main(lambda: newest_checkpoint(self.folder / CHECKPOINTS))
        for problem in problems:
            self.say(f"{problem}; the checkpoint before it is used")
        if not path:
            if (self.folder / "vqgen.json").exists():
                lacks = f"{self.folder} holds a finished model but no checkpoint to resume from"
                raise UserError(f"--output: {lacks}; use --overwrite to start from step 0, or choose another folder")
            if self.main:
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return 0
        trainer.check(read_state(path).extra)
        state = load_checkpoint(path, trainer.modules, self._optimizers(trainer))
        step, extra = state["step"], state["extra"]
        sums, saved_plan, before = extra.pop("sums"), extra.pop("plan", None), extra.pop("precision", self.precision)
        self._sums = {name: (torch.tensor(total, device=self.device), count) for name, (total, count) in sums.items()}
        self.seconds, self.unvalidated = float(extra.pop("seconds", 0.0)), extra.pop("unvalidated", False)
        trainer.extra.update(extra)
        if before != self.precision:  # of `auto`, on another machine
            self.say(f"--precision: {self.settings.precision} was {before} up to step {step}, now {self.precision}")
        if step > self.settings.steps:
            raise UserError(f"{self.settings.length}, but {path} is further; give more")
        schedule = next(part for part in trainer.optimizers.values() if isinstance(part, LambdaLR))
        if changed := self.plan.resume(step, saved_plan, schedule):
            self.say(changed)
        history = self.folder / "metrics.jsonl"
        rows, damaged = read_history(history, step)
        self.rows += rows
        if damaged:
            self.say(f"{history}: left out {damaged} line{'s' * (damaged > 1)} that cannot be read")
        self.accelerator.wait_for_everyone()
        if self.main:
            write_text(history, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.say(f"resuming from {path}")
        return step

    def _optimizers(self, trainer: Trainer) -> dict[str, Any]:
        """Optimizers, schedules and, under fp16, the gradient scaler."""
        scaler = self.accelerator.scaler
        return trainer.optimizers if scaler is None else {**trainer.optimizers, SCALER: scaler}

    def logs(self, step: int) -> bool:
        """Whether a row of training metrics follows step `step` (0 is the first)."""
        return (step + 1) % self.settings.log_every == 0 or step + 1 == self.settings.steps

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append a row to metrics.jsonl and send it to the other trackers."""
        self.rows.append({"step": step, **values})
        self.accelerator.log(dict(values), step=step)

    def checkpoint(self, trainer: Trainer) -> None:
        """Save a checkpoint. Raises `NonFinite` where a loss or a weight is not finite, and then saves nothing."""
        self.finite.check()
        if bad := non_finite(trainer.modules):
            raise NonFinite(f"weights {bad} after step {self.done}")
        totals = self._over_processes({name: total for name, (total, _) in self._sums.items()})
        sums = {name: [total, self._sums[name][1]] for name, total in totals.items()}
        extra = {**trainer.extra, "sums": sums, "plan": vars(self.plan), "seconds": round(self.seconds, 3)}
        extra |= {"unvalidated": self.unvalidated, "precision": self.precision}
        if (position := trainer.position) is not None:
            extra["positions"] = gather_object([position])
        folder, keep = self.folder / CHECKPOINTS, self.settings.keep_checkpoints
        save_checkpoint(folder, self.done, trainer.modules, self._optimizers(trainer), extra, keep, write=self.main)
        if self.session:
            self.session.saved(self.done)
        self.accelerator.wait_for_everyone()

    def backward(self, terms: Mapping[str, Tensor], total: Tensor) -> None:
        """Back-propagate `total`. The named `terms` and `total` are checked to be finite, see `FiniteCheck`."""
        self.finite.record(self.done + 1, {**terms, "loss": total})
        self.accelerator.backward(total)

    def update(self, model: nn.Module, optimizer: Any, schedule: Any | None, clip: float) -> Tensor:
        """Clip the gradient and take one optimizer step; returns the gradient norm, which is checked to be finite."""
        norm = full_tensors(torch.as_tensor(self.accelerator.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        if self.accelerator.scaler is None:  # under fp16 the scaler skips such a step and lowers its scale
            self.finite.record(self.done + 1, {"gradient norm": norm})
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return norm.detach()

    def part(self, model: nn.Module, index: int) -> AbstractContextManager[Any]:
        """Context of accumulation part `index`: processes exchange gradients in the last part only."""
        last = index == self.settings.accumulate - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        return nullcontext() if last or self.sharded else self.accelerator.no_sync(model)

    def fit(self, trainer: Trainer) -> None:
        """Train to the last step: resume, step, log, validate, save checkpoints; then write the model folder.

        On SIGTERM or SIGINT the current step is completed, a checkpoint saved, and the process ends with 128 + the
        signal's number. A step that raises is never saved; those before are where its data cannot be read.
        """
        keep_memory(self.device)
        on_main(lambda: prepare_folder(self.folder, self.config, self.overwrite))
        self.accelerator.init_trackers("vqgen", config={})
        self.done = first = self._restore(trainer)
        on_main(lambda: save_options(self.folder, self.config))  # what is refused leaves the former one
        # A kill may have come between the last checkpoint and this.
        on_main(lambda: rotate(self.folder / CHECKPOINTS, first, self.settings.keep_checkpoints))
        if self.main:
            about = describe(self.device, self.precision, self.accelerator.num_processes)
            self.session = Session(self.folder, first, about)
        if busy := oversubscription(torch.get_num_threads()) if self.device.type == "cpu" else None:
            self.say(busy)
        self.say(summary(self, trainer))
        asked = self.config.optimizer.lr_warmup
        if not first and (warmup := self.plan.warmup(self.config.optimizer)) < asked:
            self.say(f"--lr-warmup: {asked} is more than half of {self.settings.steps} steps; {warmup} are used")
        if not first:
            self._diagnose(trainer, 0)  # problems that are known before the first step
        trainer.begin(first)
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop(trainer)
        except NonFinite as error:
            saved = checkpoints(self.folder / CHECKPOINTS)[-1:]
            last = f"last good checkpoint: {saved[0]}" if saved else "no checkpoint was saved yet"
            text = f"not finite: {error}; it began in {trainer.origin()}"
            self.log({"health": "not finite", "message": text}, self.done)
            raise UserError(f"{text}; {last}. Start again (--overwrite) with {REMEDY}") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.main:
            trainer.save()
            finish(self.folder, self.done, trainer.extra.get("stale", 0))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _loop(self, trainer: Trainer) -> None:
        settings, sums, seconds, told = self.settings, self._sums, 0.0, False
        logged = first = self.done
        entered, began = time.perf_counter(), time.perf_counter() - self.seconds
        if self.unvalidated or (self.done == settings.steps and not validated(self.rows, self.done)):
            self._validate(trainer)
            self.checkpoint(trainer)
        with progress(settings.steps, self.folder.name, "step", self.main, self.done) as bar:
            while self.done < settings.steps and not trainer.finished():
                torch.manual_seed(step_seed(settings.seed, self.done, self.accelerator.process_index))
                start = time.perf_counter()
                try:
                    scalars = trainer.step(self.done)
                except DataError:
                    if self.accelerator.num_processes == 1 and self.done % settings.checkpoint_every:
                        self.finite.check()
                        self.checkpoint(trainer)
                    raise
                for name, value in scalars.items():
                    total, count = sums.get(name, (0.0, 0))
                    sums[name] = (value + total, count + 1)
                self.done = done = self.done + 1
                log, validate, save = (
                    done % every == 0 or done == settings.steps
                    for every in (settings.log_every, settings.validate_every, settings.checkpoint_every)
                )
                if waits := log or validate or save:
                    self.finite.check()  # waits for the device, so that `seconds` is the time of its work
                seconds += time.perf_counter() - start
                self.seconds = time.perf_counter() - began
                if not told and (told := time.perf_counter() - entered >= EXPECT_AFTER):
                    self._expect(time.perf_counter() - entered, done - first)
                bar.update()
                if log:
                    means = self._over_processes({name: total / count for name, (total, count) in sums.items()})
                    rate = (done - logged) * settings.batch_size / seconds
                    means |= {"per_second": rate, **trainer.rates(rate), **extent(self, trainer)}
                    self.log({f"train/{n}": v for n, v in means.items()}, done)
                    bar.set_postfix({name: f"{means[name]:.3g}" for name in SHOWN if name in means})
                    sums.clear()
                    logged, seconds = done, 0.0
                if validate:
                    self._validate(trainer)
                number = self._received_signal(waits)
                if number or save or trainer.finished():
                    self.checkpoint(trainer)
                if number:
                    bar.close()
                    self.say(f"stopped by a signal after step {done}, saved; run the same command again to resume")
                    self.accelerator.end_training()
                    raise SystemExit(128 + number)
        if reason := trainer.finished():
            self.say(reason)

    def _expect(self, seconds: float, done: int) -> None:
        """Say what the steps that are left are expected to take, after `done` steps in `seconds` without validation."""
        left, every = self.settings.steps - self.done, self.settings.validate_every
        if left:
            validations = self.settings.steps // every - self.done // every
            self.say(expectation(seconds, done, left, validations, peak_memory(self.device)))

    def _over_processes(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Means of scalars over all processes; waits for the device once."""
        if not values:
            return {}
        local = torch.stack([value.float().to(self.device) for value in values.values()])
        return dict(zip(values, cast(Tensor, self.accelerator.reduce(local, "mean")).tolist()))

    def _validate(self, trainer: Trainer) -> None:
        """Log and print held-out metrics; where they fail, first save a checkpoint, from which they are repeated."""
        self.unvalidated, before = True, dict(trainer.extra)
        try:
            metrics = trainer.validate(self.done)
        except Exception:
            trainer.extra.update(before)  # what it found so far is found again
            if self.accelerator.num_processes == 1:  # else the others wait within the validation
                self.checkpoint(trainer)
            raise
        self.unvalidated = False
        self.say(f"step {self.done}: {changes(metrics, self.rows)}")
        self.log({f"heldout/{name}": value for name, value in metrics.items()}, self.done)
        self._diagnose(trainer, self.done)

    def _diagnose(self, trainer: Trainer, step: int) -> None:
        """Log and print new findings, each once per run."""
        reported = {row.get("health") for row in self.rows}
        for finding in trainer.diagnose(self.rows):
            if finding.name not in reported:
                self.log({"health": finding.name, "message": str(finding)}, step)
                self.say(f"warning: {finding}")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def _received_signal(self, waits: bool) -> int:
        """The signal received, or 0; several processes agree on it in steps in which they wait for each other."""
        if self.accelerator.num_processes == 1:
            return self._signal
        if not waits:
            return 0
        number = torch.tensor([self._signal], device=self.device)
        return int(cast(Tensor, self.accelerator.gather(number)).max())
