"""vqgen-train-tokenizer: main -> build -> Run.fit -> step / validate."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqgen.config import command
from vqgen.errors import UsageError, UserError
from vqgen.options import at_least
from vqgen.seeding import step_seed
from vqgen.tokenizer.data.dataset import Batch, ImageDataset, open_images, training_batches
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.losses.adversarial import Adversary
from vqgen.tokenizer.losses.lpips import PerceptualDistance, check_size, check_weights
from vqgen.tokenizer.losses.options import GanConfig, LossConfig
from vqgen.tokenizer.losses.reconstruction import reconstruction_loss
from vqgen.tokenizer.networks.discriminator import PatchDiscriminator
from vqgen.tokenizer.networks.options import ModelConfig
from vqgen.tokenizer.quantizers.options import QuantizerConfig
from vqgen.training.health import Finding, Row, non_finite_origin
from vqgen.training.optimizer import averaged, optimizer_for, update_average
from vqgen.training.options import OptimizerConfig, RunConfig
from vqgen.training.run import Run

from .diagnosis import diagnose
from .model import Tokenizer, TokenizerOutput
from .options import TokenizerConfig
from .reconstruction import reconstruct, write_comparison


@dataclass
class TokenizerTraining:
    """Everything a tokenizer run is made of."""

    data: str
    """Images: demo, a folder, parquet files, a save_to_disk folder, or a name that `datasets` knows."""
    output: Path = Path("runs/tokenizer")
    """Run folder; finished, it is the tokenizer's model folder."""
    init: Path | None = None
    """Tokenizer whose weights the run starts from; its encoder and decoder must have the same sizes, and its quantizer
    comes along where it has the same options of size."""
    overwrite: bool = False
    """Remove an earlier run in --output and start anew; after an interruption leave it out, or that is removed too."""
    validation_images: int = 1000
    """Held-out images that each validation measures, the same ones from all over the set; 0 = all."""
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
        at_least(self, validation_images=0)
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
        self.validated = min(len(heldout), config.validation_images or len(heldout))
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
        optimizer, self.schedule = optimizer_for(tokenizer, config.optimizer, run.plan)
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
        self.adversary: Adversary | None = None
        if config.gan.gan_weight:
            images, gan = config.images, config.gan
            judge = PatchDiscriminator(
                images.channels, images.size, gan.gan_width, gan.gan_layers, gan.gan_spectral_norm
            ).to(run.device, memory_format=layout)  # type: ignore[call-overload]
            self.adversary = Adversary(run, gan, config.optimizer, judge, self.extra)
            self.modules |= self.adversary.modules
            self.optimizers |= self.adversary.optimizers

    def begin(self, first_step: int) -> None:
        accelerator, seed = self.run.accelerator, self.config.run.seed
        share = self.run.micro_batch * self.config.run.accumulate
        for dataset in (self.train_images, self.heldout_images):
            dataset.broken.report = self.run.say
        if self.perceptual is None:
            self.run.say("LPIPS is not measured: name its backbone with --perceptual-weights")
        if count := self.train_images.source.test_images:
            self.run.say(f"{self.config.data} has a test split of {count} images; it is left for evaluation")
        if self.adversary:
            self.adversary.begin()

        def batches(step: int) -> Iterator[Batch]:
            rank, world = accelerator.process_index, accelerator.num_processes
            return training_batches(self.train_images, share, seed, step, rank, world, self.config.images)

        whole = self._initialize(self.config.init) if first_step == 0 and self.config.init else False
        wanted = self.config.quantizer.kmeans_start and self.tokenizer.quantizer.starts
        if first_step == 0 and wanted and not whole:
            self._start_codebook(batches(0))
        self.extra.setdefault("weight_norm", float(self._weight_norm()))
        self.batches = batches(first_step)

    def _weight_norm(self) -> Tensor:
        """Norm of all weights of the encoder and the decoder together; the step size is judged by how it grows."""
        parts = (self.tokenizer.encoder, self.tokenizer.decoder)
        return nn.utils.get_total_norm([weight.detach() for part in parts for weight in part.parameters()])

    def _initialize(self, folder: Path) -> bool:
        """Take the weights of another tokenizer; False where its quantizer is of another size and stays new."""
        given = Tokenizer.load(folder).state_dict()
        own = self.tokenizer.state_dict()
        parts = {key: key.partition(".")[0] for key in {**own, **given}}
        different = [k for k in sorted(parts) if k not in own or k not in given or own[k].shape != given[k].shape]
        for key in different:
            if parts[key] != "quantizer":
                shapes = [tuple(of[key].shape) if key in of else "no such tensor" for of in (given, own)]
                raise UserError(f"--init: {folder} has {key} as {shapes[0]}, this run has {shapes[1]}; use its sizes")
        if different:
            given = {key: value for key, value in given.items() if parts[key] != "quantizer"}
            self.run.say(f"--init: the quantizer of {folder} has other sizes; this run's starts anew")
        self.tokenizer.load_state_dict({**own, **given})
        self.tokenizer.quantizer.reset_training_state()
        return not different

    @torch.no_grad()
    def _start_codebook(self, batches: Iterator[Batch]) -> None:
        """k-means over latents of the untrained encoder: 8 vectors a code, or 32 batches where that is less."""
        torch.manual_seed(step_seed(self.config.run.seed, -1))
        wanted = 8 * self.tokenizer.codebook_size // self.run.accelerator.num_processes
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
        self.tokenizer.quantizer.progress = self.run.plan.progress(step)
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
        logged["weight_growth"] = self._weight_norm() / self.extra["weight_norm"]
        if self.adversary:
            logged |= self.adversary.step(step, parts, fakes)
            perceptual = self.config.loss.perceptual_weight * logged.get("perceptual", 0)
            self.adversary.watch(step, logged["reconstruction"] + perceptual)
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
        if self.adversary:
            last = self.tokenizer.decoder.last.weight
            adversarial, weighted = self.adversary.terms(step, output.images, likeness, last)
            terms |= adversarial
            total = total + weighted
        return terms, total

    def rates(self, per_second: float) -> dict[str, float]:
        return {}

    def validate(self, step: int) -> dict[str, float]:
        with self.run.accelerator.autocast():
            result = reconstruct(
                self.average.module,  # type: ignore[arg-type]
                self.heldout_images,
                self.validated,
                self.run.micro_batch,
                self.config.images,
                self.perceptual,
                self.run.accelerator,
            )
        if self.run.main:
            write_comparison(self.run.folder / "images" / f"step-{step:08d}.png", result)
        return result.metrics

    def diagnose(self, rows: list[Row]) -> list[Finding]:
        positions = self.tokenizer.grid[0] * self.tokenizer.grid[1]
        training, heldout = positions * len(self.train_images), positions * self.validated
        return diagnose(rows, self.config.quantizer, self.config.gan, training, heldout)

    def origin(self) -> str:
        # The codebook learned from what was not finite: the averaged one, a step older, is put in its place.
        self.tokenizer.quantizer.load_state_dict(self.average.module.quantizer.state_dict())  # type: ignore[union-attr]
        self.tokenizer.eval()  # no more learning, which would wait for the other processes
        found = non_finite_origin(self.tokenizer, lambda: self.tokenizer(self.last_images))
        if found == "the loss itself" and self.adversary:
            judge = self.adversary.discriminator
            return "the discriminator: " + non_finite_origin(judge, lambda: judge(self.last_images))
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
    if config.loss.perceptual_weights:
        check_weights(config.loss.perceptual_net, config.loss.perceptual_weights)
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
