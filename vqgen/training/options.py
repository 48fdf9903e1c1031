"""Options of a training run and of its optimizer."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vqgen.errors import UsageError
from vqgen.options import Count, CountOrZero, Fraction, NotNegative, Options, Range, Seed, Size


@dataclass
class RunConfig(Options):
    """Length, precision, logging and checkpoints of a run."""

    steps: Count = 10_000
    """Optimizer steps; a run resumed with another number moves to the new learning-rate schedule without a jump."""
    minutes: Annotated[float, Range(above=0, most=1e6)] | None = None
    """Time to train for, in place of --steps: the first seconds measure the speed, then the number of steps is fixed.
    What is counted in steps and not given on the command line (warm-up, intervals) changes in proportion, and the
    averages of --ema-decay are over as small a share of a shorter run, unless you gave it."""
    epochs: Annotated[float, Range(above=0, most=1e6)] | None = None
    """Passes over the training images, in place of --steps; otherwise as --minutes."""
    batch_size: Size = 64
    """Examples per step, over all processes and accumulation parts."""
    accumulate: Size = 1
    """Parts into which each process splits its share of a step, to save memory; a codebook learns after each part."""
    seed: Seed = 0
    """Seed of weights, data order, augmentation and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; auto is bf16 where the hardware supports it, else fp16 on CUDA, else fp32."""
    compile: bool | None = None
    """Compile the model with torch.compile (needs a C++ compiler). By default in runs of 1,000 steps or more on CUDA,
    if it can be compiled there."""
    log_every: Count = 20
    """Steps between rows of training metrics in metrics.jsonl; losses are checked to be finite as often."""
    validate_every: Count = 500
    """Steps between validations on held-out data."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints that are kept."""
    log_with: list[str] = field(default_factory=list)
    """Trackers beside metrics.jsonl: tensorboard, wandb."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minutes is not None and self.epochs is not None:
            raise UsageError("--epochs: --minutes is given too; give one of them")

    @property
    def length(self) -> str:
        """The option that says how long the run is and its value, for errors."""
        if "steps" in self.given or (self.minutes is None and self.epochs is None):
            return f"--steps: found {self.steps}"
        option, value = ("--minutes", self.minutes) if self.epochs is None else ("--epochs", self.epochs)
        return f"{option}: found {value:g}, which is {self.steps} steps"


@dataclass
class OptimizerConfig(Options):
    """Optimizer, learning-rate schedule and weight averaging."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon updates matrices and convolutions with orthogonalised momentum, at the same --lr, and the rest with AdamW;
    fewer steps to the same loss, each slightly slower."""
    lr: NotNegative = 3e-4
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    lr_warmup: CountOrZero = 100
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: NotNegative = 0.01
    """Weight decay of matrices and convolutions; biases, norms and codebooks have none."""
    beta1: Fraction = 0.9
    """AdamW's decay of the mean gradient; Muon's momentum is 0.95."""
    beta2: Fraction = 0.95
    """AdamW's decay of the mean squared gradient."""
    grad_clip: NotNegative = 1.0
    """Largest gradient norm; 0 = no clipping."""
    ema_decay: Fraction = 0.999
    """Decay of the averaged weights that are validated and saved; it rises to this value over the first steps."""
