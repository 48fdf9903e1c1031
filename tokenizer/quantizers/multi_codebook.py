"""What quantizers of several codes a position share."""

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Quantizer
from .codebook import Codebook
from .options import ProductConfig, ResidualConfig


class MultiCodebookQuantizer(Quantizer):
    """Base of quantizers of `depth` codes a position.

    Args:
        dim: channels D of the latents.
        width: dimension of the vectors.
        codebooks: one for each depth, or one for all.
    """

    def __init__(
        self, dim: int, width: int, config: ResidualConfig | ProductConfig, codebooks: Sequence[Codebook]
    ) -> None:
        super().__init__(dim, width, config)
        self.depth = config.depth
        self.needs_initialization = config.kmeans_start
        self.codebooks = nn.ModuleList(codebooks)

    @property
    def depth_codebooks(self) -> list[Codebook]:
        """The codebook of each depth; the same one `depth` times where it is shared."""
        codebooks = [codebook for codebook in self.codebooks if isinstance(codebook, Codebook)]
        return codebooks * (self.depth // len(codebooks))

    @property
    def training_state(self) -> set[str]:
        own = enumerate(self.depth_codebooks[: len(self.codebooks)])
        return {f"codebooks.{i}.{name}" for i, codebook in own for name in codebook.training_state}

    def reset_training_state(self) -> None:
        for codebook in self.depth_codebooks:
            codebook.reset_training_state()

    def split(self, codes: Tensor) -> list[tuple[Codebook, Tensor]]:
        """Return the codebook of each depth with its codes (N,), from codes (N, depth)."""
        return list(zip(self.depth_codebooks, codes.unbind(dim=1), strict=True))
