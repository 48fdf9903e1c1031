"""A training step of the codebook against vector-quantize-pytorch's VectorQuantize: time and memory.

    python benchmarks/quantizer.py                       # K = 1024, 16384, 65536 with d = 8 and 256
    python benchmarks/quantizer.py --sizes 16384 --dims 8 --threads 2 --repeat 21 --metric euclidean

A step is forward and backward in training mode on the same random vectors with the same options: codes learned as
moving averages, the same decay, commitment loss and straight-through gradient, no revival. Both take turns in one
process, so that whatever else the machine does falls on both; times are medians, the ratio is the median of the turns'
ratios. On a busy machine look at the ratios alone, and with --cpu-time, which counts the process' own time (of all its
threads together).

Memory is the peak of a step beyond what lies there before it (vectors, codebook, averages): on the CPU the running sum
of every allocation and release that torch's own allocator reports to `torch.profiler`, on CUDA
`torch.cuda.max_memory_allocated`. Scratch space inside the matrix product's library is seen in neither.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from vector_quantize_pytorch import VectorQuantize

from vqgen.tokenizer.quantizers.codebook import Codebook
from vqgen.tokenizer.quantizers.options import VQConfig

DECAY, COMMITMENT = 0.99, 0.25
Step = Callable[[], None]


def step_of(module: nn.Module, vectors: Tensor, result: Callable[..., tuple[Tensor, Tensor]]) -> Step:
    """One training step of `module`; `result` takes quantized vectors and loss from what it returns."""
    flat, upstream = vectors.clone().requires_grad_(), torch.randn_like(vectors)

    def step() -> None:
        flat.grad = None
        quantized, loss = result(module(flat))
        torch.autograd.backward([quantized, loss], [upstream, torch.ones_like(loss)])

    return step


def seconds(step: Step, device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_mib(step: Step, device: torch.device) -> float:
    """Most memory that a step holds at once beyond what lay there before, in MiB."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, held)
    return peak / 2**20


@dataclass
class Measured:
    """Medians of a step of ours and of the library's, and of their ratios."""

    milliseconds: float
    their_milliseconds: float
    ratio: float
    mib: float
    their_mib: float


def compared(
    size: int,
    dim: int,
    count: int,
    cosine: bool,
    device: torch.device,
    repeat: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Let both take steps on `count` random vectors in turns."""
    torch.manual_seed(0)
    vectors = torch.randn(count, dim, device=device)
    config = VQConfig(codebook_size=size, codebook_decay=DECAY, commitment_weight=COMMITMENT, revive_after=0)
    library = VectorQuantize(
        dim, size, decay=DECAY, commitment_weight=COMMITMENT, use_cosine_sim=cosine, rotation_trick=False
    )
    ours = step_of(Codebook(config, dim, cosine).to(device), vectors, lambda out: (out.vectors, out.loss))
    theirs = step_of(library.to(device), vectors[None], lambda out: (out[0], out[2]))
    for step in (ours, theirs):
        step()  # warms up, and libraries allocate their workspaces
    memory = peak_mib(ours, device), peak_mib(theirs, device)
    turns = [(seconds(ours, device, clock), seconds(theirs, device, clock)) for _ in range(repeat)]
    times = [1000 * statistics.median(column) for column in zip(*turns)]
    return Measured(times[0], times[1], statistics.median(b / a for a, b in turns), *memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 16384, 65536], help="codes K")
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 256], help="dimensions d of a code")
    parser.add_argument("--vectors", type=int, default=4096)
    parser.add_argument("--metric", choices=["cosine", "euclidean"], default="cosine")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="measure the process' CPU time")
    parser.add_argument("--threads", type=int, help="CPU threads; none: torch's choice")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    device, cosine = torch.device(options.device), options.metric == "cosine"
    print(f"{options.vectors} vectors, {options.metric}, {device}, {torch.get_num_threads()} threads, ours and theirs")
    print("     K    d        ms      ms  ratio       MiB     MiB  ratio")
    for size in options.sizes:
        for dim in options.dims:
            found = compared(size, dim, options.vectors, cosine, device, options.repeat, clock)
            print(
                f"{size:6d} {dim:4d} {found.milliseconds:9.1f} {found.their_milliseconds:7.0f} {found.ratio:5.1f}x"
                f" {found.mib:9.1f} {found.their_mib:7.0f} {found.their_mib / found.mib:5.1f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
