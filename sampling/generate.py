"""Cached decoding on token ids alone: a transformers causal LM, plain numbers, no images.

`generate` is what others call. Under it lie `prefill` (the prompt, in one pass), `decode_one` (one token) and
`decode_n` (the loop), on a `Decoder`, which holds the model's static key-value cache. Nothing in the loop waits for
the device.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from vqgen.errors import UserError

from .logits import SamplingSettings, choose


def image_uniforms(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """The random numbers of images: float64 (len(indices), length) in [0, 1).

    Row i is a pure function of (seed, indices[i]): each pair keys a counter-based generator of its own (Philox,
    Salmon et al. 2011), so neither the batch nor the process nor anything drawn before matters. Both lie in 0..2^64-1.
    """
    rows = [np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(length) for index in indices]
    if not rows:
        return torch.empty(0, length, dtype=torch.float64)
    return torch.from_numpy((np.stack(rows) >> np.uint64(11)) * 2.0**-53)


class Decoder:
    """A causal LM with a static key-value cache, which is allocated once and used again by the next batch.

    Args:
        model: in evaluation mode; its attention must take an additive mask (eager and sdpa do).
        positions: tokens that a sequence feeds to the model, which is the size of the cache.
    """

    def __init__(self, model: PreTrainedModel, positions: int) -> None:
        self.model, self.positions = model, positions
        self._rows, self._fed = 0, 0
        self._cache: StaticCache | None = None
        # Made once: transformers would build a mask (rows, 1, 1, positions) anew for every token.
        blocked = torch.full((positions, positions), -torch.inf, dtype=model.dtype, device=model.device)
        self._mask = blocked.triu(1)[None, None]
        self._ids = torch.arange(positions, device=model.device)[None]

    def start(self, rows: int) -> None:
        """Begin a batch of `rows` sequences: forget the former one."""
        if self._cache is None or rows != self._rows:
            self._cache = StaticCache(config=self.model.config, max_cache_len=self.positions)
        else:
            self._cache.reset()
        self._rows, self._fed = rows, 0

    def feed(self, tokens: Tensor) -> Tensor:
        """Feed the next tokens (rows, T); return the logits after the last one, float32 (rows, V)."""
        first, last = self._fed, self._fed + tokens.shape[1]
        if last > self.positions:
            raise ValueError(f"{last} tokens fed to a cache of {self.positions}")
        self._fed = last
        output = self.model(
            input_ids=tokens,
            position_ids=self._ids[:, first:last],
            attention_mask=self._mask[:, :, first:last],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def prefill(decoder: Decoder, prompt: Tensor) -> Tensor:
    """Start a batch with its prompts (rows, P) and return the logits for the first token to draw, (rows, V)."""
    decoder.start(len(prompt))
    return decoder.feed(prompt)


def decode_one(
    logits: Tensor, allowed: tuple[int, int], uniforms: Tensor, settings: SamplingSettings, guided: bool
) -> Tensor:
    """Draw one token an image from the ids in `allowed`, first and one past the last.

    Args:
        logits: (B, V), or where `guided` (2B, V): B rows with the condition, then the same without it.
        uniforms: (B,).

    Returns:
        Token ids (B,).
    """
    start, end = allowed
    legal = logits[:, start:end]
    if not guided:
        return choose(legal, uniforms, settings) + start
    conditional, unconditional = legal.chunk(2)
    return choose(conditional, uniforms, settings, unconditional) + start


def decode_n(
    decoder: Decoder,
    logits: Tensor,
    allowed: Sequence[tuple[int, int]],
    uniforms: Tensor,
    settings: SamplingSettings,
    guided: bool = False,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Draw len(allowed) tokens an image, feeding each back; `logits` is what `prefill` returned. Returns (B, n)."""
    drawn: list[Tensor] = []
    finite = torch.ones((), dtype=torch.bool, device=logits.device)
    for position, legal in enumerate(allowed):
        if position:
            tokens = drawn[-1].repeat(2) if guided else drawn[-1]
            logits = decoder.feed(tokens[:, None])
        finite &= logits.isfinite().all()
        drawn.append(decode_one(logits, legal, uniforms[:, position], settings, guided))
        if on_token is not None:
            on_token(drawn[-1])
    if not finite:  # asked once, after the loop: asking waits for the device
        raise UserError("the model's logits are not finite; its weights are damaged, or try --precision fp32")
    return torch.stack(drawn, 1)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: Tensor,
    allowed: Sequence[tuple[int, int]],
    uniforms: Tensor,
    settings: SamplingSettings,
    unconditional: Tensor | None = None,
    rows: int = 1,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue prompts by len(allowed) tokens.

    Args:
        decoder: with a cache of at least P + len(allowed) - 1 positions (the last token is never fed).
        prompt: token ids (B, P), the condition and any tokens that are given.
        allowed: for each token to draw the range of ids that may stand there: first, one past the last.
        uniforms: (B, len(allowed)) in [0, 1), see `image_uniforms`.
        unconditional: (B, P) the prompt without its condition; used, at twice the rows, where the guidance scale
            is not 1.
        rows: pad the batch to a multiple of this many. Matrix products may round otherwise for another number of
            rows; on shapes where they do, padding keeps an image independent of its batch.
        on_token: called with each column of tokens (B,) as it is drawn, on the device.

    Returns:
        Token ids int64 (B, len(allowed)), on the model's device.

    Raises:
        UserError: the logits are not finite.
        ValueError: the model is in training mode.
    """
    if decoder.model.training:
        raise ValueError("the model is in training mode, where dropout disturbs decoding; call eval() first")
    count = len(prompt)
    if not count or not allowed:
        return torch.empty(count, len(allowed), dtype=torch.long, device=decoder.model.device)
    fill = torch.arange(-(-count // rows) * rows).clamp(max=count - 1)  # padding repeats the last row

    def padded(values: Tensor) -> Tensor:
        return values.cpu()[fill].to(decoder.model.device)

    inputs, guided = padded(prompt), False
    if unconditional is not None and settings.guidance_scale != 1:
        inputs, guided = torch.cat([inputs, padded(unconditional)]), True
    report = None if on_token is None else lambda tokens: on_token(tokens[:count])
    logits = prefill(decoder, inputs)
    return decode_n(decoder, logits, allowed, padded(uniforms), settings, guided, report)[:count]
