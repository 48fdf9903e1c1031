"""Vector quantization (van den Oord et al. 2017): the nearest code of one codebook."""

from torch import Tensor

from .base import QuantizedVectors, Quantizer
from .codebook import Codebook
from .options import VQConfig


class VectorQuantizer(Quantizer):
    """The nearest code of one codebook, after a linear map to few dimensions (Yu et al. 2022, section 3.2).

    `z_q = e_k`, `k = argmin_j |z - e_j|` (van den Oord et al., eq. 1 and 2). The loss is that of `vq_loss` (eq. 3) plus
    `entropy_weight * (E[H(p(z))] - entropy_diversity * H(E[p(z)]))` (Yu et al. 2023, eq. 5; see `entropies`).

    Args:
        dim: channels D of the latents.
    """

    def __init__(self, dim: int, config: VQConfig) -> None:
        super().__init__(dim, config.code_dim, config)
        self.needs_initialization = config.kmeans_start
        self.codebook = Codebook(config, config.code_dim, config.l2_normalize, entropy=config)

    @property
    def training_state(self) -> set[str]:
        return {f"codebook.{name}" for name in self.codebook.training_state}

    def quantize(self, flat: Tensor) -> QuantizedVectors:
        return self.codebook(flat)

    def choose(self, flat: Tensor) -> Tensor:
        return self.codebook.choose(flat)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook.lookup(codes)

    def initialize_from(self, flat: Tensor) -> None:
        self.codebook.initialize_from(flat)

    def reset_training_state(self) -> None:
        self.codebook.reset_training_state()
