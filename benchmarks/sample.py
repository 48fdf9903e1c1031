"""Cached decoding of vqgen against `transformers.generate` on the same random model, and against the machine.

    python benchmarks/sample.py --batch-sizes 64 1

Both draw from the whole distribution at temperature 1. `generate` runs as it comes: its default cache and the attention
that the model was loaded with. `guided` is vqgen with a guidance scale of 3: twice the rows. Runs alternate and the
best of each counts, since other work on the machine only slows. On CUDA `launched` is vqgen without CUDA graphs, whose
kernels are launched one by one.

The floor is the larger of two times: the operations of all tokens at the machine's matrix rate, and the bytes of
weights, keys and values that each token must read at its copy bandwidth (read and written); both are measured here.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from vqgen.devices import find_device, matrix_rate, precision_of
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import backbone_config
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.decoding.cached_transformer import CachedTransformer
from vqgen.sampling.decoding.generate import Contrast, generate, image_uniforms
from vqgen.sampling.settings import SamplingSettings


def seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds that `work` takes, the device's part included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second read and written in copying a tensor larger than any cache."""
    source = torch.ones(2**27, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(8))


def floor(shape: PriorConfig, weights: int, length: int, batch: int, size: int, rate: float, bandwidth: float) -> float:
    """Seconds below which no decoding of `batch` images can be; `size` is that of a number in bytes."""
    operations = batch * length * (2 * weights + 2 * shape.layers * shape.dim * length)  # half the cache on average
    cache = batch * shape.layers * 2 * shape.dim * length / 2
    return max(operations / rate, length * size * (weights + cache) / bandwidth)


@dataclass
class Measured:
    """What came of one number of images drawn at once."""

    batch: int
    seconds: dict[str, float]
    """Best seconds of each side, for all images."""
    floor: float
    """Seconds below which no decoding can be."""


def compared(
    shape: PriorConfig,
    vocabulary: Vocabulary,
    device: torch.device,
    precision: str,
    batches: Sequence[int],
    repeats: int,
) -> Iterator[Measured]:
    """Time all sides on one random model, at each number of images drawn at once; say what the machine allows."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    conditioning = Conditioning(vocabulary, [Classes(10)])
    torch.manual_seed(0)

    def model_with(attention: str) -> torch.nn.Module:
        config = backbone_config(shape, conditioning)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.eval().to(device)

    theirs = model_with("sdpa")
    ours = model_with("eager" if device.type == "cpu" else "sdpa")
    ours.load_state_dict(theirs.state_dict())
    length, count = vocabulary.length, sum(p.numel() for p in ours.parameters())
    # One each: a decoder keeps the cache and the graphs of one number of rows.
    decoders = {name: CachedTransformer(ours, length) for name in ("vqgen", "guided")}  # type: ignore[arg-type]
    if device.type == "cuda":
        decoders["launched"] = CachedTransformer(ours, length, graphs=False)  # type: ignore[arg-type]
    allowed = [vocabulary.allowed(position) for position in range(length)]
    print(f"{shape.backbone}, {count / 1e6:.1f} M parameters, {length} codes of {vocabulary.codebook_size}, "
          f"{precision} on {device}, {torch.get_num_threads()} threads")  # fmt: skip
    rate, bandwidth = matrix_rate(device, precision), copy_bandwidth(device)
    print(f"matrix rate {rate / 1e9:.0f} GFLOP/s, copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    embedded = theirs.get_input_embeddings().weight.numel()  # type: ignore[operator, union-attr]

    for batch in batches:
        prompt = conditioning.prefixes(conditioning.conditions(), range(batch))
        uniforms = image_uniforms(0, range(batch), length)
        null = torch.full_like(prompt, conditioning.null)

        def drawn(name: str, prompt=prompt, uniforms=uniforms, null=null) -> torch.Tensor:
            scale = 3.0 if name == "guided" else 1.0
            contrasts = [Contrast(null, scale)] if name == "guided" else []
            settings = SamplingSettings(guidance_scale=scale)
            return generate(decoders[name], prompt, allowed, uniforms, settings, contrasts).tokens

        def transformers(prompt: torch.Tensor = prompt) -> torch.Tensor:
            return theirs.generate(  # type: ignore[operator]
                prompt.to(device),
                attention_mask=torch.ones_like(prompt, device=device),
                do_sample=True,
                top_k=0,
                max_new_tokens=length,
                min_new_tokens=length,
                pad_token_id=conditioning.null,
            )

        works = {name: partial(drawn, name) for name in decoders} | {"transformers": transformers}
        best = dict.fromkeys(works, float("inf"))
        for work in works.values() if device.type == "cuda" else []:
            work()  # warms up kernels, and captures graphs
        for _ in range(repeats):
            for name, work in works.items():
                best[name] = min(best[name], seconds(work, device))
        least = floor(shape, count - embedded, length, batch, dtype.itemsize, rate, bandwidth)
        yield Measured(batch, best, least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=["llama", "qwen3", "gpt2"], default="llama")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--grid", type=int, nargs=2, default=[16, 16], metavar=("H", "W"), help="codes an image")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    device = find_device(arguments.device)
    precision = precision_of(arguments.precision, device).replace("no", "fp32")
    vocabulary = Vocabulary(arguments.codebook_size, 1, tuple(arguments.grid))
    shape = PriorConfig(arguments.backbone, arguments.dim, arguments.layers, arguments.heads)
    for found in compared(shape, vocabulary, device, precision, arguments.batch_sizes, arguments.repeats):
        batch, best = found.batch, found.seconds
        for name, took in {**best, "floor": found.floor}.items():
            print(
                f"batch {batch:3d}  {name:12s} {took:7.2f} s {batch / took:8.2f} images/s "
                f"{batch * vocabulary.length / took:9.0f} tokens/s  {found.floor / took:5.0%} of the floor's rate"
            )
        print(
            f"batch {batch:3d}  against transformers {best['transformers'] / best['vqgen']:.2f}, "
            f"guidance costs {best['guided'] / best['vqgen']:.2f}"
        )


if __name__ == "__main__":
    main()
