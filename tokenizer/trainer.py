"""Training of a tokenizer: losses, optimizer step, validation and checkpoints."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from vqgen.config import shown, values_of
from vqgen.devices import compile_module, to_device
from vqgen.errors import UsageError
from vqgen.options import option_name
from vqgen.seeding import step_seed
from vqgen.tokenizer.data.dataset import Batch, ImageDataset, open_images, training_batches
from vqgen.tokenizer.data.options import check_outside, is_stream
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.losses.adversarial import AdversarialTraining
from vqgen.tokenizer.losses.lpips import PerceptualDistance, check_weights
from vqgen.tokenizer.losses.reconstruction import reconstruction_loss
from vqgen.tokenizer.networks.discriminator import PatchDiscriminator
from vqgen.tokenizer.streams.dataset import Position, StreamImages, open_stream
from vqgen.training.folder import CHECKPOINTS, checkpoints, has_trained
from vqgen.training.health import Finding, Row, non_finite_origin
from vqgen.training.optimizer import averaged, optimizer_for, update_average
from vqgen.training.run import Run
from vqgen.training.summary import size_of
from vqgen.training.trainer import next_batch

from .diagnosis import diagnose
from .initial_weights import InitialWeights, initial_weights
from .model import Tokenizer, TokenizerOutput
from .reconstruction import reconstruct, write_comparison

if TYPE_CHECKING:
    from .train import TokenizerTraining

M = TypeVar("M", bound=nn.Module)
MANY = 2**40
"""Images of a stream, whose number is not known: enough for any codebook."""

COUNTS = {"codes_revived"}
"""Metrics of a step that are sums over its parts, not means."""


class TokenizerTrainer:
    """Trainer of stage one: reconstruction, perceptual, quantizer and adversarial loss; see `Trainer`."""

    def __init__(
        self, run: Run, config: "TokenizerTraining", train: ImageDataset | StreamImages, heldout: ImageDataset
    ) -> None:
        self.run, self.config = run, config
        self.train_images, self.heldout_images = train, heldout
        self.validated = min(len(heldout), config.validation_images or len(heldout))
        self.extra: dict[str, Any] = {}
        self.examples = 0 if isinstance(train, StreamImages) else len(train)
        self.initial: InitialWeights | None = None
        if config.init and (run.overwrite or not checkpoints(run.folder / CHECKPOINTS)):
            self.initial = initial_weights(config.init, config.architecture(), config.decoder_only)
        torch.manual_seed(config.run.seed)
        tokenizer = self._placed(Tokenizer(config.architecture()))
        if config.decoder_only:
            tokenizer.freeze_codes()
        self.average = averaged(tokenizer)
        self.perceptual: PerceptualDistance | None = None
        if config.loss.perceptual_weights:
            distance = PerceptualDistance(config.loss.perceptual_net, config.loss.perceptual_weights)
            self.perceptual = self._placed(distance)
        optimizer, self.schedule = optimizer_for(tokenizer, config.optimizer, run.plan)
        compiled = compile_module(tokenizer, config.run.compile, run.device, config.run.steps, run.say)
        if compiled and config.gan.gan_weight and config.gan.gan_adaptive:
            # The adaptive weight runs further backward passes; donated buffers are gone after the first.
            from torch._functorch import config as functorch

            functorch.donated_buffer = False
        self.model, self.optimizer = run.accelerator.prepare(tokenizer, optimizer)
        self.tokenizer = tokenizer  # without the wrapper of a distributed run
        self.modules: dict[str, nn.Module] = {"tokenizer": tokenizer, "average": self.average}
        self.optimizers: dict[str, Any] = {"tokenizer": optimizer, "tokenizer_schedule": self.schedule}
        self.gan: AdversarialTraining | None = None
        if config.gan.gan_weight:
            images, gan = config.images, config.gan
            discriminator = self._placed(
                PatchDiscriminator(images.channels, images.size, gan.gan_width, gan.gan_layers, gan.gan_spectral_norm)
            )
            self.gan = AdversarialTraining(run, gan, config.optimizer, discriminator, self.extra)
            self.modules |= self.gan.modules
            self.optimizers |= self.gan.optimizers

    def _placed(self, module: M) -> M:
        """Move a module to the run's device, in channels_last layout, which is faster for convolutions."""
        return module.to(self.run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def summary(self) -> dict[str, str]:
        config, images = self.config, self.config.images
        height, width = images.size
        augmented = ["flips"] * images.flip + [f"crops of up to {images.random_crop:.0%}"] * (images.random_crop > 0)
        augmented += [f"shifts of up to {images.random_shift} px"] * (images.random_shift > 0)
        model = {name: self.tokenizer.get_submodule(name) for name in ("encoder", "quantizer", "decoder")}
        model |= {"discriminator": self.gan.discriminator} if self.gan else {}
        rows, columns = self.tokenizer.grid
        codes = f"{rows}x{columns} codes of {self.tokenizer.codebook_size}"
        return {
            "images": f"{shown(config.data)}: {self._images()}",
            "size": f"{height}x{width} pixels, {images.channels} channels{', '.join(['', *augmented])}",
            "codes": f"{codes}{f' x {self.tokenizer.depth}' * (self.tokenizer.depth > 1)}, by {config.quantizer.kind}",
            "parameters": size_of(model),
        }

    def _images(self) -> str:
        """The numbers of images."""
        train, heldout = self.train_images, self.heldout_images
        if isinstance(train, StreamImages):
            return f"{len(train.shards.files):,} files to train on, {self.validated:,} held-out images measured"
        classes = f"; {len(train.class_names)} classes" if train.class_names else ""
        measured = f"{len(heldout):,} held out ({self.validated:,} measured)"
        note = f" ({train.source.note})" if train.source.note else ""
        return f"{len(train):,} to train on, {measured}, {train.source.test_images:,} left for tests{classes}{note}"

    @property
    def position(self) -> dict[str, Any] | None:
        return self.train_images.place() if isinstance(self.train_images, StreamImages) else None

    def check(self, extra: Mapping[str, Any]) -> None:
        """Accept any images: only options, which the run folder has, decide the sizes of a tokenizer."""

    def begin(self, first_step: int) -> None:
        accelerator, seed = self.run.accelerator, self.config.run.seed
        share = self.run.micro_batch * self.config.run.accumulate
        for dataset in (self.train_images, self.heldout_images):
            dataset.broken.report, dataset.broken.shared = self.run.say, accelerator.num_processes > 1
        if self.perceptual is None:
            self.run.say("LPIPS is not measured; --perceptual-weights gives the weights of its backbone")
        if self.gan:
            self.gan.begin()

        rank, world = accelerator.process_index, accelerator.num_processes
        positions = self.extra.pop("positions", None)
        if positions and isinstance(self.train_images, StreamImages):
            for told in self.train_images.resume(positions, rank, world):
                self.run.say(told)

        def batches(step: int) -> Iterator[Batch]:
            if isinstance(self.train_images, StreamImages):
                return self.train_images.batches(share, seed, rank, world, self.config.shuffle_buffer)
            return training_batches(self.train_images, share, seed, step, rank, world)

        if first_step == 0:
            initial, self.initial = self.initial, None  # its memory is needed no more
            if initial:
                self._start_from(initial)
            if self.tokenizer.quantizer.needs_initialization and not (initial and initial.with_quantizer):
                self._initialize_codebook(batches(0))
                if isinstance(self.train_images, StreamImages):
                    self.train_images.position = Position()
        self.extra.setdefault("weight_norm", float(self._weight_norm()))
        self._check_images()
        self.batches = batches(first_step)

    def _check_images(self) -> None:
        """Say where the run began with other images; streams say so themselves."""
        if not isinstance(self.train_images, StreamImages):
            now = [self.train_images.fingerprint, self.heldout_images.fingerprint]
            if self.extra.get("images", now) != now:
                found = f"{shown(self.config.data)} has other images than the run began with"
                self.run.say(f"{found}, and others of them may be held out; it goes on with these")
            self.extra["images"] = now

    def _weight_norm(self) -> Tensor:
        """Norm of all weights of encoder and decoder; its growth shows whether the learning rate is too high."""
        parts = (self.tokenizer.encoder, self.tokenizer.decoder)
        return nn.utils.get_total_norm([weight.detach() for part in parts for weight in part.parameters()])

    def _start_from(self, initial: InitialWeights) -> None:
        """Load the weights of another tokenizer."""
        for note in initial.notes:
            self.run.say(note)
        self.tokenizer.load_state_dict({**self.tokenizer.state_dict(), **initial.tensors})
        if not self.config.decoder_only:  # it may scale the codes again, whose last bits would change
            self.tokenizer.quantizer.reset_training_state()

    @torch.no_grad()
    def _initialize_codebook(self, batches: Iterator[Batch]) -> None:
        """Initialize the codebook from latents of the untrained encoder: 8 vectors a code, of at most 32 batches."""
        torch.manual_seed(step_seed(self.config.run.seed, -1))
        wanted = 8 * self.tokenizer.codebook_size // self.run.accelerator.num_processes
        latents: list[Tensor] = []
        for _, batch in zip(range(32), batches):
            for images in self._tensors(batch):
                latents.append(self.tokenizer.encoder(images).float())
            if sum(len(z) * z.shape[2] * z.shape[3] for z in latents) >= wanted:
                break
        self.tokenizer.quantizer.initialize(torch.cat(latents))

    def loading(self) -> float:
        return 0.0 if isinstance(self.train_images, StreamImages) else self.train_images.first_read()

    def _tensors(self, batch: Batch) -> list[Tensor]:
        """Return a batch as float images in [-1, 1] on the device, one tensor for each part of accumulation."""
        images = to_float(to_device(batch.images, self.run.device))
        return list(images.contiguous(memory_format=torch.channels_last).chunk(self.config.run.accumulate))

    def step(self, step: int) -> dict[str, Tensor]:
        parts = self._tensors(next_batch(self.batches))
        self.tokenizer.quantizer.training_progress = self.run.plan.progress(step)
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
                divisor = 1 if name in COUNTS else len(parts)
                logged[name] = logged.get(name, 0) + value.detach() / divisor
        clip = self.config.optimizer.grad_clip
        norm = logged["grad_norm"] = self.run.update(self.model, self.optimizer, self.schedule, clip)
        clipped = (norm / clip).clamp(min=1) if clip else 1.0  # the factor by which the gradient was shortened
        for name in ("encoder", "quantizer", "decoder"):
            part = [p.grad for p in self.tokenizer.get_submodule(name).parameters() if p.grad is not None]
            logged[f"{name}_grad_norm"] = clipped * nn.utils.get_total_norm(part)
        self.optimizer.zero_grad()
        update_average(self.average, self.tokenizer, self.config.optimizer.ema_decay, step)
        logged["lr"] = torch.tensor(self.schedule.get_last_lr()[0])
        logged["weight_growth"] = self._weight_norm() / self.extra["weight_norm"]
        if self.gan:
            logged |= self.gan.step(step, parts, fakes)
        return logged

    def _losses(self, step: int, images: Tensor, output: TokenizerOutput) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses by name and their weighted sum."""
        config = self.config
        terms = {
            "reconstruction": reconstruction_loss(output.images, images, config.loss.reconstruction),
            "quantizer": output.quantized.loss,
            **{name: value.float() for name, value in output.quantized.stats.items()},
        }
        reconstruction = terms["reconstruction"]
        if self.perceptual is not None and config.loss.perceptual_weight:
            with self.run.accelerator.autocast():
                terms["perceptual"] = self.perceptual(output.images, images).mean()
            reconstruction = reconstruction + config.loss.perceptual_weight * terms["perceptual"]
        total = reconstruction + terms["quantizer"]
        if self.gan:
            adversarial, weighted = self.gan.terms(step, output.images, reconstruction, self.tokenizer.last_weight)
            terms |= adversarial
            total = total + weighted
        return terms, total

    def rates(self, per_second: float) -> dict[str, float]:
        return {}

    def validate(self, step: int) -> dict[str, float]:
        result = reconstruct(
            self.average.module,  # type: ignore[arg-type]
            self.heldout_images,
            self.validated,
            self.run.micro_batch,
            self.perceptual,
            self.run.accelerator,
        )
        for dataset in (self.train_images, self.heldout_images):
            dataset.broken.exchange()
        if self.run.main:
            write_comparison(self.run.folder / "images" / f"step-{step:08d}.png", result)
        return result.metrics

    def diagnose(self, rows: list[Row]) -> list[Finding]:
        positions = self.tokenizer.grid[0] * self.tokenizer.grid[1]
        training, heldout = positions * (self.examples or MANY), positions * self.validated
        found = diagnose(rows, self.config.quantizer, self.config.gan, training, heldout)
        # The codes are the former run's where only the decoder is trained.
        return [each for each in found if not (self.config.decoder_only and each.name.startswith("codebook"))]

    def origin(self) -> str:
        # The codebook was updated with non-finite vectors: use the averaged one, which is a step older.
        self.tokenizer.quantizer.load_state_dict(self.average.module.quantizer.state_dict())  # type: ignore[union-attr]
        self.tokenizer.eval()  # an update of the codebook would wait for the other processes
        found = non_finite_origin(self.tokenizer, lambda: self.tokenizer(self.last_images))
        if found == "the loss itself" and self.gan:
            discriminator = self.gan.discriminator
            return "the discriminator: " + non_finite_origin(discriminator, lambda: discriminator(self.last_images))
        return found

    def finished(self) -> str | None:
        return None

    def save(self) -> None:
        self.average.module.save(self.run.folder)  # type: ignore[operator]


def refuse_unused(config: "TokenizerTraining") -> None:
    """Raise `UsageError` for an option of the command line that has no effect without another one."""
    of_gan = {name for name in config.given if name.startswith("gan_") and name != "gan_weight"}
    quantizer = values_of(config.quantizer)
    for needed, missing, names in (
        ("--gan-weight", not config.gan.gan_weight, of_gan),
        ("--gan-adaptive", not config.gan.gan_adaptive, {"gan_adaptive_max"}),
        ("--perceptual-weights", not config.loss.perceptual_weights, {"perceptual_net"}),
        ("--entropy-weight", quantizer.get("entropy_weight") == 0, {"entropy_diversity", "entropy_temperature"}),
        ("--codebook ema", quantizer.get("codebook") == "gradient", {"codebook_decay"}),
    ):
        if missing and (found := sorted(names & config.given)):
            raise UsageError(f"{option_name(found[0])}: has no effect without {needed}; add that, or leave this out")
    if found := sorted(config.quantizer.unread & config.given):
        beside = f"has no effect beside {config.quantizer.codes_option}; leave it out"
        raise UsageError(f"{option_name(found[0])}: {beside}")


def build(config: "TokenizerTraining") -> tuple[Run, TokenizerTrainer] | None:
    """Open the run and its trainer; None where the folder holds the finished run."""
    run = Run(config.output, config, config.run, config.overwrite)
    if run.completed():
        run.say(f"{config.output} is finished; --steps for more, --overwrite to start again")
        return None
    new = config.overwrite or not has_trained(config.output)  # runs of earlier versions resume
    if new:
        refuse_unused(config)
    if config.loss.perceptual_weights:
        check_weights(config.loss.perceptual_net, config.loss.perceptual_weights)
    if is_stream(config.data):
        return run, TokenizerTrainer(run, config, *open_stream(config.data, config.images, config.validation_images))
    train = open_images(config.data, "train", config.images, augment=True, replace_broken=True)
    heldout = open_images(config.data, "heldout", config.images)
    if new:
        if "shuffle_buffer" in config.given:
            text = f"found {config.shuffle_buffer}, but {shown(config.data)} is no stream, and all of it is shuffled"
            raise UsageError(f"--shuffle-buffer: {text}; leave it out")
        for dataset in train, heldout:
            check_outside(config.output, dataset.source.folder)
    return run, TokenizerTrainer(run, config, train, heldout)
