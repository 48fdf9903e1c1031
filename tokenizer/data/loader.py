"""Worker processes that decode images, and threads that read them in advance."""

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from vqgen.errors import UserError
from vqgen.threads import available_cpus

T = TypeVar("T")

# Signals to a whole process group that the training process answers by saving: its workers must outlive them.
# Without `sigwaitinfo` (macOS) a worker cannot tell its parent's SIGTERM, so it keeps obeying every one.
_HELD = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else {signal.SIGINT}


class _Reporting(Dataset[Any]):
    """A dataset that returns a `UserError`: raised in a worker, it would reach the parent wrapped in a traceback."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            return self.dataset.__getitems__(keys)
        except UserError as error:
            return error


class Loader:
    """Worker processes that persist over several passes: a DataLoader whose batches of keys can be replaced."""

    def __init__(self, dataset: Dataset[Any], workers: int):
        self.plan: Iterator[Any] = iter(())
        self.loader = DataLoader(
            _Reporting(dataset),
            batch_sampler=self,  # pyright: ignore[reportArgumentType]
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=4,
            persistent_workers=True,
            multiprocessing_context="spawn",
            worker_init_fn=_obey_parent_alone,
            generator=torch.Generator(),  # starting workers draws no number from the training's
        )

    def __iter__(self) -> Iterator[Any]:
        return self.plan

    def batches(self, plan: Iterator[Any]) -> Iterator[Any]:
        """Load the batches of keys in `plan`, in order. Raises `UserError`, also where a worker was killed."""
        self.plan = plan
        try:
            for batch in self._start():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (RuntimeError, EOFError, OSError) as error:
            # The death of a worker is the RuntimeError, or an error of the connection that its batches came through.
            told, passed_on = r"DataLoader worker \(pid", "in DataLoader worker process"
            if passed_on in str(error) or (isinstance(error, RuntimeError) and not re.match(told, str(error))):
                raise
            found = "a process that decodes images was killed, perhaps for want of memory"
            raise UserError(f"--workers: {found}; use fewer, or 0 to decode in the main process") from error

    def _start(self) -> Iterator[Any]:
        resource_tracker.ensure_running()  # its start would unblock the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)  # workers inherit the mask
        handler, safe = signal.getsignal(signal.SIGCHLD), os.environ.get(_SAFE_PATH)
        os.environ[_SAFE_PATH] = "1"  # workers take no modules from the current folder (Python 3.11)
        try:
            return iter(self.loader)
        finally:
            os.environ.pop(_SAFE_PATH)
            os.environ.update({} if safe is None else {_SAFE_PATH: safe})
            if threading.current_thread() is threading.main_thread():
                # torch's handler would raise the death of a worker anywhere, e.g. in the middle of a training step.
                signal.signal(signal.SIGCHLD, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_SAFE_PATH = "PYTHONSAFEPATH"


def _unchanged(batch: Any) -> Any:
    return batch


def _obey_parent_alone(_worker: int) -> None:
    """Wait for SIGTERM in a thread of a worker and exit where the parent sent it; any other is ignored."""

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)  # as torch's own handler; another code would be an error in the parent

    if signal.SIGTERM in _HELD:
        threading.Thread(target=wait, daemon=True).start()


_LEFT: ContextVar[threading.Event] = ContextVar("left")  # of a thread of `background`: set once nobody needs its work


@contextmanager
def background(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; where the block is left, e.g. by an interrupt, a `pause` in them ends with their work."""
    left = threading.Event()
    pool = ThreadPoolExecutor(threads, initializer=_LEFT.set, initargs=(left,))
    try:
        yield pool
    finally:
        left.set()
        pool.shutdown(cancel_futures=True)


def pause(seconds: float) -> None:
    """Sleep. Raises `CancelledError` in a thread of `background` whose work nobody needs any more."""
    left = _LEFT.get(None)
    if left is None:
        time.sleep(seconds)
    elif left.wait(seconds):
        raise CancelledError


def prefetch(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the same items; up to `count` of them are computed in a background thread in advance."""
    with background(1) as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(count))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item


def worker_count(asked: int) -> int:
    """Number of worker processes: `asked`, or for -1 one a core, less one for each process on this machine."""
    if asked >= 0:
        return asked
    return min(max(available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 0), 16)
