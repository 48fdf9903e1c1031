"""vqgen-train-tokenizer: main -> build -> Run.fit -> step / validate."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.health import Finding, Row, codebook_collapse, non_finite_origin, pinned_discriminator
from vqgen.optimize import OptimizerConfig, averaged, optimizer_for, update_average
from vqgen.order import step_seed
from vqgen.run import Run, RunConfig

from .discriminator import PatchDiscriminator
from .images import Batch, ImageConfig, ImageDataset, open_images, training_batches
from .layers import ModelConfig
from .losses import (
    GanConfig,
    LossConfig,
    adaptive_ratio,
    discriminator_hinge,
    generator_hinge,
    reconstruction_loss,
)
from .model import Tokenizer, TokenizerConfig, TokenizerOutput
from .perceptual import PerceptualDistance, check_size
from .pixels import to_float
from .quantize import QuantizerConfig
from .reconstruct import reconstruct, write_comparison


@dataclass
class TokenizerTraining:
    """Everything a tokenizer run is made of."""

    data: str
    """Images: demo, a folder, parquet files, a save_to_disk folder, or a name that `datasets` knows."""
    output: Path = Path("runs/tokenizer")
    """Run folder; finished, it is the tokenizer's model folder."""
    overwrite: bool = False
    """Remove an earlier run in --output and start anew."""
    validation_images: int = 1000
    """Held-out images that each validation measures; 0 = all."""
    channels_last: bool = True
    """Memory layout of the convolutions; faster nearly everywhere."""
    images: ImageConfig = field(default_factory=ImageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.validation_images < 0:
            raise UsageError(f"--validation-images: found {self.validation_images}, expected at least 0")
        self.architecture()  # impossible combinations are refused before anything is loaded
        height, width = self.images.size
        if self.loss.perceptual_weights:
            check_size(self.loss.perceptual_net, height, width)
        if min(height, width) < 8:
            raise UsageError(f"--size: found {height}x{width}, expected at least 8 pixels a side (SSIM needs them)")
        if self.gan.gan_weight:
            PatchDiscriminator(self.images.channels, self.images.size, 1, self.gan.gan_layers)

    def architecture(self) -> TokenizerConfig:
        """The part that goes into the model folder."""
        return TokenizerConfig(self.images.size, self.images.channels, self.model, self.quantizer, self.images.fit)


class TokenizerTrainer:
    """Stage one: reconstruction, perceptual, quantizer and adversarial losses; see `Trainer` for the methods."""

    def __init__(self, run: Run, config: TokenizerTraining, train: ImageDataset, heldout: ImageDataset) -> None:
        self.run, self.config = run, config
        self.train_images, self.heldout_images = train, heldout
        self.extra: dict[str, Any] = {}
        torch.manual_seed(config.run.seed)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.layout = layout
        tokenizer = Tokenizer(config.architecture()).to(run.device, memory_format=layout)  # type: ignore[call-overload]
        self.average = averaged(tokenizer)
        self.perceptual: PerceptualDistance | None = None
        if config.loss.perceptual_weights:
            net = PerceptualDistance(config.loss.perceptual_net, config.loss.perceptual_weights)
            self.perceptual = net.to(run.device, memory_format=layout)  # type: ignore[call-overload]
        optimizer, self.schedule = optimizer_for(tokenizer, config.optimizer, config.run.steps)
        if config.run.compile:
            if config.gan.gan_weight and config.gan.gan_adaptive:
                # The adaptive ratio walks the graph twice more; compiled code may else give its buffers away before.
                from torch._functorch import config as functorch

                functorch.donated_buffer = False
            tokenizer.compile()
        self.model, self.optimizer = run.accelerator.prepare(tokenizer, optimizer)
        self.tokenizer = tokenizer  # the module itself: the wrapper of a distributed run has other names
        self.modules: dict[str, nn.Module] = {"tokenizer": tokenizer, "average": self.average}
        self.optimizers: dict[str, Any] = {"tokenizer": optimizer, "tokenizer_schedule": self.schedule}
        if config.gan.gan_weight:
            self._build_discriminator()

    def _build_discriminator(self) -> None:
        config = self.config
        images, gan = config.images, config.gan
        judge = PatchDiscriminator(images.channels, images.size, gan.gan_width, gan.gan_layers)
        judge = judge.to(self.run.device, memory_format=self.layout)  # type: ignore[call-overload]
        settings = OptimizerConfig(**{**vars(config.optimizer), "lr": gan.gan_lr, "ema_decay": 0})
        steps = max(1, config.run.steps - gan.gan_start)
        optimizer, self.judge_schedule = optimizer_for(judge, settings, steps)
        self.judge_model, self.judge_optimizer = self.run.accelerator.prepare(judge, optimizer)
        self.judge = judge
        self.modules["discriminator"] = judge
        self.optimizers |= {"discriminator": optimizer, "discriminator_schedule": self.judge_schedule}

    def begin(self, first_step: int) -> None:
        accelerator, seed = self.run.accelerator, self.config.run.seed
        share = self.run.micro_batch * self.config.run.accumulate
        for dataset in (self.train_images, self.heldout_images):
            dataset.broken.report = self.run.say
        if self.perceptual is None:
            self.run.say("LPIPS is not measured: name its backbone with --perceptual-weights")
        gan, steps = self.config.gan, self.config.run.steps
        if gan.gan_weight and not gan.weight(steps - 1):
            felt = gan.gan_start + gan.gan_warmup
            self.run.say(
                f"warning: --gan-weight has no effect: --steps {steps} end before step {felt}, where it begins"
            )

        def batches(step: int) -> Iterator[Batch]:
            rank, world = accelerator.process_index, accelerator.num_processes
            return training_batches(self.train_images, share, seed, step, rank, world, self.config.images)

        if first_step == 0 and self.config.quantizer.kmeans_start:
            self._start_codebook(batches(0))
        self.batches = batches(first_step)

    @torch.no_grad()
    def _start_codebook(self, batches: Iterator[Batch]) -> None:
        """k-means over latents of the untrained encoder: 8 vectors a code, or 32 batches where that is less."""
        torch.manual_seed(step_seed(self.config.run.seed, -1))
        wanted = 8 * self.config.quantizer.codebook_size // self.run.accelerator.num_processes
        latents: list[Tensor] = []
        for _, batch in zip(range(32), batches):
            for images in self._tensors(batch):
                latents.append(self.tokenizer.encoder(images).float())
            if sum(len(z) * z.shape[2] * z.shape[3] for z in latents) >= wanted:
                break
        self.tokenizer.quantizer.start(torch.cat(latents))

    def _tensors(self, batch: Batch) -> list[Tensor]:
        """A batch as float images in [-1, 1] on the device, one tensor a part of the accumulation."""
        images = to_float(batch.images.to(self.run.device, non_blocking=True))
        return list(images.contiguous(memory_format=self.layout).chunk(self.config.run.accumulate))

    def step(self, step: int) -> dict[str, Tensor]:
        parts = self._tensors(next(self.batches))
        logged: dict[str, Tensor] = {}
        fakes: list[Tensor] = []
        for index, images in enumerate(parts):
            with self.run.part(self.model, index):
                self.last_images = images
                output: TokenizerOutput = self.model(images)
                terms, total = self._losses(step, images, output)
                self.run.backward(terms, total)
            fakes.append(output.images.detach())
            for name, value in {**terms, "loss": total}.items():
                logged[name] = logged.get(name, 0) + value.detach() / len(parts)
        clip = self.config.optimizer.grad_clip
        logged["grad_norm"] = self.run.update(self.model, self.optimizer, self.schedule, clip)
        self.optimizer.zero_grad()
        update_average(self.average, self.tokenizer, self.config.optimizer.ema_decay, step)
        logged["lr"] = torch.tensor(self.schedule.get_last_lr()[0])
        if self.config.gan.trains(step):
            logged |= self._judge_step(parts, fakes)
        return logged

    def _losses(self, step: int, images: Tensor, output: TokenizerOutput) -> tuple[dict[str, Tensor], Tensor]:
        """The terms by name and their weighted sum."""
        config = self.config
        terms = {
            "reconstruction": reconstruction_loss(output.images, images, config.loss.reconstruction),
            "quantizer": output.quantized.loss,
            **{name: value.float() for name, value in output.quantized.stats.items()},
        }
        likeness = terms["reconstruction"]
        if self.perceptual is not None and config.loss.perceptual_weight:
            with self.run.accelerator.autocast():
                terms["perceptual"] = self.perceptual(output.images, images).mean()
            likeness = likeness + config.loss.perceptual_weight * terms["perceptual"]
        total = likeness + terms["quantizer"]
        weight = config.gan.weight(step)
        if weight:
            # The bare module with frozen weights: this pass trains the decoder, and a wrapper counts its passes.
            self.judge.requires_grad_(False)
            terms["adversarial"] = generator_hinge(self.judge(output.images))
            self.judge.requires_grad_(True)
            if config.gan.gan_adaptive:
                last = self.tokenizer.decoder.last.weight
                ratio = adaptive_ratio(likeness, terms["adversarial"], last, config.gan.gan_adaptive_max)
                terms["adaptive_ratio"] = ratio
                weight = weight * ratio
            total = total + weight * terms["adversarial"]
        return terms, total

    def _judge_step(self, reals: list[Tensor], fakes: list[Tensor]) -> dict[str, Tensor]:
        """One step of the discriminator on the images of this step and their reconstructions."""
        logged: dict[str, Tensor] = {}
        for index, (real, fake) in enumerate(zip(reals, fakes)):
            with self.run.part(self.judge_model, index):
                on_real, on_fake = self.judge_model(torch.cat([real, fake.to(real.dtype)])).chunk(2)
                loss = discriminator_hinge(on_real, on_fake)
                self.run.backward({"discriminator": loss}, loss)
            for name, value in (("", loss), ("_real", on_real.float().mean()), ("_fake", on_fake.float().mean())):
                key = "discriminator" + name
                logged[key] = logged.get(key, 0) + value.detach() / len(reals)
        clip = self.config.optimizer.grad_clip
        norm = self.run.update(self.judge_model, self.judge_optimizer, self.judge_schedule, clip)
        self.judge_optimizer.zero_grad()
        return {**logged, "discriminator_grad_norm": norm}

    def validate(self, step: int) -> dict[str, float]:
        count = len(self.heldout_images)
        if self.config.validation_images:
            count = min(count, self.config.validation_images)
        self.positions = count * self.tokenizer.grid[0] * self.tokenizer.grid[1] * self.tokenizer.depth
        with self.run.accelerator.autocast():
            result = reconstruct(
                self.average.module,  # type: ignore[arg-type]
                self.heldout_images,
                count,
                self.run.micro_batch,
                self.config.images,
                self.perceptual,
                self.run.accelerator,
            )
        if self.run.main:
            write_comparison(self.run.folder / "images" / f"step-{step:08d}.png", result)
        return result.figures

    def diagnose(self, rows: list[Row]) -> list[Finding]:
        reachable = min(self.tokenizer.codebook_size, self.positions)
        found = [codebook_collapse(rows, reachable), pinned_discriminator(rows)]
        return [finding for finding in found if finding]

    def origin(self) -> str:
        # The codebook learned from what was not finite: the averaged one, a step older, is put in its place.
        self.tokenizer.quantizer.load_state_dict(self.average.module.quantizer.state_dict())  # type: ignore[union-attr]
        self.tokenizer.eval()  # no more learning, which would wait for the other processes
        found = non_finite_origin(self.tokenizer, lambda: self.tokenizer(self.last_images))
        if found == "the loss itself" and self.config.gan.gan_weight:
            return "the discriminator: " + non_finite_origin(self.judge, lambda: self.judge(self.last_images))
        return found

    def finished(self) -> str | None:
        return None

    def save(self) -> None:
        self.average.module.save(self.run.folder)  # type: ignore[operator]


def build(config: TokenizerTraining) -> tuple[Run, TokenizerTrainer] | None:
    """The run and its trainer, or None where the folder already holds the finished run."""
    run = Run(config.output, config, config.run, config.overwrite)
    if run.completed():
        run.say(f"{config.output} is finished; --steps for more, --overwrite to start anew")
        return None
    train = open_images(config.data, "train", config.images, augment=True, replace_broken=True)
    heldout = open_images(config.data, "heldout", config.images)
    return run, TokenizerTrainer(run, config, train, heldout)


def train(config: TokenizerTraining) -> None:
    """Train a tokenizer (VQ-VAE or VQGAN) on images, and measure it on held-out ones."""
    built = build(config)
    if built:
        run, trainer = built
        run.fit(trainer)
        broken = len(trainer.train_images.broken.names) + len(trainer.heldout_images.broken.names)
        run.say(f"tokenizer: {config.output}" + (f" ({broken} broken images skipped)" if broken else ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-train-tokenizer", TokenizerTraining, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
