"""A step of cached decoding as CUDA graphs: its kernels are launched at once, not one by one from Python.

A small step takes the device less time than the host needs to launch its kernels. A graph replays kernels on the same
memory, so the step has static shapes: token, position and logits lie in buffers, and attention runs over a fixed part
of the cache, a bucket, with a mask in place of the part that is filled. `CachedTransformer.feed` is the oracle, and the
fallback where nothing can be captured.
"""

import warnings
from collections.abc import Callable
from functools import cache
from threading import get_ident
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgen.devices import growing_attention

if TYPE_CHECKING:
    from .cached_transformer import CachedTransformer

BUCKET = 64
"""Cache positions by which the buckets grow; a multiple of 8, to which masked attention aligns its memory."""
Replay = Callable[[], object]
Record = Callable[[Callable[[], None], torch.device], Replay]
"""Takes a step that reads and writes static memory of a device, and returns what repeats it."""


@cache
def _aside(device: torch.device, thread: int) -> torch.cuda.Stream:
    """The stream on which a thread captures graphs: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def cuda_graph(step: Callable[[], None], device: torch.device) -> Replay:
    """Capture a step as a CUDA graph. Raises `RuntimeError` where it cannot be captured."""
    with torch.cuda.device(device):
        before, aside, graph = torch.cuda.current_stream(), _aside(device, get_ident()), torch.cuda.CUDAGraph()
        try:
            aside.wait_stream(before)
            with torch.cuda.stream(aside):
                for _ in range(2):  # libraries allocate their workspaces in the first calls, which a capture forbids
                    step()
            before.wait_stream(aside)
            # Other threads, as the one that decodes the images before, may use the device meanwhile.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                step()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves the other one
    return graph.replay


class StaticSteps:
    """Single-token steps of one batch, captured as they are first needed, one for each bucket and range of ids.

    Args:
        decoder: whose weights are used.
        cache: keys and values of each block (2, rows, positions, heads, d), which the steps write.
        record: `cuda_graph`; a test repeats steps by calling them.
    """

    def __init__(self, decoder: "CachedTransformer", cache: list[Tensor], record: Record = cuda_graph) -> None:
        self.decoder, self.cache, self.record = decoder, cache, record
        (_, rows, self.positions, *_), device = cache[0].shape, cache[0].device
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._steps: dict[tuple[int, tuple[int, int]], tuple[Replay, Tensor]] = {}
        self.usable = True
        """Whether no capture has failed."""

    def feed(self, tokens: Tensor, position: int, ids: tuple[int, int]) -> Tensor | None:
        """Feed tokens (rows, 1) at a position; return the logits of a range of ids, float32 (rows, K), which the next
        call overwrites. None, with a warning the first time, where the step cannot be captured."""
        if not self.usable:
            return None
        self._tokens.copy_(tokens)
        self._position.fill_(position)
        last = min(-(-(position + 1) // BUCKET) * BUCKET, self.positions)
        if (last, ids) not in self._steps:
            try:
                self._steps[last, ids] = self._recorded(last, ids)
            except RuntimeError as error:
                self.usable, reason = False, " ".join(str(error).split())
                warnings.warn(f"drawing goes on without CUDA graphs, slower: {reason}", RuntimeWarning, stacklevel=2)
                return None
        replay, logits = self._steps[last, ids]
        replay()
        return logits

    def _recorded(self, last: int, ids: tuple[int, int]) -> tuple[Replay, Tensor]:
        """A step that attends to the first `last` positions of the cache, and its logits."""
        logits = torch.empty(len(self._tokens), ids[1] - ids[0], device=self._tokens.device)
        with growing_attention(logits.device):
            return self.record(lambda: self._step(last, ids, logits), logits.device), logits

    def _step(self, last: int, ids: tuple[int, int], logits: Tensor) -> None:
        """Compute what `CachedTransformer.feed` does for one token, with static shapes."""
        decoder, position, rows = self.decoder, self._position, len(self._tokens)
        x = F.embedding(self._tokens[:, 0], decoder._tokens)
        if decoder._positions is not None:
            x = x + decoder._positions.index_select(0, position)
        rotation = None
        if decoder._rotations is not None:
            rotation = tuple(table.index_select(0, position) for table in decoder._rotations)
        mask = x.new_zeros(last).masked_fill_(torch.arange(last, device=x.device) > position, -torch.inf)
        mask = mask.view(1, 1, 1, last).expand(rows, decoder.heads, 1, last)
        for block, both in zip(decoder._blocks, self.cache, strict=True):
            qkv = block.qkv(block.before_attention(x)).view(rows, 1, 3 * decoder.heads, -1)
            q, k, v = decoder._heads(block, qkv, rotation).chunk(3, 2)
            for cached, new in zip(both, (k, v)):
                cached.index_copy_(1, position, new)
            keys, values = (cached[:, :last].transpose(1, 2) for cached in both)
            seen = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask)
            x = decoder._rest(block, x, seen.transpose(1, 2))
        logits.copy_(decoder._head_of(ids)(decoder._last_norm(x)))
