"""What a run prints: its plan on one screen, its progress, and the metrics of validations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from vqgen.devices import peak_memory

from .health import Row

if TYPE_CHECKING:
    from .run import Run
    from .trainer import Trainer


def size_of(parts: Mapping[str, nn.Module]) -> str:
    """The parts of a model with their numbers of parameters, e.g. `encoder 1.20 M, decoder 2.30 M`."""
    return ", ".join(f"{name} {millions(module.parameters())}" for name, module in parts.items())


def millions(parameters: Iterable[nn.Parameter]) -> str:
    """The number of parameters in millions."""
    return f"{sum(p.numel() for p in parameters) / 1e6:.3g} M"


def summary(run: "Run", trainer: "Trainer") -> str:
    """The lines of a run's beginning: what is trained on what, how, for how long, where and to where."""
    settings, optimizer, processes = run.settings, run.config.optimizer, run.accelerator.num_processes
    images = settings.steps * settings.batch_size
    passes = f"{images / trainer.examples:.3g} epochs" if trainer.examples else f"{images:,} images"
    parts = [f"{processes} processes"] * (processes > 1) + [f"{settings.accumulate} parts"] * (settings.accumulate > 1)
    split = f" ({' x '.join(parts)})" if parts else ""
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    rows = {
        **trainer.summary(),
        "training": f"{settings.steps:,} steps of {settings.batch_size}{split}, {passes}",
        "optimizer": f"{optimizer.optimizer}, learning rate {optimizer.lr:g} after {run.plan.warmup(optimizer)} steps, "
        f"then {optimizer.lr_schedule.replace('_', ' ')}; averages of {optimizer.ema_decay:.6g}",
        "machine": f"{run.device}{threads}, {run.precision}",
        "intervals": f"log {settings.log_every}, validation {settings.validate_every}, checkpoint "
        f"{settings.checkpoint_every} steps",
        "output": str(run.folder),
    }
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows.items())


def expectation(seconds: float, done: int, left: int, validations: int, memory: float) -> str:
    """What `left` steps are expected to take after `done` in `seconds`; `memory` in bytes is what it took so far."""
    minutes = seconds / done * left / 60
    long = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"
    duration = long if minutes >= 2 else f"{60 * minutes:.0f} s"
    more = f", and {validations} validations" if validations else ""
    return f"expected: {duration} for the steps that are left{more}; {memory / 1e9:.1f} GB of memory so far"


def extent(run: "Run", trainer: "Trainer") -> dict[str, float]:
    """How far a run is, and what it took, to log."""
    images = run.done * run.settings.batch_size
    memory = peak_memory(run.device) / 1e9
    epoch = {"epoch": images / trainer.examples} if trainer.examples else {}
    return {**epoch, "images": images, "seconds": run.seconds, "peak_memory_gb": memory}


def changes(metrics: Mapping[str, float], rows: Sequence[Row]) -> str:
    """Held-out metrics with their changes since the last validation in `rows`."""
    names = {f"heldout/{name}": name for name in metrics}
    before = next((row for row in reversed(rows) if names.keys() & row.keys()), {})
    values = []
    for key, name in names.items():
        former = before.get(key)
        change = f" ({metrics[name] - former:+.2g})" if isinstance(former, (int, float)) else ""
        values.append(f"{name.replace('_', ' ')} {metrics[name]:.4g}{change}")
    return ", ".join(values)
