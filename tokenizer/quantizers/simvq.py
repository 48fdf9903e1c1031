"""SimVQ (Zhu et al. 2024, "Addressing representation collapse with one linear layer"): one map moves all codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import QuantizedVectors, Quantizer
from .codebook import vq_loss, with_gradient
from .options import SimVQConfig
from .search import histogram, nearest


class SimVQ(Quantizer):
    """The nearest code of a codebook `C W`, with C (K, d) random and frozen and W (d, d) learned.

    `z_q = c_k W`, `k = argmin_j |z - c_j W|`. The loss is `|sg(z) - c_k W|^2 + commitment_weight * |z - sg(c_k W)|^2`,
    means over elements: that of VQ-VAE, whose gradient at the used codes moves all codes by W (section 4). C is normal
    with variance 1 / d.

    Args:
        dim: channels D of the latents.
    """

    codes: Tensor

    def __init__(self, dim: int, config: SimVQConfig) -> None:
        super().__init__(dim, config.code_dim, config)
        self.register_buffer("codes", torch.randn(config.codebook_size, config.code_dim) * config.code_dim**-0.5)
        self.config: SimVQConfig = config
        self.transform = nn.Linear(config.code_dim, config.code_dim, bias=False)

    def quantize(self, flat: Tensor) -> QuantizedVectors:
        codes = self.choose(flat.detach())
        quantized = self.lookup(codes)
        loss = vq_loss(flat, quantized, self.config.commitment_weight, by_gradient=True)
        counts = histogram(codes, len(self.codes))
        return QuantizedVectors(with_gradient(flat, quantized, self.config.estimator), codes, loss, counts[None])

    @torch.no_grad()
    def choose(self, flat: Tensor) -> Tensor:
        return nearest(flat, self.transform(self.codes))

    def lookup(self, codes: Tensor) -> Tensor:
        return self.transform(F.embedding(codes, self.codes))
