"""Work on several threads, each of which computes alone.

torch divides an operation among threads by its size, and where it divides decides how some numbers are rounded: sums in
matrix products, the ends of arrays. Here a whole piece of work is done by one thread, so that its result does not
depend on how many there are.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread; afterwards this thread and those that begin later have as many as before."""
    count = torch.get_num_threads()
    if count == 1:  # as in the threads below: setting it here would set it for new threads, too
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@cache
def _pool(count: int, process: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process; a forked process, which inherits none, makes its own."""
    ready = Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # adopts the number that is set for new threads
        torch.set_num_threads(1)  # and this one holds for this thread
        ready.wait()

    pool = ThreadPoolExecutor(count, "vqgen", begin)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(count)  # for the threads of others
    return pool


def in_parts(
    function: Callable[[Tensor], Tensor], rows: Tensor, count: int, each: Callable[..., list[Tensor]] | None = None
) -> list[Tensor]:
    """Results of `function` for parts of `count` rows, so that a row does not depend on how many there are; the last
    part is padded with its last row. `each` computes the parts, by default `on_threads`."""

    def of(part: Tensor) -> Tensor:
        fill = torch.arange(count).clamp(max=len(part) - 1)
        return function(part[fill])[: len(part)]

    return (each or on_threads)(of, rows.split(count) if len(rows) else [])


def on_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return `function` of each item, computed on as many threads as torch has here, an item on one of them alone.

    Where a call raises, those that have not begun are dropped.
    """
    count = torch.get_num_threads()
    if count == 1:
        return [function(item) for item in items]
    futures = [_pool(count, os.getpid()).submit(function, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
