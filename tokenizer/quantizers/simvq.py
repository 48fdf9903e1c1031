"""SimVQ (Zhu et al. 2024, "Addressing representation collapse with one linear layer"): all codes move together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Chosen, Quantizer
from .codebook import estimated, vq_loss
from .options import QuantizerConfig
from .search import histogram, nearest


class SimVQ(Quantizer):
    """The nearest code of a codebook `C W`, C (K, d) frozen as it was drawn, W (d, d) learned.

    `z_q = c_k W`, `k = argmin_j |z - c_j W|`. The loss is `|sg(z) - c_k W|^2 + commitment_weight * |z - sg(c_k W)|^2`,
    means over elements: that of VQ-VAE, whose gradient, where it reaches the codes in use, moves every code by way
    of W (their section 4). C is normal with variance 1 / d.

    Args:
        dim: channels D of the latents.
    """

    codes: Tensor

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.code_dim, config)
        self.register_buffer("codes", torch.randn(config.codebook_size, config.code_dim) * config.code_dim**-0.5)
        self.transform = nn.Linear(config.code_dim, config.code_dim, bias=False)

    def quantize(self, flat: Tensor) -> Chosen:
        codes = self.choose(flat.detach())
        chosen = self.lookup(codes)
        loss = vq_loss(flat, chosen, self.config.commitment_weight, learned=True)
        counts = histogram(codes, len(self.codes))
        return Chosen(estimated(flat, chosen, self.config), codes, loss, counts[None])

    @torch.no_grad()
    def choose(self, flat: Tensor) -> Tensor:
        return nearest(flat, self.transform(self.codes))

    def lookup(self, codes: Tensor) -> Tensor:
        return self.transform(F.embedding(codes, self.codes))
