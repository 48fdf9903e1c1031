"""Cached decoding on token ids alone: a causal LM and tensors of ids, no images.

`generate` is the entry point. It calls `prefill` (the prompt, in one pass) and `decode_n` (the loop over `decode_one`)
on a `CachedTransformer`, which holds the model's static key-value cache. Nothing in the loop waits for the device.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from threading import Event, Lock

import numpy as np
import torch
from torch import Tensor

from vqgen.errors import UserError
from vqgen.sampling.settings import SamplingSettings

from .cached_transformer import CachedTransformer
from .linear import ROWS
from .logits import choose, guide
from .threads import on_threads

Allowed = Sequence[tuple[int, int]]
"""For each code position of an image the range of ids that may stand there: first, one past the last."""


def image_uniforms(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """Random numbers of images: float64 (len(indices), length) in [0, 1).

    Row i is a pure function of (seed, indices[i]): each pair keys a counter-based generator of its own (Philox,
    Salmon et al. 2011), so it depends on no batch, no process and no earlier draw. Both lie in 0..2^64-1.
    """
    numbers = np.empty((len(indices), length), np.uint64)
    for row, index in zip(numbers, indices, strict=True):
        row[:] = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(length)
    return torch.from_numpy((numbers >> np.uint64(11)) * 2.0**-53)


def prefill(decoder: CachedTransformer, prompt: Tensor, allowed: tuple[int, int]) -> Tensor:
    """Start a batch with its prompts (rows, P); return the logits of the ids allowed next, (rows, K)."""
    decoder.start(len(prompt))
    return decoder.feed(prompt, allowed)


@dataclass(frozen=True)
class Contrast:
    """What the images of a batch are guided away from."""

    prefix: Tensor
    """Token ids (B, P): the prefix of each image, or that of the contrast before, with fewer conditions."""
    scale: float
    """Guidance scale of what the richer prefix has over this one, see `guide`; it follows the settings' schedule."""


@dataclass(frozen=True)
class Drawn:
    """Code tokens int64 (B, length) of images, known ones included, and the NLL of those that were drawn.

    `nats` float64 (B,) is the NLL given the prefix and all earlier tokens: at temperature 1, without guidance or
    filters, among the allowed ids.
    """

    tokens: Tensor
    nats: Tensor


