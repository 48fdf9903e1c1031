"""Adversarial loss: loss functions, adaptive weight, LeCam, and the discriminator's optimizer step."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.tokenizer.networks.discriminator import PatchDiscriminator
from vqgen.training.optimizer import optimizer_for
from vqgen.training.options import OptimizerConfig
from vqgen.training.run import Run

from .diffaugment import diff_augment
from .options import GanConfig, GanLoss


def discriminator_loss(kind: GanLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator from its logits of any shape; the mean over real and reconstructed images.

    hinge: `relu(1 - real)` and `relu(1 + fake)` (Lim and Ye 2017, eq. 4).
    vanilla, non-saturating: cross-entropy `-log D(real)` and `-log(1 - D(fake))`, D the sigmoid of a logit
    (Goodfellow et al. 2014, eq. 1).

    It is 0 for a perfect discriminator, and `blind_loss` where all logits are 0.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: GanLoss, fake: Tensor) -> Tensor:
    """Adversarial loss of the decoder, from the discriminator's logits of its images.

    hinge, vanilla: `-fake`, whose gradient at a logit is always 1 (hinge: Lim and Ye 2017; vanilla: as VQGAN's
    published code). With cross-entropy the logit of an optimal discriminator is log p(real) / p(fake), so this loss is
    the divergence KL(fake | real) (Sønderby et al. 2017, section 3.2). Goodfellow's minimax loss `log(1 - D(fake))` is
    not offered: its gradient vanishes where the decoder loses.
    non-saturating: `-log D(fake)` (Goodfellow et al. 2014, section 3; StyleGAN), whose gradient at a logit is
    1 - D(fake): small for images that the discriminator takes for real.
    """
    return F.softplus(-fake.float()).mean() if kind == "non-saturating" else -fake.float().mean()


def blind_loss(kind: GanLoss) -> float:
    """Loss of a discriminator whose logits are all 0."""
    return 1.0 if kind == "hinge" else math.log(2)


def adaptive_ratio(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_weight: nn.Parameter,
    largest: float,
    mean: Callable[[Tensor], Tensor] = lambda gradients: gradients,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Ratio |grad reconstruction loss| / |grad adversarial loss| at the decoder's last weights (), detached.

    Esser et al. 2021, eq. 7. Always finite and within 0 to `largest`, which it may reach where the adversarial gradient
    is 0; 0 where either gradient is not finite. Float32 whatever autocast says.

    Args:
        last_weight: of the module itself, not of a distributed wrapper.
        mean: averages the gradients (2, …) over processes, so that all have the same ratio.
        scale: factor on both losses for the backward pass alone; fp16 needs it to keep small gradients.
    """
    with torch.autocast(reconstruction.device.type, enabled=False):
        losses = (reconstruction * scale, adversarial * scale)
        grads = [torch.autograd.grad(loss, last_weight, retain_graph=True)[0].float() for loss in losses]
        # Norms relative to the largest entry: squares of very large or small entries leave the range of float32.
        pair = mean(torch.stack(grads).detach()).flatten(1)
        unit = pair.abs().amax(1, keepdim=True).clamp_min(torch.finfo(pair.dtype).tiny)
        top, bottom = unit.squeeze(1) * (pair / unit).norm(dim=1)
        ratio = torch.nan_to_num(top / (bottom + 1e-4 * scale), nan=0.0, posinf=largest)
        return ratio.clamp(0, largest)


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al. 2021, section 3.2): (D(real) - fake mean)² + (real mean - D(fake))².

    The two means are running means of the discriminator's logits, kept in the buffers `real` and `fake`.
    """

    DECAY = 0.99

    real: Tensor
    fake: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Penalty () on logits of any shape."""
        return (real.float() - self.fake).square().mean() + (self.real - fake.float()).square().mean()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, since: int) -> None:
        """Update the running means with the mean logits of update number `since`; early ones weigh more."""
        share = 1 - min(self.DECAY, (1 + since) / (10 + since))
        self.real.lerp_(real, share)
        self.fake.lerp_(fake, share)


