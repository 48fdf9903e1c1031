"""Training of a prior."""

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vqgen.devices import compile_module, matrix_rate, on_main, to_device
from vqgen.errors import UsageError, UserError
from vqgen.options import option_name
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.data.pixels import image_grid, to_uint8
from vqgen.tokenizer.reconstruction import write_png_atomic
from vqgen.training.checkpoint import checkpoints
from vqgen.training.folder import CHECKPOINTS, has_trained
from vqgen.training.fsdp import full_tensors, reshard, shard, units
from vqgen.training.health import Finding, Row, non_finite_origin, overfitting
from vqgen.training.optimizer import averaged, optimizer_for, update_average
from vqgen.training.run import Run
from vqgen.training.summary import millions
from vqgen.training.trainer import next_batch

from .backbone.fused import fits
from .backbone.network import attend_unmasked
from .conditioning import Conditioning
from .dataset import Sequences
from .likelihood import likelihood
from .model import Prior
from .objective import accuracy, corrupted, objective
from .parts.scan import ANNEALED
from .parts.source import random_masks
from .resumed import check_codes, describe_codes, listed, other_images
from .selection import BEST, NATS, NATS_OF_HOLES, selected_by
from .train import PriorTraining

EAGER = 256, 640
"""Codes of an image, and tokens with the prefix, up to which attention on a CPU is computed by products: the backward
pass of torch's fused kernel is slower there (a step took a quarter longer). Longer sequences have too many attention
weights to keep."""


@torch.no_grad()
def preview_codes(prior: Prior, count: int, seed: int, given: Mapping[str, Tensor] | None = None) -> Tensor:
    """Draw codes (count, h, w[, depth]) at temperature 1, every class in turn; torch's random state is restored.

    `given` are the token ids (count, length) of some parts of the prefix. By the `generate` of transformers: vqgen's
    own sampler is a later layer.
    """
    conditioning, vocabulary, device = prior.conditioning.plain, prior.vocabulary, next(prior.parameters()).device
    prefixes = conditioning.prefixes(conditioning.conditions(), range(count), given).to(device)

    def allowed(_row: int, ids: Tensor) -> Tensor:
        return torch.arange(*vocabulary.allowed(len(ids) - conditioning.length))

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = prior.backbone.generate(  # type: ignore[operator]
            prefixes,
            attention_mask=torch.ones_like(prefixes),
            do_sample=True,
            top_k=0,
            max_new_tokens=vocabulary.length,
            min_new_tokens=vocabulary.length,
            pad_token_id=conditioning.null,
            prefix_allowed_tokens_fn=allowed,
        )
    return vocabulary.to_codes(conditioning.split(tokens)[1])


