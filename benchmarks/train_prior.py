"""Time the training step of vqgen-train-prior and a loop like that of nanoGPT's train.py.

    python benchmarks/train_prior.py --codes runs/demo/codes

Both train a network of the same size on the same codes with the same batch and precision. The loop has batches from
memory, autocast, cross-entropy, backward, clipping, AdamW with weight decay on matrices only, the learning rate set by
hand, and the loss read every ten steps. vqgen's step also drops labels, averages the weights and checks for non-finite
values. The loop's network is that of transformers with its own dropout, which a Llama has on the weights of attention
alone; with --peer prior it is vqgen's `Prior`, whose dropout stands where GPT-2 has it.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from turns import Step, compare

from vqgen.config import parse
from vqgen.devices import keep_memory, precision_of
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.model import Prior, backbone_config
from vqgen.prior.train import PriorTraining
from vqgen.prior.trainer import build
from vqgen.tokenizer.codes.format import CodeFiles

STEPS = 1000  # length of the learning-rate schedule


def settings(options: argparse.Namespace, output: Path) -> PriorTraining:
    words = ["--codes", str(options.codes), "--output", str(output), "--steps", str(STEPS)]
    for name in ("dim", "layers", "heads", "batch_size", "precision", "dropout", "backbone"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return parse(PriorTraining, words)


def ours(options: argparse.Namespace, scratch: Path) -> Step:
    """The step of vqgen-train-prior."""
    built = build(settings(options, scratch / "run"))
    assert built is not None
    run, trainer = built
    keep_memory(run.device)  # as `Run.fit` does
    trainer.begin(0)

    def step(index: int) -> None:
        logged = trainer.step(index)
        if index % 10 == 0:
            logged["loss"].item()

    return step


class Loop:
    """The nanoGPT-like loop."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.config = settings(options, scratch)
        codes = CodeFiles(options.codes, "train")
        self.conditioning = Conditioning.for_files(codes)
        sequences = Sequences(codes, self.conditioning)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data = torch.cat([batch.tokens for batch in sequences.ordered(range(min(len(sequences), 20000)), 1000)])
        self.model: nn.Module = self.network(options.peer).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=self.device.type == "cuda")
        kind = precision_of(options.precision, self.device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
        self.loss: Tensor

    def network(self, peer: str) -> nn.Module:
        model = self.config.model
        if peer == "prior":
            return Prior(model, self.conditioning, (3, 32, 32), "")
        config = backbone_config(model, self.conditioning)
        if model.model_type != "gpt2":
            config.attention_dropout = model.dropout
        return AutoModelForCausalLM.from_config(config)

    def logits(self, tokens: Tensor) -> Tensor:
        found = self.model(tokens)
        return found if isinstance(self.model, Prior) else found.logits

    def __call__(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        rows = torch.randint(len(self.data), (self.config.run.batch_size,))
        batch = self.data[rows].to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.conditioning.of_codes(self.logits(batch[:, :-1]))
            self.loss = F.cross_entropy(logits.flatten(0, 1), self.conditioning.split(batch)[1].flatten())
        self.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            self.loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=Path, required=True, help="folder of code files")
    parser.add_argument("--backbone", choices=["llama", "qwen3", "gpt2"], default="llama")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--peer", choices=["transformers", "prior"], default="transformers", help="network of the loop")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--steps", type=int, default=15, help="steps of each, in turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    vocabulary = Conditioning.for_files(CodeFiles(options.codes, "train")).vocabulary
    print(f"{options.backbone}, {options.dim} wide, {options.layers} layers, {vocabulary.length} codes, "
          f"batch {options.batch_size}, dropout {options.dropout}, {options.threads} threads, "
          f"the loop's network of {options.peer}")  # fmt: skip
    found = compare([partial(Loop, options), partial(ours, options)], options.steps, options.threads)
    for side, seconds in zip(("nanoGPT-style loop", "vqgen"), found.seconds):
        rate = options.batch_size / seconds
        print(f"{side:>20} {rate:8.1f} images/s {rate * vocabulary.length:8.0f} tokens/s")
    print(f"{found.ratio:29.2f} times")


if __name__ == "__main__":
    main()
