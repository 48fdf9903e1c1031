"""Health rules that apply to a tokenizer run, and the remedies that are not in use yet."""

from vqgen.tokenizer.losses.adversarial import blind_loss
from vqgen.tokenizer.losses.options import GanConfig
from vqgen.tokenizer.quantizers.options import LEARNED, QuantizerConfig
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
    """Findings from the rows that a run has logged.

    Args:
        training: grid positions of all training images.
        heldout: grid positions of the images of a validation.
    """
    # Codes that are not learned need no data.
    too_large = codebook_too_large(quantizer.codes, training) if quantizer.quantizer not in ("fsq", "lfq") else None
    found = [too_large, learning_rate_too_high(rows), adversary_dominates(rows)]
    found.append(pinned_discriminator(rows, gan.gan_loss, blind_loss(gan.gan_loss)))
    if not too_large and not found[1]:  # these cause a collapse and have another remedy
        settled = 2 * quantizer.revive_after if quantizer.quantizer in LEARNED else 0
        reachable = min(quantizer.codes, heldout)
        found.append(codebook_collapse(rows, reachable, collapse_remedy(quantizer), settled))
    return [finding for finding in found if finding]


def collapse_remedy(config: QuantizerConfig) -> str:
    """Options against a codebook collapse that are not set yet."""
    less = "smaller --levels" if config.quantizer == "fsq" else "a smaller --codebook-size"
    if config.quantizer == "gumbel":
        return f"raise --entropy-weight (it is {config.entropy_weight:g}) or --gumbel-kl-weight, or use {less}"
    if config.quantizer == "lfq":
        return f"raise --entropy-weight (it is {config.entropy_weight:g}), or use {less}"
    if config.quantizer not in LEARNED:
        return f"use {less}"
    helps = {
        "--codebook ema": config.codebook != "ema",
        "--l2-normalize": not config.l2_normalize and config.quantizer != "residual",
        "--code-dim 8": config.code_dim > 16,
        "--kmeans-start": not config.kmeans_start,
        "--revive-after 100": not config.revive_after,
    }
    missing = [option for option, wanted in helps.items() if wanted]
    return f"use {' '.join(missing)}, or {less}" if missing else f"use {less} or a larger --batch-size, or lower --lr"