class PriorTrainer:
    """Stage two: next-token prediction of codes; see `Trainer` for the methods."""

    def __init__(self, run: Run, config: PriorTraining, train: CodeFiles, heldout: CodeFiles) -> None:
        self.run, self.config = run, config
        self.tokenizer_folder = config.codes / "tokenizer"
        self.conditioning = Conditioning.for_files(train, config.objective, config.model.order)
        self.vocabulary = self.conditioning.vocabulary
        self.train_codes = Sequences(train, self.conditioning)
        self.heldout_codes = Sequences(heldout, self.conditioning)
        torch.manual_seed(config.run.seed)
        image_shape = (train.channels, *train.image_size)
        prior = Prior(config.model, self.conditioning, image_shape, train.tokenizer_fingerprint).to(run.device)
        self.tokenizer = prior.load_tokenizer(self.tokenizer_folder).to(run.device)
        if config.init and (run.overwrite or not checkpoints(run.folder / CHECKPOINTS)):
            for note in prior.start_from(config.init):
                run.say(note)
        if config.gradient_checkpointing:
            prior.checkpoint_gradients()
        lengths = self.vocabulary.length, self.conditioning.length + self.vocabulary.length
        if run.device.type == "cpu" and all(length <= most for length, most in zip(lengths, EAGER)):
            prior.backbone.set_attn_implementation("eager")
            # Not in float32, where runs of earlier versions resume exactly: it draws dropout in another way.
            half = run.accelerator.mixed_precision == "bf16"
            whole = not (run.sharded or config.run.compile or config.gradient_checkpointing)
            prior.fused = half and whole and fits(prior.backbone)
        elif run.device.type == "cuda":
            attend_unmasked(prior.backbone)
        self.average = averaged(prior)
        self.best = cast(Prior, copy.deepcopy(self.average.module).cpu())
        self.codes = describe_codes(train, self.conditioning)
        self.extra: dict[str, Any] = {"best": math.inf, "stale": 0, "codes": self.codes}
        self.examples, self.position = len(train), None
        self.validated = min(config.validation_images or len(heldout), len(heldout))
        optimizer, self.schedule = optimizer_for(prior, config.optimizer, run.plan)
        if not run.sharded or config.run.compile:
            compile_module(prior, config.run.compile, run.device, config.run.steps, run.say)
        units(run.accelerator, [type(prior.backbone).__name__, *(prior.backbone._no_split_modules or [])])
        shard(run.accelerator, self.average.module)
        self.model, self.optimizer = run.accelerator.prepare(prior, optimizer)
        self.prior = prior
        self.flops = 3 * prior.flops_per_token()
        self.peak = matrix_rate(run.device, run.accelerator.mixed_precision) * run.accelerator.num_processes
        self.modules: dict[str, nn.Module] = {"prior": prior, "average": self.average, "best": self.best}
        self.optimizers: dict[str, Any] = {"prior": optimizer, "prior_schedule": self.schedule}

    def summary(self) -> dict[str, str]:
        config, files, count = self.config, self.train_codes.codes, len(self.heldout_codes)
        rows, columns = files.grid
        views = f" in {files.views} views" if files.views > 1 else ""
        model, weights = config.model, millions(self.prior.parameters())
        return {
            "codes": f"{config.codes}: {self.examples:,} images{views} to train on, {count:,} held out "
            f"({self.validated:,} measured); {rows}x{columns} codes of "
            f"{files.codebook_size}{f' x {files.depth}' * (files.depth > 1)}",
            "prefix": listed(self.codes["prefix"]),
            "parameters": f"{model.backbone}, {model.dim} wide, {model.layers} layers: {weights}",
        }

    def loading(self) -> float:
        return 0.0

    def check(self, extra: Mapping[str, Any]) -> None:
        check_codes(self.codes, extra.get("codes", {}), self.config.codes, self.run.folder, self.conditioning)

    def begin(self, first_step: int) -> None:
        if first_step:
            self._note_images()
        elif self.run.main:
            self.conditioning.write_files(self.run.folder)
        share = self.run.micro_batch * self.config.run.accumulate
        accelerator, seed = self.run.accelerator, self.config.run.seed
        rank, world = accelerator.process_index, accelerator.num_processes
        self.batches = self.train_codes.training(share, seed, first_step, rank, world, self.run.plan.progress)

    def _note_images(self) -> None:
        """Say where the codes are of other images than the run began with; then its best validation begins anew."""
        if other_images(self.codes, self.extra.get("codes", {})):
            self.run.say(
                f"{self.config.codes} has codes of other images than the run began with; it goes on with these"
            )
            self.extra.update(best=math.inf, stale=0)
        self.extra["codes"] = self.codes

    def step(self, step: int) -> dict[str, Tensor]:
        batch, settings = next_batch(self.batches), self.config.objective
        layout = batch.layout
        tokens = layout.dropped(to_device(batch.tokens, self.run.device))
        inputs = corrupted(tokens[:, :-1], settings.token_corruption, layout)
        targets = layout.split(tokens)[1]
        count = self.config.run.accumulate
        weights: list[Tensor | None] = [None] * count
        if batch.wanted is not None:
            weights[:] = (to_device(batch.wanted, self.run.device) / batch.share).chunk(count)
        logged: dict[str, Tensor] = {}
        for index, part in enumerate(zip(inputs.chunk(count), targets.chunk(count), weights, strict=True)):
            with self.run.part(self.model, index):
                self.last_tokens, wanted, weight = part
                logits = layout.of_codes(self.model(self.last_tokens))
                terms, loss = objective(logits, wanted, settings, layout.vocabulary, weight)
                self.run.backward(terms, loss)
            found = accuracy(logits, wanted, weight) if self.run.logs(step) else {}  # it costs twice the loss
            for name, term in {**terms, **found}.items():
                logged[name] = logged.get(name, 0) + term.detach() / count
        norm = self.run.update(self.model, self.optimizer, self.schedule, self.config.optimizer.grad_clip)
        self.optimizer.zero_grad()
        update_average(self.average, self.prior, self.config.optimizer.ema_decay, step)
        if batch.wanted is not None:  # other terms, as the cross-entropy, are logged for plain steps alone
            logged = {"inpainting_loss": logged["cross-entropy"]}
        else:
            logged["loss"] = logged.pop("cross-entropy")
        return {**logged, "grad_norm": norm, "lr": torch.tensor(self.schedule.get_last_lr()[0])}

    def rates(self, per_second: float) -> dict[str, float]:
        """Codes a second, and model-FLOPs utilisation: the matrix products of the model, prefixes included, as a share
        of the machine's matrix rate (Chowdhery et al. 2022, appendix B). Masked steps count as plain ones."""
        plain, codes = self.conditioning.plain, self.vocabulary.length
        fed = plain.length + codes - 1
        return {"tokens_per_second": per_second * codes, "mfu": per_second * fed * self.flops / self.peak}

    def validate(self, step: int) -> dict[str, float]:
        count = len(self.heldout_codes)
        chosen = fixed_subset(self.config.validation_images or count, count)
        rank, world = self.run.accelerator.process_index, self.run.accelerator.num_processes
        own, size, average = chosen[rank::world], max(1, self.run.micro_batch), cast(Prior, self.average.module)
        found = vars(likelihood(average, self.heldout_codes.ordered(own, size), self.run.accelerator))
        mean = found[NATS]
        if source := self.conditioning.masked_source:
            masks = random_masks(len(chosen), self.vocabulary.grid, np.random.default_rng(0))[rank::world]
            filled = likelihood(average, self.heldout_codes.ordered(own, size, masks), self.run.accelerator)
            found[NATS_OF_HOLES] = filled.nats_per_token
            mean = selected_by(mean, filled.nats_per_token, source.inpainting)
        losses = [loss for row in self.run.rows if isinstance(loss := row.get("train/loss"), (int, float))]
        if losses:
            found["gap"] = found[NATS] - losses[-1]
        better = mean < self.extra["best"]
        if better:
            self.extra.update(best=mean, stale=0)
            self.best.load_state_dict(full_tensors(average.state_dict(), host=True))
        else:
            self.extra["stale"] += 1
        if self.config.preview_images and (self.run.main or self.run.sharded):
            self._preview(step, average)
        reshard(average)
        if better:
            self.run.log({BEST: mean}, step)
        return found

    def _preview(self, step: int, prior: Prior) -> None:
        """Write samples of the averaged weights to `images/step-N.png`, the classes in columns.

        Where the prior takes more than a class, they have the conditions of the first held-out images.
        """
        with self.run.accelerator.autocast(), torch.no_grad():
            codes = preview_codes(prior, self.config.preview_images, self.config.run.seed, self._preview_conditions())
            images = to_uint8(self.tokenizer.decode(codes, at_once=False).float())
        cycle = self.conditioning.cycle(self.conditioning.conditions())
        columns = cycle if 2 <= cycle <= 20 else 8
        grid = image_grid(images.cpu(), columns)
        if self.run.main:
            write_png_atomic(self.run.folder / "images" / f"step-{step:08d}.png", grid)

    def _preview_conditions(self) -> dict[str, Tensor]:
        """Token ids of all parts for the first held-out images; none where the prior takes nothing but a class."""
        parts = self.conditioning.plain.parts
        if not any(part.informative for part in parts if part.name != "class"):
            return {}
        indices = np.arange(self.config.preview_images)
        rows = self.heldout_codes.rows(indices % len(self.heldout_codes), np.zeros_like(indices))
        return {part.name: rows.layout.part(rows.tokens, part.name) for part in parts}

    def diagnose(self, rows: list[Row]) -> list[Finding]:
        finding = overfitting(rows)
        return [finding] if finding else []

    def origin(self) -> str:
        self.prior.fused = False  # so that the modules are called
        return non_finite_origin(self.prior, lambda: self.prior(self.last_tokens))

    def finished(self) -> str | None:
        if self.config.patience and self.extra["stale"] >= self.config.patience:
            stale = self.extra["stale"]
            found = f"stopped early: {stale} validations without a better held-out loss"
            advice = "a larger --patience goes on"
            if self.conditioning.scan and self.run.plan.progress(self.run.done) < ANNEALED[1]:
                # The other orders would have been given up later: with fewer steps they are given up sooner.
                advice = "it still had other --scan-orders than raster; give fewer --steps, so that these end before"
            return f"{found}; {advice}"
        return None

    def save(self) -> None:
        self.best.save(self.run.folder, self.tokenizer_folder)


