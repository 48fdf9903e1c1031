"""Training steps that are compared: each side has a process of its own and they take turns, so that whatever else the
machine does falls on both."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Step = Callable[[int], object]
Make = Callable[[Path], Step]
"""Builds a side's step in its process, given a folder of its own."""


@dataclass
class Compared:
    """What came of it, a side each."""

    seconds: list[float]
    """Median seconds a step."""
    measured: list[float]
    """What `measure` gave for one further step."""
    ratio: float
    """Median over the turns of the first side's seconds over the second's."""


def _nothing(step: Step, index: int) -> float:
    step(index)
    return 0.0


def _serve(pipe: Connection, make: Make, threads: int, measure: Callable[[Step, int], float]) -> None:
    """A process that takes one step for each request, and says how many seconds it took."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        step = make(Path(scratch))
        for done in itertools.count():
            request = pipe.recv()
            if request == "end":
                return
            start = time.perf_counter()
            answer = measure(step, done) if request == "measure" else step(done)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pipe.send(answer if request == "measure" else time.perf_counter() - start)


def _ask(pipe: Connection, request: str) -> float:
    try:
        pipe.send(request)
        return pipe.recv()
    except (EOFError, BrokenPipeError):
        raise SystemExit("a process ended before it answered; too little memory? --batch-size is smaller") from None


def compare(
    makes: Sequence[Make], steps: int, threads: int, measure: Callable[[Step, int], float] = _nothing
) -> Compared:
    """Let two sides take `steps` steps each in turns, after a first one that is not timed."""
    context = torch.multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for make in makes:
        here, there = context.Pipe()
        pipes.append(here)
        processes.append(context.Process(target=_serve, args=(there, make, threads, measure), daemon=True))
        processes[-1].start()
        there.close()  # so that the end of the process is noticed here
        _ask(here, "step")  # the first one allocates
    turns = [[_ask(pipe, "step") for pipe in pipes] for _ in range(steps)]
    measured = [_ask(pipe, "measure") for pipe in pipes]
    for pipe, process in zip(pipes, processes):
        pipe.send("end")
        process.join()
    ratio = statistics.median(first / second for first, second in turns)
    return Compared([statistics.median(seconds) for seconds in zip(*turns)], measured, ratio)
