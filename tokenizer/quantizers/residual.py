"""Residual quantization (Lee et al. 2022): each further code quantizes what the codes before it left."""

import torch
from torch import Tensor

from .base import Chosen
from .codebook import Codebook, estimated, vq_loss
from .options import QuantizerConfig
from .search import histogram
from .vq import MultiCodebookQuantizer


class ResidualQuantizer(MultiCodebookQuantizer):
    """`depth` codes a position, whose sum approximates the vector.

    `k_d = argmin_k |r_{d-1} - e_k|`, `r_d = r_{d-1} - e_{k_d}`, `r_0 = z` (their section 3.1.2); the partial sums are
    `z_d = e_{k_1} + ... + e_{k_d}`, and `z_q = z_depth`. The commitment loss is `commitment_weight` times the *sum*
    over all depths of `|z - sg(z_d)|^2` (mean over elements), as in their section 3.1.3; their program takes the mean.
    A gradient codebook adds the sum of `|sg(r_{d-1}) - e_{k_d}|^2`. Distances are Euclidean.

    The gradient passes all depths at once, from z_q to z: the rotation is that of z to z_q. Each depth has a codebook
    of its own, or all share one, which then learns from the vectors of all depths together.

    Args:
        dim: channels D of the latents.
    """

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        own = 1 if config.shared_codebook else config.depth
        books = [Codebook(config, config.code_dim, unit=False) for _ in range(own)]
        super().__init__(dim, config.code_dim, config, books)

    def quantize(self, flat: Tensor) -> Chosen:
        rest, total, loss = flat, torch.zeros_like(flat), flat.new_zeros(())
        rests: list[Tensor] = []
        codes: list[Tensor] = []
        vectors: list[Tensor] = []
        for book in self.books:
            rests.append(rest.detach())
            codes.append(book.choose(rests[-1]))
            chosen = book.lookup(codes[-1])
            vectors.append(chosen.detach())
            # rest - chosen is z - z_d: its gradient reaches z, and in a gradient codebook this depth's code.
            loss = loss + vq_loss(rest, chosen, self.config.commitment_weight, book.learned)
            rest, total = rest - vectors[-1], total + vectors[-1]
        counts = torch.stack([histogram(part, self.codebook_size) for part in codes])
        z_q = estimated(flat, total, self.config)
        if self.training and self.config.shared_codebook:
            self.books[0].learn(torch.cat(rests), torch.cat(codes), torch.cat(vectors))
        elif self.training:
            for book, *batch in zip(self.books, rests, codes, vectors, strict=True):
                book.learn(*batch)
        return Chosen(z_q, torch.stack(codes, dim=1), loss, counts)

    def choose(self, flat: Tensor) -> Tensor:
        codes: list[Tensor] = []
        for book in self.books:
            codes.append(book.choose(flat))
            flat = flat - book.lookup(codes[-1])
        return torch.stack(codes, dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        total = torch.zeros((), device=codes.device)
        for book, part in self.apart(codes):
            total = total + book.lookup(part)
        return total

    def start_from(self, flat: Tensor) -> None:
        """k-means depth by depth over what the depths before left; a shared codebook then over all of that at once."""
        rests = [flat]
        shared = self.config.shared_codebook
        for depth, book in enumerate(self.books):
            if depth == 0 or not shared:
                book.start_from(rests[-1])
            rests.append(rests[-1] - book.lookup(book.choose(rests[-1])))
        if shared:
            self.books[0].start_from(torch.cat(rests[:-1]))
