"""How many samples a classifier takes for the class they were drawn as.

    vqgen-sample --model runs/demo/prior --n 1000 --output runs/demo/thousand
    python benchmarks/class_accuracy.py --data demo --samples runs/demo/thousand

A small residual network is trained on the real training images alone; its accuracy on real held-out ones is printed
beside that on the samples, over all and class by class.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image

from vqgen.tokenizer.images import ImageConfig, open_images, ordered_batches, training_batches
from vqgen.tokenizer.layers import ResidualBlock
from vqgen.tokenizer.pixels import to_float


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> logits (B, classes)."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1)]
        for multiplier in (1, 2, 4):
            layers += [ResidualBlock(width, 32 * multiplier, 8, 0.1), nn.MaxPool2d(2)]
            width = 32 * multiplier
        self.features = nn.Sequential(*layers, nn.GroupNorm(8, width), nn.SiLU())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each uint8 image (n, C, H, W) is taken for its label (n,)."""
    with torch.inference_mode():
        parts = [model(to_float(part)).argmax(dim=1) for part in images.split(256)]
    return torch.cat(parts) == labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo", help="source of real images, as for vqgen-train-tokenizer")
    parser.add_argument("--samples", type=Path, required=True, help="folder that vqgen-sample wrote")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    about = json.loads((args.samples / "samples.json").read_text())
    paths = [args.samples / image["file"] for image in about["images"]]
    drawn = torch.stack([decode_image(str(path), ImageReadMode.UNCHANGED) for path in paths])
    wanted = torch.tensor([image["label"] for image in about["images"]])

    config = ImageConfig(size=list(drawn.shape[2:]), channels=drawn.shape[1], flip=True)
    train = open_images(args.data, "train", config, augment=True, replace_broken=True)
    heldout = open_images(args.data, "heldout", config)
    names = train.class_names or []
    torch.manual_seed(args.seed)
    model = Classifier(config.channels, len(names)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=args.steps)
    for _, batch in zip(range(args.steps), training_batches(train, args.batch_size, args.seed, 0, 0, 1, config)):
        loss = F.cross_entropy(model(to_float(batch.images)), batch.labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()

    real = list(ordered_batches(heldout, range(len(heldout)), 256, config))
    on_real = correct(model, torch.cat([b.images for b in real]), torch.cat([b.labels for b in real]))
    on_drawn = correct(model, drawn, wanted)
    print(f"real held-out images: {on_real.float().mean():.1%} of {len(on_real)}")
    print(f"samples:              {on_drawn.float().mean():.1%} of {len(on_drawn)}")
    for label, name in enumerate(names):
        chosen = on_drawn[wanted == label]
        if len(chosen):
            print(f"  {name:<16} {chosen.float().mean():.1%} of {len(chosen)}")


if __name__ == "__main__":
    main()
