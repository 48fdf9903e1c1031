"""A small image classifier, to measure whether samples are of the class that they were drawn as."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.artifact import fingerprint, load_artifact, refuse_others, save_artifact
from vqgen.config import from_dict
from vqgen.devices import find_device, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import atomic_path
from vqgen.files.output_folder import new_folder
from vqgen.metric import Metric
from vqgen.options import Options, Size
from vqgen.progress import progress
from vqgen.seeding import epoch_slice
from vqgen.tokenizer.data.dataset import ImageDataset, open_images, ordered_batches, training_batches
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.networks.autoencoder import ResidualBlock

from .measurement import warn
from .options import ClassifierTraining

ACCURACY = Metric("classifier_accuracy", "Classifier accuracy", "share of the samples", "higher")
"""Share of the samples that the classifier assigns to the class they were drawn as."""


@dataclass
class ClassifierConfig(Options):
    """Architecture and classes of a classifier, as recorded in vqgen.json."""

    size: list[Size]
    """Height and width."""
    channels: Size
    class_names: list[str]
    width: Size = 32
    """Channels at the first level, divisible by 8; each further level doubles them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 8:
            raise UsageError(f"--width: found {self.width}, expected a multiple of 8, the groups of its norms")


class Classifier(nn.Module):
    """Residual classifier: images (B, C, H, W) in [-1, 1] -> logits (B, classes).

    One residual block at each of 1/2, 1/4 and 1/8 of the image size.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config, self.fingerprint = config, ""
        before = width = config.width
        layers: list[nn.Module] = [nn.Conv2d(config.channels, width, 4, stride=2, padding=1)]
        for multiplier in (1, 2, 4):
            layers += [ResidualBlock(before, width * multiplier, 8, 0.1), nn.MaxPool2d(2)]
            before = width * multiplier
        self.features = nn.Sequential(*layers, nn.GroupNorm(8, before), nn.SiLU())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(before, len(config.class_names)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> features (B, 4 * width), of which the head makes the logits."""
        return self.features(images).mean(dim=(2, 3))

    def choose(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> most likely classes (B,), on the CPU."""
        return self.judge(images)[0]

    @torch.inference_mode()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (B, C, H, W) -> most likely classes (B,) and features (B, 4 * width), on the CPU."""
        pooled = self.pooled(to_float(images.to(next(self.parameters()).device)))
        return self.head(pooled).argmax(dim=1).cpu(), pooled.cpu()

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Classifier":
        """Read a model folder. Raises `UserError` if anything does not fit."""
        artifact = load_artifact(folder, "classifier")
        where = str(folder / "vqgen.json")
        config = from_dict(ClassifierConfig, artifact.description.get("classifier"), where)
        with torch.device("meta"):
            promised = cls(config).state_dict()
        refuse_others(artifact.tensors, promised, folder)
        classifier = cls(config)
        classifier.load_state_dict(artifact.tensors)
        classifier.fingerprint = artifact.fingerprint
        return classifier.eval().to(device)


def train_classifier(config: ClassifierTraining) -> None:
    """Train a classifier on real images. Raises `UserError`."""
    with new_folder(config.output):
        _train(config)


def _train(config: ClassifierTraining) -> None:
    if processes().num_processes > 1:
        raise UsageError("vqgen-eval classifier trains in one process; start it without accelerate launch")
    images = ImageConfig(config.size, config.channels, config.fit, config.flip, holdout=config.holdout)
    images.max_broken, images.workers = config.max_broken, config.workers
    train = open_images(config.data, "train", images, augment=True, replace_broken=True)
    heldout = open_images(config.data, "heldout", images)
    train.broken.report = heldout.broken.report = warn
    if not train.class_names:
        raise UserError(f"--data: {config.data} has no labels; give one whose subfolders or labels are classes")
    device = find_device(config.device)
    model = classifier_of(train, config, device)
    correct = [
        (model.choose(batch.images) == batch.labels)[batch.labels >= 0]
        for batch in ordered_batches(heldout, range(len(heldout)), 256)
    ]
    with atomic_path(config.output) as folder:
        save_artifact(folder, "classifier", {"classifier": asdict(model.config)}, model.state_dict())
    shares = torch.cat(correct).float()
    print(f"classifier: {config.output}, accuracy {shares.mean():.1%} on {len(shares)} held-out images")


def classifier_of(
    train: ImageDataset,
    config: ClassifierTraining,
    device: torch.device,
    turned: bool = False,
    remedy: str = "give a lower --lr",
) -> Classifier:
    """Train a classifier on the images of a split, as `config` says. Raises `UsageError`, see `fit_classifier`.

    With `turned` it tells by how much an image is turned (Gidaris et al. 2018), 0 for not at all, and not its class.
    """
    images = train.config
    batches = training_batches(train, config.batch_size, config.seed, 0, 0, 1)
    shown = ((batch.images, batch.labels) for batch in batches)
    names = train.class_names or []
    if turned:
        turns = range(0, 4, 1 if images.size[0] == images.size[1] else 2)
        names = [f"{90 * turn} degrees" for turn in turns]
        shown = _turned((pictures for pictures, _ in shown), turns, config.seed)
    described = ClassifierConfig(images.size, images.channels, names, config.width)
    model = fit_classifier(described, shown, config.steps, config.lr, config.seed, device, remedy=remedy)
    model.fingerprint = fingerprint(model.state_dict())
    return model


def _turned(batches: Iterable[Tensor], turns: Sequence[int], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W), each turned by one of `turns` quarters at random, with the place of that among `turns`."""
    random = torch.Generator().manual_seed(seed)
    for images in batches:
        labels = torch.randint(len(turns), (len(images),), generator=random)
        chosen = zip(images, labels.tolist(), strict=True)
        yield torch.stack([image.rot90(turns[label], (1, 2)) for image, label in chosen]), labels


def fit_classifier(
    config: ClassifierConfig,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    seed: int,
    device: torch.device,
    title: str = "classifier",
    remedy: str = "give a lower --lr",
) -> Classifier:
    """Train a new classifier, `seed` its initial weights and dropout; return it in evaluation mode.

    Raises `UsageError` where it diverges, with the `remedy`.

    Args:
        batches: at least `steps` of uint8 images (B, C, H, W) and labels (B,), -1 for none.
        lr: peak of a one-cycle schedule of AdamW.
    """
    torch.manual_seed(seed)
    model = Classifier(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    with progress(steps, title, "step", True) as bar:
        for _, (images, labels) in zip(range(steps), batches):
            labels, logits = labels.to(device), model(to_float(images.to(device)))
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1, ignore_index=-1, reduction="sum")
            (loss / (labels >= 0).sum().clamp(min=1)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UsageError(f"the classifier diverged with the learning rate {lr:g}; {remedy}")
    return model.eval()


def shuffled_batches(
    images: Tensor, labels: Tensor, batch_size: int, seed: int, flip: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of images (N, C, H, W) and labels (N,) in shuffled epochs; half of them mirrored with `flip`."""
    random = torch.Generator().manual_seed(seed)
    for step in count():
        chosen = torch.from_numpy(epoch_slice(len(images), seed, step * batch_size, batch_size))
        mirrored = torch.rand(len(chosen), 1, 1, 1, generator=random) < (0.5 if flip else 0)
        yield torch.where(mirrored, images[chosen].flip(-1), images[chosen]), labels[chosen]
