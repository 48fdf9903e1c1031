"""Cached decoding on token ids alone: a causal LM, plain numbers, no images.

`generate` is the entry point. It calls `prefill` (the prompt, in one pass) and `decode_n` (the loop over `decode_one`)
on a `CachedTransformer`, which holds the model's static key-value cache. Nothing in the loop waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqgen.errors import UserError

from .cached_transformer import CachedTransformer
from .logits import choose, guide
from .settings import SamplingSettings


def image_uniforms(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """The random numbers of images: float64 (len(indices), length) in [0, 1).

    Row i is a pure function of (seed, indices[i]): each pair keys a counter-based generator of its own (Philox,
    Salmon et al. 2011), so neither the batch nor the process nor anything drawn before matters. Both lie in 0..2^64-1.
    """
    rows = [np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(length) for index in indices]
    if not rows:
        return torch.empty(0, length, dtype=torch.float64)
    return torch.from_numpy((np.stack(rows) >> np.uint64(11)) * 2.0**-53)


def prefill(decoder: CachedTransformer, prompt: Tensor, allowed: tuple[int, int]) -> Tensor:
    """Start a batch with its prompts (rows, P); return the logits of the ids that may come first, (rows, K)."""
    decoder.start(len(prompt))
    return decoder.feed(prompt, allowed)


@dataclass(frozen=True)
class Drawn:
    """Tokens int64 (B, n), and what they cost the model itself.

    `nats` float64 (B,) is -log p of the tokens given all before them and the condition: at temperature 1, without
    guidance or filters, among the ids that may stand there.
    """

    tokens: Tensor
    nats: Tensor


def decode_one(
    logits: Tensor, start: int, uniforms: Tensor, settings: SamplingSettings, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token an image.

    Args:
        logits: of the ids from `start` on that may stand here, (B, K), or where there is a `scale` (2B, K): B rows
            with the condition, then the same without it.
        uniforms: (B,).
        scale: of the guidance; None = none.

    Returns:
        Token ids (B,), and -log p of each, float32 (B,).
    """
    conditional, wanted = logits, logits
    if scale is not None:
        conditional, unconditional = logits.chunk(2)
        wanted = guide(conditional, unconditional, scale)
    chosen = choose(wanted, uniforms, settings)
    nats = conditional.logsumexp(-1) - conditional.gather(1, chosen[:, None])[:, 0]
    return chosen + start, nats


def decode_n(
    decoder: CachedTransformer,
    logits: Tensor,
    allowed: Sequence[tuple[int, int]],
    uniforms: Tensor,
    settings: SamplingSettings,
    guided: bool = False,
    before: int = 0,
    on_token: Callable[[Tensor], object] | None = None,
) -> Drawn:
    """Draw len(allowed) tokens an image, feeding each back.

    Args:
        logits: what `prefill` returned.
        before: codes of the image that were given, for the guidance's schedule.
    """
    drawn: list[Tensor] = []
    total = torch.zeros(len(uniforms), dtype=torch.float64, device=logits.device)
    for position, legal in enumerate(allowed):
        if position:
            tokens = drawn[-1].repeat(2) if guided else drawn[-1]
            logits = decoder.feed(tokens[:, None], legal)
        scale = settings.guidance_at(before + position, before + len(allowed)) if guided else None
        tokens, nats = decode_one(logits, legal[0], uniforms[:, position], settings, scale)
        total += nats
        drawn.append(tokens)
        if on_token is not None:
            on_token(tokens)
    if not total.isfinite().all():  # asked once, after the loop: asking waits for the device
        raise UserError("the model's logits are not finite; its weights are damaged, or try --precision fp32")
    return Drawn(torch.stack(drawn, 1), total)


@torch.inference_mode()
def generate(
    decoder: CachedTransformer,
    prompt: Tensor,
    allowed: Sequence[tuple[int, int]],
    uniforms: Tensor,
    settings: SamplingSettings,
    unconditional: Tensor | None = None,
    rows: int = 1,
    on_token: Callable[[Tensor], object] | None = None,
) -> Drawn:
    """Continue prompts by len(allowed) tokens.

    Args:
        decoder: with a cache of at least P + len(allowed) - 1 positions (the last token is never fed).
        prompt: token ids (B, P), the condition and any codes that are given.
        allowed: for each token to draw the range of ids that may stand there: first, one past the last.
        uniforms: (B, len(allowed)) in [0, 1), see `image_uniforms`.
        unconditional: (B, P) the prompt without its condition; used, at twice the rows, where `settings` are guided.
        rows: pad the batch to a multiple of this many. Matrix products may round otherwise for another number of
            rows; on shapes where they do, padding keeps an image independent of its batch.
        on_token: called with each column of tokens (B,) as it is drawn, on the device.

    Returns:
        Tokens (B, len(allowed)) and their nats, on the model's device.

    Raises:
        UserError: the logits are not finite.
        ValueError: the model is in training mode.
    """
    if decoder.model.training:
        raise ValueError("the model is in training mode, where dropout disturbs decoding; call eval() first")
    count, device = len(prompt), decoder.model.device
    if not count or not allowed:
        nothing = torch.empty(count, len(allowed), dtype=torch.long, device=device)
        return Drawn(nothing, torch.zeros(count, dtype=torch.float64, device=device))
    fill = torch.arange(-(-count // rows) * rows).clamp(max=count - 1)  # padding repeats the last row

    def padded(values: Tensor) -> Tensor:
        return values.cpu()[fill].to(device)

    inputs, guided = padded(prompt), False
    if unconditional is not None and settings.guided:
        inputs, guided = torch.cat([inputs, padded(unconditional)]), True
    report = None if on_token is None else lambda tokens: on_token(tokens[:count])
    logits = prefill(decoder, inputs, allowed[0])
    before = prompt.shape[1] - 1
    drawn = decode_n(decoder, logits, allowed, padded(uniforms), settings, guided, before, report)
    return Drawn(drawn.tokens[:count], drawn.nats[:count])
