"""Gumbel-softmax quantization (Jang et al. 2017; Ramesh et al. 2021, section 2.1): one logit for each code."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import QuantizedVectors, Quantizer
from .codebook import entropy_of_mean
from .options import GumbelConfig
from .search import histogram


class GumbelQuantizer(Quantizer):
    """A random mixture of codes in training, which becomes a sample of one code at low temperature; argmax otherwise.

    In training the vector is `y E` with `y = softmax((logits + g) / tau)`, Gumbel noise g (Jang et al., eq. 2) and the
    table E of K codes, which learns by gradient. tau falls from `gumbel_temperature` to `gumbel_temperature_end` on a
    cosine over the first `gumbel_anneal` of the run (Ramesh et al., appendix A.2). The loss is
    `gumbel_kl_weight * KL(q || uniform)`, `sum_k q_k log(q_k K)` with `q = softmax(logits)`, mean over positions, in
    nats: the KL term of their eq. 1. Against a collapse, from which the KL term does not recover, there is
    `entropy_weight * (E[H(q)] - entropy_diversity * H(E[q]))`, the second term as in Baevski et al. 2020, "wav2vec
    2.0", eq. 4. Codes are the argmax of the logits in both modes; in evaluation the vectors are those of the codes.

    Logits and mixture have N x K elements each: 4096 vectors and K = 8192 take 128 MiB a tensor.

    Args:
        dim: channels D of the latents.
    """

    def __init__(self, dim: int, config: GumbelConfig) -> None:
        super().__init__(dim, config.code_dim, config, width_in=config.codebook_size)
        # Logits larger than the noise, as in the code of wav2vec 2.0: with the default initialization, 15 times
        # smaller, the encoder learns nothing until the temperature is low.
        nn.init.normal_(self.project_in.weight)
        nn.init.zeros_(cast(Tensor, self.project_in.bias))
        self.config: GumbelConfig = config
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))

    def codebook_parameters(self) -> list[nn.Parameter]:
        return [self.codebook]

    @property
    def temperature(self) -> float:
        """tau at the present step."""
        config = self.config
        if self.training_progress >= config.gumbel_anneal:
            return config.gumbel_temperature_end
        above = (1 + math.cos(math.pi * self.training_progress / config.gumbel_anneal)) / 2
        return config.gumbel_temperature_end + above * (config.gumbel_temperature - config.gumbel_temperature_end)

    def quantize(self, flat: Tensor) -> QuantizedVectors:
        codes = self.choose(flat)
        temperature = self.temperature
        vectors = F.gumbel_softmax(flat, temperature, dim=1) @ self.codebook if self.training else self.lookup(codes)
        log_q = flat.log_softmax(dim=1)
        q = log_q.exp()
        each = -(q * log_q).sum(dim=1).mean()
        kl = math.log(self.codebook_size) - each
        loss = self.config.gumbel_kl_weight * kl
        stats = {"gumbel_temperature": flat.new_full((), temperature), "gumbel_kl": kl.detach()}
        if self.config.entropy_weight:
            mean = entropy_of_mean(q.mean(dim=0), self.training)
            loss = loss + self.config.entropy_weight * (each - self.config.entropy_diversity * mean)
            stats |= {"entropy_each": each.detach(), "entropy_mean": mean.detach()}
        return QuantizedVectors(vectors, codes, loss, histogram(codes, self.codebook_size)[None], stats)

    def choose(self, flat: Tensor) -> Tensor:
        return flat.argmax(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)
