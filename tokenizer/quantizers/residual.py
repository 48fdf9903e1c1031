"""Residual quantization (Lee et al. 2022): each further code quantizes the residual of those before it."""

import torch
from torch import Tensor

from .base import QuantizedVectors
from .codebook import Codebook, vq_loss, with_gradient
from .multi_codebook import MultiCodebookQuantizer
from .options import ResidualConfig
from .search import histogram


class ResidualQuantizer(MultiCodebookQuantizer):
    """`depth` codes a position, whose sum approximates the vector.

    `k_d = argmin_k |r_{d-1} - e_k|`, `r_d = r_{d-1} - e_{k_d}`, `r_0 = z` (section 3.1.2); the partial sums are
    `z_d = e_{k_1} + ... + e_{k_d}`, and `z_q = z_depth`. The commitment loss is `commitment_weight` times the *sum*
    over all depths of `|z - sg(z_d)|^2` (mean over elements), as in section 3.1.3; the authors' code takes the mean. A
    gradient codebook adds the sum of `|sg(r_{d-1}) - e_{k_d}|^2`. Distances are Euclidean.

    The gradient passes from z_q to z once, not depth by depth: the rotation is that of z to z_q. Each depth has its own
    codebook, or all share one, which then learns from the residuals of all depths together.

    Args:
        dim: channels D of the latents.
    """

    def __init__(self, dim: int, config: ResidualConfig) -> None:
        count = 1 if config.shared_codebook else config.depth
        codebooks = [Codebook(config, config.code_dim, unit=False) for _ in range(count)]
        super().__init__(dim, config.code_dim, config, codebooks)
        self.config: ResidualConfig = config

    def quantize(self, flat: Tensor) -> QuantizedVectors:
        residual, total, loss = flat, torch.zeros_like(flat), flat.new_zeros(())
        residuals: list[Tensor] = []
        codes: list[Tensor] = []
        vectors: list[Tensor] = []
        for codebook in self.depth_codebooks:
            residuals.append(residual.detach())
            codes.append(codebook.choose(residuals[-1]))
            quantized = codebook.lookup(codes[-1])
            vectors.append(quantized.detach())
            # residual - quantized is z - z_d: its gradient reaches z and, in a gradient codebook, this depth's code.
            loss = loss + vq_loss(residual, quantized, self.config.commitment_weight, codebook.by_gradient)
            residual, total = residual - vectors[-1], total + vectors[-1]
        counts = torch.stack([histogram(part, self.codebook_size) for part in codes])
        z_q = with_gradient(flat, total, self.config.estimator)
        stats = {"code_distance": residual.detach().square().sum() / flat.detach().square().sum()}
        if self.training and self.config.shared_codebook:
            batch = torch.cat(residuals), torch.cat(codes), torch.cat(vectors)
            stats["codes_revived"] = self.depth_codebooks[0].update(*batch)
        elif self.training:
            batches = zip(self.depth_codebooks, residuals, codes, vectors, strict=True)
            stats["codes_revived"] = torch.stack([codebook.update(*batch) for codebook, *batch in batches]).sum()
        return QuantizedVectors(z_q, torch.stack(codes, dim=1), loss, counts, stats)

    def choose(self, flat: Tensor) -> Tensor:
        codes: list[Tensor] = []
        for codebook in self.depth_codebooks:
            codes.append(codebook.choose(flat))
            flat = flat - codebook.lookup(codes[-1])
        return torch.stack(codes, dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        total = torch.zeros((), device=codes.device)
        for codebook, part in self.split(codes):
            total = total + codebook.lookup(part)
        return total

    def initialize_from(self, flat: Tensor) -> None:
        """Run k-means depth by depth over residuals; for a shared codebook, then once over those of all depths."""
        residuals = [flat]
        shared = self.config.shared_codebook
        for depth, codebook in enumerate(self.depth_codebooks):
            if depth == 0 or not shared:
                codebook.initialize_from(residuals[-1])
            residuals.append(residuals[-1] - codebook.lookup(codebook.choose(residuals[-1])))
        if shared:
            self.depth_codebooks[0].initialize_from(torch.cat(residuals[:-1]))
