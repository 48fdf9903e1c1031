"""The training step of vqgen-train-tokenizer against a straightforward one, and how much of either is convolution.

    python benchmarks/train_step.py                                       # the preset vqvae, squared error alone
    python benchmarks/train_step.py --config vqgan-cifar10 --batch-size 32 --perceptual-weights vgg16.safetensors --gan
    python benchmarks/train_step.py --config vqgan --batch-size 2 --steps 3 --threads 1

The straightforward step has the same architecture and losses, in plain modules and in float32: tensors as they come
(no channels_last), group norm, SiLU and attention by the book, the whole matrix of distances to the codes, LPIPS as
its library computes it, a gradient for each part of the adaptive weight, the discriminator on real and on
reconstructed images apart, and optimizer and averaged weights parameter by parameter. Both take the same images, noise
that lies in memory.
"""

import argparse
import copy
import itertools
import tempfile
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from turns import Step, compare

from vqgen.config import parse
from vqgen.devices import keep_memory
from vqgen.tokenizer.data.dataset import Batch
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.autoencoder import Attention
from vqgen.tokenizer.networks.discriminator import PatchDiscriminator
from vqgen.tokenizer.networks.group_norm import GroupNorm
from vqgen.tokenizer.quantizers.options import VQConfig
from vqgen.tokenizer.train import TokenizerTraining
from vqgen.tokenizer.trainer import build


def settings(options: argparse.Namespace, precision: str, output: Path) -> TokenizerTraining:
    """The preset with the losses asked for, all on from the first step."""
    words = ["--config", options.config, "--data", "demo", "--output", str(output), "--precision", precision]
    words += ["--workers", "0", "--no-kmeans-start", "--optimizer", "adamw"]  # as the straightforward step
    if options.batch_size:
        words += ["--batch-size", str(options.batch_size)]
    if options.perceptual_weights:
        words += ["--perceptual-weights", options.perceptual_weights, "--perceptual-weight", "1"]
    else:
        words += ["--perceptual-weight", "0", "--perceptual-weights", "null"]
    words += ["--gan-weight", "0.5", "--gan-start", "0", "--gan-warmup", "0"] if options.gan else ["--gan-weight", "0"]
    return parse(TokenizerTraining, words)


def noise(config: TokenizerTraining) -> Tensor:
    """The images of every step: uint8 (B, C, H, W)."""
    size = config.run.batch_size, config.images.channels, *config.images.size
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def product(config: TokenizerTraining) -> Step:
    """The step of the program itself."""
    built = build(config)
    assert built is not None
    run, trainer = built
    keep_memory(run.device)  # as `Run.fit` does
    trainer.begin(0)
    none = torch.full((config.run.batch_size,), -1)
    trainer.batches = itertools.repeat(Batch(noise(config), none, none, []))
    return trainer.step


class PlainAttention(nn.Module):
    """Attention with its matrix of weights."""

    def __init__(self, like: Attention) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = like.norm, like.qkv, like.out

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, H*W)
        weights = (query.transpose(1, 2) @ key / query.shape[1] ** 0.5).softmax(dim=-1)
        return x + self.out((value @ weights.transpose(1, 2)).view(x.shape))


class PlainQuantizer(nn.Module):
    """The nearest code on the unit sphere, learned by gradient (van den Oord et al. 2017, eq. 3)."""

    def __init__(self, dim: int, size: int, width: int) -> None:
        super().__init__()
        self.project_in, self.project_out = nn.Conv2d(dim, width, 1), nn.Conv2d(width, dim, 1)
        self.codes = nn.Embedding(size, width)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = F.normalize(self.project_in(z), dim=1).permute(0, 2, 3, 1)
        flat, table = z.flatten(0, 2), F.normalize(self.codes.weight, dim=1)
        distances = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
        found = F.embedding(distances.argmin(dim=1), table).view(z.shape)
        loss = F.mse_loss(found, z.detach()) + 0.25 * F.mse_loss(z, found.detach())
        return self.project_out((z + (found - z).detach()).permute(0, 3, 1, 2)), loss


def plainly(module: nn.Module) -> nn.Module:
    """A copy of a part of the product, with torch's own layers in the place of those written for speed."""
    if isinstance(module, GroupNorm):
        norm = nn.GroupNorm(module.num_groups, module.num_channels, module.eps)
        return nn.Sequential(norm, nn.SiLU()) if module.silu else norm
    module = copy.deepcopy(module)
    for name, child in list(module.named_children()):
        setattr(module, name, plainly(child))
    return PlainAttention(module) if isinstance(module, Attention) else module


