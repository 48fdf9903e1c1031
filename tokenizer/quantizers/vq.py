"""Vector quantization (van den Oord et al. 2017): each latent vector becomes its nearest code."""

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Chosen, Quantizer
from .codebook import Codebook
from .options import QuantizerConfig


class VectorQuantizer(Quantizer):
    """The nearest code of one codebook, after a linear map to the few dimensions of a code (Yu et al. 2022, 3.2).

    `z_q = e_k`, `k = argmin_j |z - e_j|` (van den Oord et al., eq. 1 and 2). The loss is that of `vq_loss`, their
    eq. 3, plus `entropy_weight * (E[H(p(z))] - entropy_diversity * H(E[p(z)]))` (Yu et al. 2023, eq. 5; `entropies`).

    Args:
        dim: channels D of the latents.
    """

    starts = True

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.code_dim, config)
        self.codebook = Codebook(config, config.code_dim, config.l2_normalize)

    @property
    def training_state(self) -> set[str]:
        return {f"codebook.{name}" for name in self.codebook.training_state}

    def quantize(self, flat: Tensor) -> Chosen:
        return self.codebook(flat)

    def choose(self, flat: Tensor) -> Tensor:
        return self.codebook.choose(flat)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook.lookup(codes)

    def start_from(self, flat: Tensor) -> None:
        self.codebook.start_from(flat)

    def reset_training_state(self) -> None:
        self.codebook.reset_training_state()


class MultiCodebookQuantizer(Quantizer):
    """What quantizers of `depth` codes a position share.

    Args:
        dim: channels D of the latents.
        width: dimension of their vectors.
        books: one for each code, or one for all.
    """

    starts = True

    def __init__(self, dim: int, width: int, config: QuantizerConfig, books: Sequence[Codebook]) -> None:
        super().__init__(dim, width, config)
        self.depth = config.depth
        self.codebooks = nn.ModuleList(books)

    @property
    def books(self) -> list[Codebook]:
        """The codebook of each code; the same one `depth` times where they share it."""
        books = [book for book in self.codebooks if isinstance(book, Codebook)]
        return books * (self.depth // len(books))

    @property
    def training_state(self) -> set[str]:
        own = len(self.codebooks)
        return {f"codebooks.{i}.{name}" for i, book in enumerate(self.books[:own]) for name in book.training_state}

    def reset_training_state(self) -> None:
        for book in self.books:
            book.reset_training_state()

    def apart(self, codes: Tensor) -> list[tuple[Codebook, Tensor]]:
        """Each codebook with its codes (N,), from codes (N, depth)."""
        return list(zip(self.books, codes.unbind(dim=1), strict=True))
