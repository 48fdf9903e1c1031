"""What every network of the tokenizer offers beside `forward`."""

from abc import abstractmethod

from torch import nn


class ImageDecoder(nn.Module):
    """A decoder of latents (B, latent_dim, h, w) into images (B, C, h*f, w*f)."""

    @property
    @abstractmethod
    def last_weight(self) -> nn.Parameter:
        """Weight of the last layer, at which the adaptive weight compares gradients."""
