"""Rules of health that apply to a tokenizer run."""

from vqgen.tokenizer.losses.adversarial import blind_loss
from vqgen.tokenizer.losses.options import GanConfig
from vqgen.tokenizer.quantizers.options import QuantizerConfig
from vqgen.training.health import (
    Finding,
    Row,
    adversary_dominates,
    codebook_collapse,
    codebook_too_large,
    learning_rate_too_high,
    pinned_discriminator,
)


def diagnose(rows: list[Row], quantizer: QuantizerConfig, gan: GanConfig, training: int, heldout: int) -> list[Finding]:
    """Find what is wrong with a run in its logged rows.

    Args:
        training: positions of all training images together, each one code or, at each depth, one.
        heldout: positions of the images that a validation measures.
    """
    too_large = None if quantizer.fixed_codes else codebook_too_large(quantizer.codes, training)
    found = [too_large, learning_rate_too_high(rows), adversary_dominates(rows)]
    found.append(pinned_discriminator(rows, gan.gan_loss, blind_loss(gan.gan_loss)))
    if not too_large and not found[1]:  # a collapse would be their consequence, with another remedy
        reachable = min(quantizer.codes, heldout)
        found.append(codebook_collapse(rows, reachable, quantizer.collapse_remedy(), quantizer.settling_steps))
    return [finding for finding in found if finding]