def refuse_unused(config: PriorTraining, files: CodeFiles) -> None:
    """Raise `UsageError` for an option of the command line that is for classes or text, which the prior lacks."""
    text = files.has_captions and config.objective.text_length != 0
    # Beside text and a source it says how often both are dropped together, also without classes.
    conditioned = files.class_names or (text and files.source)
    lacking = [] if conditioned else [("label_dropout", "classes", "images with classes")]
    if not text:
        lacking += [(name, "text", "--text-column") for name in ("text_dropout", "text_vocabulary")]
    for name, part, remedy in lacking:
        if name in config.given and getattr(config.objective, name):  # 0 asks for nothing
            found = f"found {getattr(config.objective, name):g}, but the prior has no {part}"
            raise UsageError(f"{option_name(name)}: {found}; take codes of {remedy}, or leave the option out")


def build(config: PriorTraining) -> tuple[Run, PriorTrainer] | None:
    """Return the run and its trainer, or None where the folder already holds the finished run."""
    run = Run(config.output, config, config.run, config.overwrite, shardable=True)
    if run.sharded and config.optimizer.optimizer == "muon":
        raise UsageError("--optimizer: muon needs unsharded matrices, and FSDP shards them; use adamw or no FSDP")
    if run.completed():
        more = "--steps for more, or a larger --patience where it stopped early"
        run.say(f"{config.output} is finished; {more}; --overwrite to start anew")
        return None
    train, heldout = (CodeFiles(config.codes, split) for split in ("train", "heldout"))
    if not len(heldout):
        raise UserError(f"{config.codes} holds no held-out codes; tokenize again with --holdout above 0")
    if config.overwrite or not has_trained(config.output):  # runs of earlier versions resume
        refuse_unused(config, train)
    on_main(lambda: [files.check() for files in (train, heldout)])
    return run, PriorTrainer(run, config, train, heldout)
