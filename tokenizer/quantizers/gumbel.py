"""Gumbel-softmax quantization (Jang et al. 2017; Ramesh et al. 2021, section 2.1): the encoder gives a logit a code."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Chosen, Quantizer
from .codebook import entropy_of_mean, histogram
from .options import QuantizerConfig


class GumbelQuantizer(Quantizer):
    """A mixture of codes in training, drawn so that it sharpens into a sample of one; the most likely code otherwise.

    In training `y = softmax((logits + g) / tau)` with Gumbel noise g (Jang et al., eq. 2), and the vector is `y E`
    with the table E of K codes, so the table learns by gradient. tau falls from `gumbel_temperature` to
    `gumbel_temperature_end` on a cosine over the first `gumbel_anneal` of the run (Ramesh et al., appendix A.2). The
    loss is `gumbel_kl_weight * KL(q || uniform)`, `sum_k q_k log(q_k K)` with `q = softmax(logits)`, mean over
    positions, in nats: the KL term of their eq. 1. It holds each choice back, and a code that no choice leans to feels
    nothing of it; against a collapse there is `entropy_weight * (E[H(q)] - entropy_diversity * H(E[q]))`, the second
    term as in Baevski et al. 2020, "wav2vec 2.0", eq. 4. In evaluation the vector is that of the argmax of the logits,
    and so are the codes in both modes.

    Logits and mixture are N x K numbers each by nature: 4096 vectors and K = 8192 take 128 MiB a tensor.

    Args:
        dim: channels D of the latents.
    """

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.code_dim, config, width_in=config.codebook_size)
        # Logits that the noise does not drown from the start, as the program of wav2vec 2.0 has them: with a layer's
        # usual weights, some fifteen times smaller, the encoder learns nothing until the temperature is low.
        nn.init.normal_(self.project_in.weight)
        nn.init.zeros_(cast(Tensor, self.project_in.bias))
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows are codes."""
        return [self.codebook]

    @property
    def temperature(self) -> float:
        """tau at the present share of the run."""
        config = self.config
        if self.progress >= config.gumbel_anneal:
            return config.gumbel_temperature_end
        above = (1 + math.cos(math.pi * self.progress / config.gumbel_anneal)) / 2
        return config.gumbel_temperature_end + above * (config.gumbel_temperature - config.gumbel_temperature_end)

    def quantize(self, flat: Tensor) -> Chosen:
        codes = self.choose(flat)
        temperature = self.temperature
        vectors = F.gumbel_softmax(flat, temperature, dim=1) @ self.codebook if self.training else self.lookup(codes)
        log_q = flat.log_softmax(dim=1)
        q = log_q.exp()
        each = -(q * log_q).sum(dim=1).mean()
        kl = math.log(self.codebook_size) - each
        loss = self.config.gumbel_kl_weight * kl
        stats = {"gumbel_temperature": flat.new_tensor(temperature), "gumbel_kl": kl.detach()}
        if self.config.entropy_weight:
            mean = entropy_of_mean(q.mean(dim=0), self.training)
            loss = loss + self.config.entropy_weight * (each - self.config.entropy_diversity * mean)
            stats |= {"entropy_each": each.detach(), "entropy_mean": mean.detach()}
        return Chosen(vectors, codes, loss, histogram(codes, self.codebook_size)[None], stats)

    def choose(self, flat: Tensor) -> Tensor:
        return flat.argmax(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)

    def start(self, z: Tensor) -> None:
        """Nothing to place: logits of all processes, N x K, are not gathered for it."""
