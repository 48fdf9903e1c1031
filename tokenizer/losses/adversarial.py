"""Adversarial training: the losses of the two players, when and how strongly they act, and the discriminator's step."""

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
    """What the discriminator minimises, from its logits of any shape; the mean of its losses on both kinds of images.

    hinge: `relu(1 - real)` and `relu(1 + fake)` (Lim and Ye 2017, eq. 4).
    vanilla, non-saturating: the cross-entropy `-log D(real)` and `-log(1 - D(fake))`, D the sigmoid of a logit
    (Goodfellow et al. 2014, eq. 1).

    It is 0 where the discriminator always wins with certainty, and `blind_loss` where all its logits are 0.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: GanLoss, fake: Tensor) -> Tensor:
    """What the decoder minimises, from the discriminator's logits of its images.

    hinge, vanilla: `-fake`, whose gradient at a logit is always 1. With the hinge loss it is Lim and Ye's. With the
    cross-entropy it is what VQGAN's published code calls vanilla; there a perfect discriminator's logit is
    log p(real) / p(fake), so that this loss is the divergence KL(fake | real) (Sønderby et al. 2017, section 3.2).
    Goodfellow's minimax loss `log(1 - D(fake))` itself is not offered: it has no gradient where the decoder loses.
    non-saturating: `-log D(fake)` (Goodfellow et al. 2014, section 3; StyleGAN's), whose gradient at a logit is
    1 - D(fake): images that already pass for real are left alone.
    """
    return F.softplus(-fake.float()).mean() if kind == "non-saturating" else -fake.float().mean()


def blind_loss(kind: GanLoss) -> float:
    """The discriminator's loss where it says nothing, all its logits 0."""
    return 1.0 if kind == "hinge" else math.log(2)


def adaptive_ratio(
    reconstruction: Tensor,
    adversarial: Tensor,
    last: nn.Parameter,
    largest: float,
    mean: Callable[[Tensor], Tensor] = lambda gradients: gradients,
    scale: float = 1.0,
) -> Tensor:
    """|grad of the reconstruction loss| / |grad of the adversarial loss| at the decoder's last weights, detached.

    Esser et al. 2021, eq. 7. Always finite and within 0 to `largest`: no adversarial gradient gives `largest`, and
    0 where either is not finite, so that the decoder does not follow it. Float32 whatever autocast says.

    Args:
        last: belongs to the module itself, not to a wrapper around it.
        mean: averages the gradients (2, …) over processes, as the step's own are: all then have the same ratio.
        scale: of both losses for the backward pass alone, which fp16 needs to keep small gradients.
    """
    with torch.autocast(reconstruction.device.type, enabled=False):
        losses = (reconstruction * scale, adversarial * scale)
        grads = [torch.autograd.grad(loss, last, retain_graph=True)[0].float() for loss in losses]
        # In units of the largest entry: squares of very large or very small ones leave the range of float32.
        pair = mean(torch.stack(grads).detach()).flatten(1)
        unit = pair.abs().amax(1, keepdim=True).clamp_min(torch.finfo(pair.dtype).tiny)
        top, bottom = unit.squeeze(1) * (pair / unit).norm(dim=1)
        ratio = torch.nan_to_num(top / (bottom + 1e-4 * scale), nan=0.0, posinf=largest)
        return ratio.clamp(0, largest)


class LeCam(nn.Module):
    """R_LC of Tseng et al. 2021, section 3.2: mean (D(real) - anchor of fake)² + mean (anchor of real - D(fake))².

    An anchor is the running mean of the discriminator's logits on the one kind of images; it draws its logits on
    the other kind near, and so both together. The anchors lie in buffers.
    """

    DECAY = 0.99

    real: Tensor
    fake: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty on logits of any shape."""
        return (real.float() - self.fake).square().mean() + (self.real - fake.float()).square().mean()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, since: int) -> None:
        """Take in the mean logits of update number `since` (0 is the first); early ones weigh more."""
        share = 1 - min(self.DECAY, (1 + since) / (10 + since))
        self.real.lerp_(real, share)
        self.fake.lerp_(fake, share)


class Plateau(nn.Module):
    """Sees when a loss has levelled off; what it remembers lies in buffers.

    It has where its mean over a window of `steps` steps is not lower than the best such mean before by at least the
    share `improvement` of it.
    """

    total: Tensor
    best: Tensor

    def __init__(self, improvement: float, steps: int) -> None:
        super().__init__()
        self.improvement, self.steps = improvement, steps
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("best", torch.tensor(torch.finfo(torch.float32).max))

    @torch.no_grad()
    def reached(self, step: int, loss: Tensor) -> bool:
        """Take in the loss of step `step`; whether it has levelled off. Waits for the device once a window."""
        self.total += loss
        if (step + 1) % self.steps:
            return False
        mean = self.total / self.steps
        flat = bool(mean > (1 - self.improvement) * self.best)
        self.best.copy_(torch.minimum(self.best, mean))
        self.total.zero_()
        return flat


class Adversary:
    """The discriminator of a run, its optimizer, its memory, and both players' part of a step.

    Args:
        optimizer: the settings of the run's own, for AdamW with the rate --gan-lr instead.
        extra: the trainer's small state. `gan_began` in it is the discriminator's first step, once it is known.
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
        # The schedule is only asked for its factors: the rate depends on the step alone, whenever training began.
        own, schedule = optimizer_for(discriminator, settings, run.plan)
        self.factor: Callable[[int], float] = schedule.lr_lambdas[0]
        self.model, self.optimizer = run.accelerator.prepare(discriminator, own)
        self.modules: dict[str, nn.Module] = {"discriminator": discriminator}
        self.optimizers: dict[str, Any] = {"discriminator": own}
        self.lecam = self.plateau = None
        if config.gan_lecam:
            self.lecam = self.modules["lecam"] = LeCam().to(run.device)
        if config.gan_start_at == "plateau":
            plateau = Plateau(config.gan_plateau, config.gan_plateau_steps)
            self.plateau = self.modules["plateau"] = plateau.to(run.device)

    def begin(self) -> None:
        """Say so where the run is too short for the adversarial loss."""
        config, steps = self.config, self.run.settings.steps
        latest = self.extra.get("gan_began", config.start(steps))
        if not config.weight(steps - 1 - latest):
            unless = " unless the reconstruction loss levels off early" if self.plateau else ""
            felt = latest + config.gan_warmup
            self.run.say(
                f"warning: --gan-weight has no effect{unless}: --steps {steps} end before step {felt}, where it begins"
            )

    def since(self, step: int) -> int:
        """Steps since the discriminator's first, which is noted when it comes; negative before."""
        if "gan_began" not in self.extra and step >= self.config.start(self.run.settings.steps):
            self.extra["gan_began"] = step
        return step - self.extra.get("gan_began", step + 1)

    def watch(self, step: int, likeness: Tensor) -> None:
        """After step `step`: take in its reconstruction loss; where that has levelled off, the next step begins."""
        if self.plateau is None or "gan_began" in self.extra:
            return
        if self.plateau.reached(step, self._mean(likeness)):
            self.extra["gan_began"] = step + 1
            self.run.say(f"the reconstruction loss has levelled off: the discriminator begins at step {step + 1}")

    def terms(
        self, step: int, fakes: Tensor, likeness: Tensor, last: nn.Parameter
    ) -> tuple[dict[str, Tensor], Tensor | float]:
        """The decoder's side: what to log, and what to add to its loss.

        Args:
            fakes: reconstructions (B, C, H, W), with their graph.
            likeness: the reconstruction loss, perceptual term included.
            last: the decoder's last weights.
        """
        since = self.since(step)
        if since < 0:
            return {}, 0.0
        weight = self.config.weight(since)
        if not weight:
            return {"gan_weight": likeness.new_zeros(())}, 0.0
        # The bare module, frozen and in evaluation mode: this pass trains the decoder, gives the discriminator no
        # gradient and moves no estimate of spectral norm; and the wrapper of a distributed run counts its passes.
        self.discriminator.requires_grad_(False).eval()
        adversarial = generator_loss(self.config.gan_loss, self._judge(self.discriminator, fakes))
        self.discriminator.requires_grad_(True).train()
        terms, effective = {"adversarial": adversarial}, likeness.new_tensor(weight)
        if self.config.gan_adaptive:
            scaler = self.run.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            ratio = adaptive_ratio(likeness, adversarial, last, self.config.gan_adaptive_max, self._mean, scale)
            terms["adaptive_ratio"], effective = ratio, weight * ratio
        return {**terms, "gan_weight": effective}, effective * adversarial

    def step(self, step: int, reals: list[Tensor], fakes: list[Tensor]) -> dict[str, Tensor]:
        """The discriminator's side: one update on images (B, C, H, W) and their detached reconstructions, by parts.

        Returns what to log; nothing before its first step. Raises `NonFinite` before the weights are touched.
        """
        since = self.since(step)
        if since < 0:
            return {}
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.gan_lr * self.factor(step)
        logged: dict[str, Tensor] = {}
        for index, (real, fake) in enumerate(zip(reals, fakes)):
            with self.run.part(self.model, index):
                logits = self._judge(self.model, torch.cat([real, fake.to(real.dtype)]))
                on_real, on_fake = logits.float().chunk(2)
                # The means are looked at, too: a hinge loss is 0 for an infinite logit.
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
            for name, value in terms.items():
                logged[name] = logged.get(name, 0) + value.detach() / len(reals)
        logged["discriminator_grad_norm"] = self.run.update(self.model, self.optimizer, None, self.clip)
        self.optimizer.zero_grad()
        if self.lecam is not None:
            real, fake = self._mean(torch.stack([logged["discriminator_real"], logged["discriminator_fake"]]))
            self.lecam.update(real, fake, since)
        return logged

    def _judge(self, discriminator: nn.Module, images: Tensor) -> Tensor:
        """The logits of images, seen through the augmentation."""
        return discriminator(diff_augment(images, self.config.gan_augment))

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, the same in each."""
        return cast(Tensor, self.run.accelerator.reduce(value, "mean"))
