"""Worker processes that decode images."""

import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class Loader:
    """Worker processes that outlive one reading: a DataLoader whose plan is exchanged."""

    def __init__(self, dataset: Dataset[Any], workers: int):
        self.plan: Iterator[list[Any]] = iter(())
        self.loader = DataLoader(
            dataset,
            batch_sampler=self,  # pyright: ignore[reportArgumentType]
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=4,
            persistent_workers=True,
            multiprocessing_context="spawn",
            # Its own, so that starting workers draws nothing from the training's random numbers.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[list[Any]]:
        return self.plan

    def batches(self, plan: Iterator[list[Any]]) -> Iterator[Any]:
        self.plan = plan
        # A terminal interrupts the whole group: the run saves first, so its workers must outlive the signal.
        resource_tracker.ensure_running()  # which unblocks it when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return iter(self.loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(batch: Any) -> Any:
    return batch


def worker_count(asked: int) -> int:
    """Worker processes of this process: -1 shares the cores among the processes of the machine, one each kept free."""
    if asked >= 0:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 0), 16)