class Straightforward:
    """The step as one writes it first."""

    def __init__(self, config: TokenizerTraining) -> None:
        self.config, model, codes = config, config.model, config.quantizer
        assert isinstance(codes, VQConfig)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Tokenizer(config.architecture())
        self.encoder, self.decoder = plainly(tokenizer.encoder), plainly(tokenizer.decoder)
        self.quantizer = PlainQuantizer(model.latent_dim, codes.codebook_size, codes.code_dim)
        self.model = nn.ModuleList([self.encoder, self.quantizer, self.decoder]).to(device)
        self.average = copy.deepcopy(self.model)
        self.optimizer = self.adam(self.model)
        self.distance: nn.Module | None = None
        if config.loss.perceptual_weights:
            own = PerceptualDistance(config.loss.perceptual_net, config.loss.perceptual_weights)
            self.distance = own.distance.to(device)
        if config.gan.gan_weight:
            gan, images = config.gan, config.images
            discriminator = PatchDiscriminator(images.channels, images.size, gan.gan_width, gan.gan_layers)
            self.discriminator = plainly(discriminator).to(device)
            self.discriminator_optimizer = self.adam(self.discriminator)
        self.images = to_float(noise(config).to(device))

    def adam(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.config.optimizer.lr, foreach=False)

    def __call__(self, step: int) -> None:
        images = self.images
        z_q, loss = self.quantizer(self.encoder(images))
        fakes = self.decoder(z_q)
        reconstruction = F.mse_loss(fakes, images)
        if self.distance is not None:
            reconstruction = reconstruction + self.distance(fakes, images).mean()
        loss = loss + reconstruction
        if self.config.gan.gan_weight:
            adversarial = -self.discriminator(fakes).mean()
            last = cast(nn.Parameter, self.decoder.last_weight)
            norms = [
                torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (reconstruction, adversarial)
            ]
            loss = loss + 0.5 * (norms[0] / (norms[1] + 1e-4)).detach() * adversarial
        self.update(loss, self.model, self.optimizer)
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters()):
                mean.lerp_(value, 0.001)
        if self.config.gan.gan_weight:
            real, fake = self.discriminator(images), self.discriminator(fakes.detach())
            self.update(
                0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()),
                self.discriminator,
                self.discriminator_optimizer,
            )

    def update(self, loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """One step of an optimizer, unless something is not finite."""
        if not torch.isfinite(loss):
            raise SystemExit(f"the straightforward step is not finite: {loss}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), self.config.optimizer.grad_clip or torch.inf, foreach=False)
        optimizer.step()


def assert_the_same(config: TokenizerTraining) -> None:
    """The two compute the same: the plain encoder and decoder give what the product's give, from the same weights."""
    torch.manual_seed(0)
    tokenizer, images = Tokenizer(config.architecture()).eval(), to_float(noise(config)[:1])
    with torch.no_grad():
        for part, given in ((tokenizer.encoder, images), (tokenizer.decoder, tokenizer.encoder(images))):
            plain = plainly(part).eval()
            # A norm lies one level deeper where a SiLU follows it.
            state = dict(zip(plain.state_dict(), part.state_dict().values(), strict=True))
            plain.load_state_dict(state)
            torch.testing.assert_close(part(given), plain(given), atol=1e-4, rtol=1e-4)


def beside_convolution(step: Step, index: int) -> float:
    """Share of the time of a step's operators that is not convolution, forward or backward."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiled:
        step(index)
    # Operators, to which the time of their kernels is added: names of kernels seldom say what they compute.
    found = [event for event in profiled.key_averages() if event.device_type.name == "CPU"]
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    total = sum(getattr(event, own) for event in found)
    convolution = sum(getattr(event, own) for event in found if "conv" in event.key.lower())
    # Convolutions computed as products of matrices: with all that is in them, as functions of autograd.
    convolution += sum(event.cpu_time_total for event in found if event.key in ("_AsMatrix", "_AsMatrixBackward"))
    return 1 - convolution / total


def ours(options: argparse.Namespace, precision: str, scratch: Path) -> Step:
    return product(settings(options, precision, scratch / "run"))


def straightforward(options: argparse.Namespace, scratch: Path) -> Step:
    return Straightforward(settings(options, "fp32", scratch / "run"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="vqvae", help="a preset of vqgen-train-tokenizer")
    parser.add_argument("--batch-size", type=int, help="images a step; none: the preset's")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32", "bf16"])
    parser.add_argument("--perceptual-weights", help="with LPIPS, on the backbone of this file")
    parser.add_argument("--gan", action="store_true", help="with the discriminator")
    parser.add_argument("--steps", type=int, default=10, help="steps of each, in turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = settings(options, "fp32", Path(scratch) / "run")
    assert_the_same(config)
    losses = ["LPIPS"] * (config.loss.perceptual_weight > 0) + ["GAN"] * options.gan
    shown = " + ".join([config.loss.reconstruction, *losses])
    batch, (height, width) = config.run.batch_size, config.images.size
    print(f"{options.config}: batch {batch}, {height}x{width}, {shown}, {options.threads} threads")
    for precision in options.precision:
        sides = [partial(straightforward, options), partial(ours, options, precision)]
        found = compare(sides, options.steps, options.threads, beside_convolution)
        for side, second, share in zip(("straightforward fp32", f"ours {precision}"), found.seconds, found.measured):
            print(f"{side:>20} {batch / second:9.2f} images/s, {share:6.1%} is not convolution")
        print(f"{found.ratio:34.2f} times", flush=True)


if __name__ == "__main__":
    main()