def decode_one(
    logits: Tensor, start: int, uniforms: Tensor, settings: SamplingSettings, scales: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Draw one token an image: token ids (B,), and the NLL of each, float32 (B,); not finite where its logits are not.

    Args:
        logits: of the allowed ids, which begin at `start`: ((1 + len(scales)) * B, K), B rows with all conditions,
            then the same with those of each contrast.
        uniforms: (B,).
        scales: of the contrasts, see `guide`.
    """
    rows = logits.chunk(1 + len(scales))
    guided = guide(rows, scales)
    chosen = choose(guided, uniforms, settings)
    nats = rows[0].logsumexp(-1) - rows[0].gather(1, chosen[:, None])[:, 0]
    if scales:  # a contrast that is not finite shows in the NLL, which is checked once after the loop
        nats = nats + 0 * guided.amax(-1)
    return chosen + start, nats


def decode_n(
    decoder: CachedTransformer,
    logits: Tensor,
    allowed: Allowed,
    uniforms: Tensor,
    settings: SamplingSettings,
    scales: Sequence[float] = (),
    known: Tensor | None = None,
    span: range | None = None,
    on_token: Callable[[Tensor], object] | None = None,
) -> Drawn:
    """Draw the tokens of code positions, feeding each back.

    Args:
        logits: what `prefill` returned.
        uniforms: (B, len(allowed)).
        scales: of the contrasts, whose rows follow those of the images.
        known: see `generate`.
        span: the positions to draw, by default all; every other token is known.
    """
    span = range(len(allowed)) if span is None else span
    drawn = [] if known is None else list(known[:, : span.start].unbind(1))
    total = torch.zeros(len(uniforms), dtype=torch.float64, device=logits.device)
    for position in span:
        start, end = allowed[position]
        if position > span.start:
            logits = decoder.feed(drawn[-1].repeat(1 + len(scales))[:, None], (start, end))
        now = [settings.guidance_at(scale, position, len(allowed)) for scale in scales]
        tokens, nats = decode_one(logits, start, uniforms[:, position], settings, now)
        if known is not None:
            given = known[:, position]
            tokens, nats = torch.where(given < 0, tokens, given), torch.where(given < 0, nats, 0)
        total += nats
        drawn.append(tokens)
        if on_token is not None:
            on_token(tokens)
    if not total.isfinite().all():  # once, after the loop: reading a value waits for the device
        raise UserError("the model's logits are not finite; its weights are damaged, or try --precision fp32")
    rest = [] if known is None else list(known[:, span.stop :].unbind(1))
    return Drawn(torch.stack([*drawn, *rest], 1), total)


@torch.inference_mode()
def _generate_block(
    decoder: CachedTransformer,
    prompts: list[Tensor],
    allowed: Allowed,
    uniforms: Tensor,
    settings: SamplingSettings,
    scales: Sequence[float],
    known: Tensor | None,
    span: range,
    step: int,
    on_token: Callable[[Tensor], object] | None,
) -> Drawn:
    """Draw the tokens of images in one batch, padded to a multiple of `step`; see `generate`."""
    count, device = len(uniforms), decoder.model.device
    fill = torch.arange(-(-count // step) * step).clamp(max=count - 1)  # padding repeats the last row

    def padded(values: Tensor) -> Tensor:
        return values.cpu()[fill].to(device)

    given = None if known is None else padded(known)
    prompts = [padded(prompt) for prompt in prompts]
    if given is not None:
        prompts = [torch.cat([prompt, given[:, : span.start]], 1) for prompt in prompts]
    report = None if on_token is None else lambda tokens: on_token(tokens[:count])
    logits = prefill(decoder, torch.cat(prompts), allowed[span.start])
    drawn = decode_n(decoder, logits, allowed, padded(uniforms), settings, scales, given, span, report)
    return Drawn(drawn.tokens[:count], drawn.nats[:count])


def generate(
    decoder: CachedTransformer,
    prefix: Tensor,
    allowed: Allowed,
    uniforms: Tensor,
    settings: SamplingSettings,
    contrasts: Sequence[Contrast] = (),
    known: Tensor | None = None,
    span: range | None = None,
    rows: int = 1,
    on_token: Callable[[Tensor], object] | None = None,
) -> Drawn:
    """Draw the code tokens of images, on the model's device.

    On a CPU the images are divided among threads, each of which computes alone, in numbers at which the bits of a row
    do not depend on the others (`CachedTransformer.step`). So an image does not depend on which others are drawn with
    it, nor on the number of threads.

    Args:
        decoder: with a cache of at least P + len(allowed) - 1 positions (the last token is never fed).
        prefix: token ids (B, P), see `prior/conditioning.py`.
        allowed: one range for each code position.
        uniforms: (B, len(allowed)) in [0, 1), see `image_uniforms`.
        contrasts: of the guidance, from more to fewer conditions; each computes B rows more.
        known: (B, len(allowed)) code tokens that are given, -1 where one is to be drawn.
        span: the positions to draw, by default all. The codes of all others are known: those before it go into the
            model in one pass with the prefix, those after it not at all. It is that of all images of a series
            (`Known.span`), so that an image is computed alike in every batch.
        rows: on other devices, pad the batch to a multiple of this many: matrix products may round differently for
            another number of rows.
        on_token: called with the tokens (b,) of each position of `span`, on the device, by one thread at a
            time; on a CPU b is the part of a thread.

    Raises `UserError` where the logits are not finite, `ValueError` where the model is in training mode.
    """
    if decoder.model.training:
        raise ValueError("the model is in training mode, where dropout disturbs decoding; call eval() first")
    count, device = len(prefix), decoder.model.device
    span = range(len(allowed)) if span is None else span
    if not count or not span:
        tokens = torch.empty(count, len(allowed), dtype=torch.long) if known is None else known
        return Drawn(tokens.to(device), torch.zeros(count, dtype=torch.float64, device=device))
    prompts, scales = [prefix, *(each.prefix for each in contrasts)], [each.scale for each in contrasts]
    if device.type != "cpu":
        return _generate_block(decoder, prompts, allowed, uniforms, settings, scales, known, span, rows, on_token)
    step = decoder.step(dict.fromkeys(allowed))
    share = -(-count // torch.get_num_threads())
    share = min(-(-share // step) * step, ROWS)
    one_at_a_time, stopped = Lock(), Event()

    def report(tokens: Tensor) -> None:
        if stopped.is_set():
            raise CancelledError
        if on_token is not None:
            with one_at_a_time:
                on_token(tokens)

    def block(first: int) -> Drawn:
        part = slice(first, first + share)
        given = None if known is None else known[part]
        own = [prompt[part] for prompt in prompts]
        return _generate_block(decoder, own, allowed, uniforms[part], settings, scales, given, span, step, report)

    try:
        drawn = on_threads(block, range(0, count, share))
    except BaseException:
        stopped.set()  # an error or an interruption in one thread ends the others
        raise
    return Drawn(torch.cat([part.tokens for part in drawn]), torch.cat([part.nats for part in drawn]))
