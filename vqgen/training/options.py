"""Options of a training run and of its optimizer."""

from dataclasses import dataclass, field
from typing import Literal

from vqgen.errors import UsageError
from vqgen.options import at_least


@dataclass
class RunConfig:
    """How long, how exact, how often."""

    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 64
    """Examples a step, over all processes and accumulated parts together."""
    accumulate: int = 1
    """Parts into which a process splits its share of a step, to save memory; a codebook learns after each part."""
    seed: int = 0
    """Seed of weights, data order, augmentation and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto takes bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: bool = False
    """Compile the model with torch.compile (needs a C++ compiler)."""
    log_every: int = 20
    """Steps between rows of training figures in metrics.jsonl."""
    validate_every: int = 500
    """Steps between validations on held-out data."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    log_with: list[str] = field(default_factory=list)
    """Further trackers beside metrics.jsonl: tensorboard, wandb."""

    def __post_init__(self) -> None:
        at_least(self, steps=1, batch_size=1, accumulate=1, log_every=1, validate_every=1, checkpoint_every=1)
        at_least(self, keep_checkpoints=1)


@dataclass
class OptimizerConfig:
    """The optimizer, its schedule and the averaging of weights."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon moves matrices and convolutions along orthogonalised momentum, at the same --lr, and leaves the rest to
    AdamW; fewer steps to the same loss, each a little longer."""
    lr: float = 3e-4
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    lr_warmup: int = 100
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Weight decay of matrices and convolutions; biases, norms and codebooks have none."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean; Muon's momentum is 0.95."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 = no clipping."""
    ema_decay: float = 0.999
    """Decay of the averaged weights that are validated and saved; it rises to this over the first steps."""

    def __post_init__(self) -> None:
        at_least(self, lr=0, weight_decay=0, grad_clip=0, lr_warmup=0)
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected 0 <= value < 1")