class AdversarialTraining:
    """The discriminator of a run with its optimizer, the decoder's adversarial loss and the discriminator's step.

    Args:
        optimizer: options of the tokenizer's optimizer; the discriminator uses AdamW with the rate --gan-lr.
        extra: the trainer's small state. `gan_began` in it is the discriminator's first step, once it has begun.
    """

    def __init__(
        self,
        run: Run,
        config: GanConfig,
        optimizer: OptimizerConfig,
        discriminator: PatchDiscriminator,
        extra: dict[str, Any],
    ) -> None:
        self.run, self.config, self.extra = run, config, extra
        self.clip = optimizer.grad_clip
        self.discriminator = discriminator
        settings = OptimizerConfig(**{**vars(optimizer), "optimizer": "adamw", "lr": config.gan_lr})
        # Only the schedule's factor is used: the rate depends on the step alone, whenever training began.
        own, schedule = optimizer_for(discriminator, settings, run.plan)
        self.factor: Callable[[int], float] = schedule.lr_lambdas[0]
        self.model, self.optimizer = run.accelerator.prepare(discriminator, own)
        self.modules: dict[str, nn.Module] = {"discriminator": discriminator}
        self.optimizers: dict[str, Any] = {"discriminator": own}
        self.lecam: LeCam | None = None
        if config.gan_lecam:
            self.lecam = self.modules["lecam"] = LeCam().to(run.device)

    def begin(self) -> None:
        """Warn where the run ends before the adversarial loss reaches the decoder."""
        config, steps = self.config, self.run.settings.steps
        start = self.extra.get("gan_began", config.start(steps))
        if not config.weight(steps - 1 - start):
            first = start + config.gan_warmup
            self.run.say(f"warning: --gan-weight has no effect: --steps {steps} end before step {first}, its first")

    def since(self, step: int) -> int:
        """Return the steps since the discriminator's first, negative before it; note the first in `extra`."""
        if "gan_began" not in self.extra and step >= self.config.start(self.run.settings.steps):
            self.extra["gan_began"] = step
        return step - self.extra.get("gan_began", step + 1)

    def terms(
        self, step: int, fakes: Tensor, reconstruction: Tensor, last_weight: nn.Parameter
    ) -> tuple[dict[str, Tensor], Tensor | float]:
        """Compute the decoder's adversarial loss: the terms to log, and the weighted loss to add.

        Args:
            fakes: reconstructions (B, C, H, W), with their graph.
            reconstruction: the reconstruction loss, perceptual term included.
            last_weight: the decoder's last weights.
        """
        since = self.since(step)
        if since < 0:
            return {}, 0.0
        weight = self.config.weight(since)
        if not weight:
            return {"gan_weight": reconstruction.new_zeros(())}, 0.0
        # The bare module, frozen and in evaluation mode: this pass must leave the discriminator's gradients and its
        # spectral-norm estimates alone, and DDP counts the passes of its wrapper.
        self.discriminator.requires_grad_(False).eval()
        adversarial = generator_loss(self.config.gan_loss, self._logits(self.discriminator, fakes))
        self.discriminator.requires_grad_(True).train()
        terms, effective = {"adversarial": adversarial}, reconstruction.new_full((), weight)
        if self.config.gan_adaptive:
            scaler = self.run.accelerator.scaler
            # As a tensor: `get_scale` reads the value, which waits for the device.
            scale = 1.0 if scaler is None else scaler.scale(reconstruction.new_ones(()))
            largest = self.config.gan_adaptive_max
            ratio = adaptive_ratio(reconstruction, adversarial, last_weight, largest, self._mean, scale)
            terms["adaptive_ratio"], effective = ratio, weight * ratio
        return {**terms, "gan_weight": effective}, effective * adversarial

    def step(self, step: int, reals: list[Tensor], fakes: list[Tensor]) -> dict[str, Tensor]:
        """Update the discriminator once and return what to log; nothing before its first step.

        Args:
            reals, fakes: images (B, C, H, W) and their detached reconstructions, one tensor a part of accumulation.

        Raises `NonFinite`, in one process on a CPU before the weights change; else the next check does.
        """
        since = self.since(step)
        if since < 0:
            return {}
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.gan_lr * self.factor(step)
        logged: dict[str, Tensor] = {}
        for index, (real, fake) in enumerate(zip(reals, fakes)):
            with self.run.part(self.model, index):
                logits = self._logits(self.model, torch.cat([real, fake.to(real.dtype)]))
                on_real, on_fake = logits.float().chunk(2)
                # The mean logits are checked too: a hinge loss is 0 for an infinite logit.
                terms = {
                    "discriminator": discriminator_loss(self.config.gan_loss, on_real, on_fake),
                    "discriminator_real": on_real.mean(),
                    "discriminator_fake": on_fake.mean(),
                }
                total = terms["discriminator"]
                if self.lecam is not None:
                    terms["lecam"] = self.lecam(on_real, on_fake)
                    total = total + self.config.gan_lecam * terms["lecam"]
                self.run.backward(terms, total)
            accuracies = {"real_accuracy": on_real > 0, "fake_accuracy": on_fake < 0}
            for name, value in {
                **terms,
                **{f"discriminator_{n}": v.float().mean() for n, v in accuracies.items()},
            }.items():
                logged[name] = logged.get(name, 0) + value.detach() / len(reals)
        logged["discriminator_grad_norm"] = self.run.update(self.model, self.optimizer, None, self.clip)
        self.optimizer.zero_grad()
        if self.lecam is not None:
            real, fake = self._mean(torch.stack([logged["discriminator_real"], logged["discriminator_fake"]]))
            self.lecam.update(real, fake, since)
        return logged

    def _logits(self, discriminator: nn.Module, images: Tensor) -> Tensor:
        """Logits of augmented images."""
        return discriminator(diff_augment(images, self.config.gan_augment))

    def _mean(self, value: Tensor) -> Tensor:
        """Mean over all processes."""
        return cast(Tensor, self.run.accelerator.reduce(value, "mean"))
