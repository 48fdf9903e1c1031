"""A training run: its folder, its Accelerator, and the loop both stages share.

A trainer brings `step` and `validate`; the run brings precision, logging, checkpoints, exact resume, signals and the
watch over finite numbers. After a step nothing depends on how the run got there, only on (seed, step, weights).
"""

import json
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from vqgen.devices import describe, keep_memory, precision_of, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import read_json, write_json, write_text
from vqgen.output_folder import FINISHED, check_folder, take_folder
from vqgen.progress import progress
from vqgen.seeding import step_seed

from .checkpoint import NonFinite, checkpoints, finite_or_raise, load_checkpoint, non_finite, save_checkpoint
from .fsdp import configure_fsdp, full_tensors, is_sharded
from .health import Row
from .options import RunConfig
from .sessions import Session
from .trackers import JsonlTracker, further_trackers, read_history
from .trainer import Trainer


class Run:
    """A run folder with its Accelerator.

    Args:
        folder: made if missing; one that holds the same run is resumed, one that holds another is refused.
        config: the whole resolved configuration, saved as `config.yaml`.
        overwrite: when training begins, remove what an earlier run left in `folder` and start anew.
        shardable: whether the stage can train weights that FSDP shares out.

    Until `fit` nothing in the folder changes: what is found wrong before costs no earlier run.
    """

    def __init__(
        self, folder: Path, config: Any, settings: RunConfig, overwrite: bool, shardable: bool = False
    ) -> None:
        self.folder, self.config, self.settings, self.overwrite = folder, config, settings, overwrite
        mixed = precision_of(settings.precision, cast(torch.device, processes().device))
        # Accelerate keeps one precision a Python process; a second run in it (both stages in one) brings its own.
        AcceleratorState._reset_state()
        # Every rank computes the same buffers (the codebook is kept equal by the quantizer): nothing to broadcast.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(
            mixed_precision=mixed,
            gradient_accumulation_steps=settings.accumulate,
            log_with=[JsonlTracker(folder / "metrics.jsonl"), *further_trackers(settings.log_with)],  # type: ignore[list-item]
            project_dir=str(folder / "logs"),
            kwargs_handlers=[ddp],
            step_scheduler_with_optimizer=False,
        )
        configure_fsdp(self.accelerator)
        if self.sharded and not shardable:
            raise UsageError("accelerate: found FSDP; only the prior trains with it, start this without --use_fsdp")
        parts = self.accelerator.num_processes * settings.accumulate
        if settings.batch_size % parts:
            raise UsageError(
                f"--batch-size: {settings.batch_size} does not divide into {self.accelerator.num_processes} "
                f"processes x --accumulate {settings.accumulate}; use a multiple of {parts}"
            )
        self.micro_batch = settings.batch_size // parts
        if self.main:
            check_folder(folder, config, overwrite)
        self.accelerator.wait_for_everyone()
        self.rows: list[Row] = []
        self._sums: dict[str, tuple[Tensor, int]] = {}  # of the figures since the last row, with their counts
        self._signal: int | None = None
        self.session: Session | None = None  # on the main process, while it trains

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def sharded(self) -> bool:
        """Whether FSDP shares out the weights over the processes."""
        return is_sharded(self.accelerator)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def say(self, text: str) -> None:
        """Print a line from the main process, above any progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def completed(self) -> bool:
        """Whether the folder holds the finished run, with as many steps as asked for now."""
        if self.overwrite:
            return False
        path = self.folder / FINISHED
        done = path.is_file() and read_json(path).get("steps", 0) >= self.settings.steps
        return done and (self.folder / "vqgen.json").is_file()

    def _restore(self, trainer: Trainer) -> int:
        """Load the newest checkpoint, cut the history to it, and return the next step."""
        found = checkpoints(self.folder / "checkpoints")
        if not found:
            if (self.folder / "vqgen.json").exists():
                raise UserError(
                    f"--output: {self.folder} holds a finished model but no checkpoint to go on from; "
                    "--overwrite to start anew, or choose another folder"
                )
            if self.main:
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return 0
        state = load_checkpoint(found[-1], trainer.modules, self._optimizers(trainer))
        sums = state["extra"].pop("sums")
        self._sums = {name: (torch.tensor(total, device=self.device), count) for name, (total, count) in sums.items()}
        trainer.extra.update(state["extra"])
        if state["step"] > self.settings.steps:
            raise UserError(f"--steps: found {self.settings.steps}, but {found[-1]} is further; ask for more steps")
        history = self.folder / "metrics.jsonl"
        self.rows += read_history(history, state["step"])
        self.accelerator.wait_for_everyone()
        if self.main:
            write_text(history, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.say(f"resuming from {found[-1]}")
        return state["step"]

    def _optimizers(self, trainer: Trainer) -> dict[str, Any]:
        """Optimizers and schedules, and the gradient scaler where fp16 needs one."""
        scaler = self.accelerator.scaler
        return trainer.optimizers if scaler is None else {**trainer.optimizers, "scaler": scaler}

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """One row of metrics.jsonl, and the same to the other trackers."""
        self.rows.append({"step": step, **values})
        self.accelerator.log(dict(values), step=step)

    def checkpoint(self, trainer: Trainer, step: int) -> None:
        """Save, unless a weight is not finite: the last good checkpoint must stay the last."""
        bad = non_finite(trainer.modules)
        if bad:
            raise NonFinite(f"weights {bad}")
        totals = self._over_processes({name: total for name, (total, _) in self._sums.items()})
        extra = {**trainer.extra, "sums": {name: [total, self._sums[name][1]] for name, total in totals.items()}}
        folder, keep = self.folder / "checkpoints", self.settings.keep_checkpoints
        save_checkpoint(folder, step, trainer.modules, self._optimizers(trainer), extra, keep, write=self.main)
        if self.session:
            self.session.saved(step)
        self.accelerator.wait_for_everyone()

    def backward(self, terms: Mapping[str, Tensor], total: Tensor) -> None:
        """Back-propagate `total`; raises `NonFinite` first where one of the named `terms` is not finite."""
        finite_or_raise({**terms, "loss": total})
        self.accelerator.backward(total)

    def update(self, model: nn.Module, optimizer: Any, schedule: Any | None, clip: float) -> Tensor:
        """Clip, check and take one optimizer step; returns the gradient's norm. Raises `NonFinite` before the step."""
        norm = full_tensors(torch.as_tensor(self.accelerator.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        if self.accelerator.scaler is None:  # under fp16 the scaler skips such a step and lowers its scale
            finite_or_raise({"gradient norm": norm})
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return norm.detach()

    def part(self, model: nn.Module, index: int) -> AbstractContextManager[Any]:
        """The context of accumulation part `index`: gradients are exchanged between processes in the last alone."""
        last = index == self.settings.accumulate - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        return nullcontext() if last or self.sharded else self.accelerator.no_sync(model)

    def fit(self, trainer: Trainer) -> None:
        """Train to the last step: resume, step, log, validate, checkpoint; then write the model folder.

        SIGTERM and SIGINT save a checkpoint and end the process with 128 + the signal's number.
        """
        keep_memory(self.device)
        if self.main:
            take_folder(self.folder, self.config, self.overwrite)
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("vqgen", config={})
        first = self._restore(trainer)
        if self.main:
            about = describe(self.device, self.accelerator.mixed_precision, self.accelerator.num_processes)
            self.session = Session(self.folder, first, about)
        if not first:
            self._diagnose(trainer, 0)  # what can be told before the first step
        trainer.begin(first)
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop(trainer, first)
        except NonFinite as error:
            found = checkpoints(self.folder / "checkpoints")
            last = f"last good checkpoint: {found[-1]}" if found else "no checkpoint was saved yet"
            text = f"not finite: {error}; it began in {trainer.origin()}"
            self.log({"health": "not finite", "message": text}, self.done)
            remedy = "Start anew (--overwrite) with a lower --lr, a longer --lr-warmup or --precision fp32"
            raise UserError(f"{text}; {last}. {remedy}") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.main:
            trainer.save()
            write_json(self.folder / FINISHED, {"steps": self.done})
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _loop(self, trainer: Trainer, first: int) -> None:
        settings, sums, seconds = self.settings, self._sums, 0.0
        self.done = done = logged = first
        with progress(settings.steps, self.folder.name, "step", self.main, first) as bar:
            while done < settings.steps and not trainer.finished():
                torch.manual_seed(step_seed(settings.seed, done, self.accelerator.process_index))
                start = time.perf_counter()
                try:
                    figures = trainer.step(done)
                except RuntimeError:
                    # A signal to the whole process group ends the decoding workers too, before this step did anything.
                    if not self._signal or self.accelerator.num_processes > 1:
                        raise
                    self._stop(trainer, done, self._signal)
                seconds += time.perf_counter() - start
                for name, value in figures.items():
                    total, count = sums.get(name, (0.0, 0))
                    sums[name] = (value + total, count + 1)
                self.done = done = done + 1
                bar.update()
                last = done == settings.steps
                if done % settings.log_every == 0 or last:
                    means = self._over_processes({name: total / count for name, (total, count) in sums.items()})
                    rate = (done - logged) * settings.batch_size / seconds
                    means |= {"per_second": rate, **trainer.rates(rate)}
                    self.log({f"train/{n}": v for n, v in means.items()}, done)
                    bar.set_postfix({"loss": f"{means['loss']:.3f}"})
                    sums.clear()
                    logged, seconds = done, 0.0
                if done % settings.validate_every == 0 or last:
                    self._validate(trainer, done)
                if stopping := self._stopping():
                    bar.close()
                    self._stop(trainer, done, stopping)
                if done % settings.checkpoint_every == 0 or last or trainer.finished():
                    self.checkpoint(trainer, done)
        if reason := trainer.finished():
            self.say(reason)

    def _over_processes(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars -> their means over all processes; one wait for the device."""
        if not values:
            return {}
        local = torch.stack([value.float().to(self.device) for value in values.values()])
        return dict(zip(values, cast(Tensor, self.accelerator.reduce(local, "mean")).tolist()))

    def _validate(self, trainer: Trainer, step: int) -> None:
        figures = trainer.validate(step)
        self.log({f"heldout/{name}": value for name, value in figures.items()}, step)
        self.say(f"step {step}: " + ", ".join(f"{n.replace('_', ' ')} {value:.4g}" for n, value in figures.items()))
        self._diagnose(trainer, step)

    def _diagnose(self, trainer: Trainer, step: int) -> None:
        """Log and say what is wrong by now, each thing once."""
        named = {row.get("health") for row in self.rows}
        for finding in trainer.diagnose(self.rows):
            if finding.name not in named:
                self.log({"health": finding.name, "message": str(finding)}, step)
                self.say(f"warning: {finding}")

    def _stop(self, trainer: Trainer, step: int, number: int) -> NoReturn:
        """Save after `step` steps and end the process as signal `number` asked."""
        self.checkpoint(trainer, step)
        self.say(f"stopped by a signal after step {step}, saved; the same command goes on from there")
        self.accelerator.end_training()
        raise SystemExit(128 + number)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def _stopping(self) -> int | None:
        """The signal that any process received, agreed on by all."""
        number = self._signal or 0
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.gather(torch.tensor([number], device=self.device))
            number = int(cast(Tensor, flags).max())
        return number or None
