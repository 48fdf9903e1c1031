"""Cached decoding of vqgen against `transformers.generate` on the same random model, and against the machine.

    python benchmarks/sample.py --batch-sizes 64 1

Both draw from the whole distribution at temperature 1. `generate` runs as it comes: its default cache and the attention
that the model was loaded with. `guided` is vqgen with a guidance scale of 3: twice the rows. Runs alternate and the
best of each counts, since other work on the machine only slows; the slowest shows how much. On CUDA `launched` is vqgen
without CUDA graphs, whose kernels are launched one by one.

The floor is the larger of two times: the operations of all tokens at the machine's matrix rate, and the bytes of
weights, keys and values that each token must read at its copy bandwidth (read and written); both are measured here.

The last lines are one call of `CachedTransformer.feed` with 8 tokens (or `--feed`; 0 leaves them out) and with one,
each after 128 tokens, in turns: what drawing in parallel would pay for a step. On a CPU both are computed by one
thread, as `generate` computes a batch.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from vqgen.devices import find_device, growing_attention, matrix_rate, precision_of
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import backbone_config
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.decoding.cached_transformer import CachedTransformer
from vqgen.sampling.decoding.generate import Contrast, generate, image_uniforms
from vqgen.sampling.decoding.threads import one_thread
from vqgen.sampling.settings import SamplingSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BEFORE = 128
"""Tokens that are fed before those of which `feeding` measures the time."""
TURNS = 10
"""Of `feeding` for each of the repeats, as a call takes milliseconds."""


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


def random_model(
    shape: PriorConfig, conditioning: Conditioning, device: torch.device, precision: str, attention: str
) -> torch.nn.Module:
    """A model of random weights in evaluation mode."""
    config = backbone_config(shape, conditioning)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    return model.eval().to(device)


@dataclass
class Measured:
    """What came of one number of images drawn at once."""

    batch: int
    seconds: dict[str, float]
    """Best seconds of each side, for all images."""
    slowest: dict[str, float]
    """Most seconds of each side."""
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
    conditioning = Conditioning(vocabulary, [Classes(10)])
    torch.manual_seed(0)

    made = partial(random_model, shape, conditioning, device, precision)
    theirs, ours = made("sdpa"), made("eager" if device.type == "cpu" else "sdpa")
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
            with growing_attention(device):
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
        taken = {name: list[float]() for name in works}
        for work in works.values() if device.type == "cuda" else []:
            work()  # warms up kernels, and captures graphs
        for _ in range(repeats):
            for name, work in works.items():
                taken[name].append(seconds(work, device))
        size = DTYPES[precision].itemsize
        least = floor(shape, count - embedded, length, batch, size, rate, bandwidth)
        best, slowest = ({name: of(times) for name, times in taken.items()} for of in (min, max))
        yield Measured(batch, best, slowest, least)


@dataclass
class Fed:
    """Seconds of a call of `CachedTransformer.feed`, by the number of tokens."""

    batch: int
    best: dict[int, float]
    slowest: dict[int, float]


@torch.inference_mode()
def feeding(decoder: CachedTransformer, batch: int, count: int, ids: tuple[int, int], repeats: int) -> Fed:
    """Time calls with `count` tokens and with one, in turns, each after `BEFORE` tokens of `batch` sequences."""
    device = decoder.model.device
    tokens = torch.randint(ids[0], ids[1], (batch, BEFORE + count), device=device)
    decoder.start(batch)
    decoder.feed(tokens[:, :BEFORE], ids)

    def feed(size: int) -> torch.Tensor:
        decoder._batch.fed = BEFORE  # what the call before fed is overwritten
        return decoder.feed(tokens[:, BEFORE : BEFORE + size], ids)

    took: dict[int, list[float]] = {count: [], 1: []}
    for turn in range(1 + TURNS * repeats):
        for size, times in took.items():
            spent = seconds(partial(feed, size), device)
            times += [spent] if turn else []  # the first warms up
    return Fed(batch, {n: min(times) for n, times in took.items()}, {n: max(times) for n, times in took.items()})


def fed(
    shape: PriorConfig,
    codebook_size: int,
    device: torch.device,
    precision: str,
    batches: Sequence[int],
    count: int,
    repeats: int,
) -> Iterator[Fed]:
    """`feeding` of a random model at each number of sequences; on a CPU in one thread, as of `generate`."""
    vocabulary = Vocabulary(codebook_size, 1, (1, BEFORE + count))
    torch.manual_seed(0)
    attention = "eager" if device.type == "cpu" else "sdpa"
    model = random_model(shape, Conditioning(vocabulary, [Classes(10)]), device, precision, attention)
    decoder = CachedTransformer(model, vocabulary.length)  # type: ignore[arg-type]
    for batch in batches:
        with one_thread() if device.type == "cpu" else nullcontext():
            found = feeding(decoder, batch, count, vocabulary.allowed(0), repeats)
        yield found


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
    parser.add_argument("--feed", type=int, default=8, help="tokens of a call that is compared with one token; 0: none")
    arguments = parser.parse_args()

    device = find_device(arguments.device)
    precision = precision_of(arguments.precision, device).replace("no", "fp32")
    vocabulary = Vocabulary(arguments.codebook_size, 1, tuple(arguments.grid))
    shape = PriorConfig(arguments.backbone, arguments.dim, arguments.layers, arguments.heads)
    for found in compared(shape, vocabulary, device, precision, arguments.batch_sizes, arguments.repeats):
        batch, best = found.batch, found.seconds
        for name, took in {**best, "floor": found.floor}.items():
            most = f", slowest {found.slowest[name]:.2f} s" if name in found.slowest else ""
            # The floor is that of one row an image; guidance computes two.
            share = "" if name == "guided" else f"  {found.floor / took:5.0%} of the floor's rate"
            print(
                f"batch {batch:3d}  {name:12s} {took:7.2f} s {batch / took:8.2f} images/s "
                f"{batch * vocabulary.length / took:9.0f} tokens/s{share}{most}"
            )
        print(
            f"batch {batch:3d}  against transformers {best['transformers'] / best['vqgen']:.2f}, "
            f"guidance costs {best['guided'] / best['vqgen']:.2f}"
        )
    if arguments.feed < 1:
        return
    sizes = arguments.codebook_size, device, precision, arguments.batch_sizes, arguments.feed, arguments.repeats
    for each in fed(shape, *sizes):
        calls = [f"{n}: {1e3 * each.best[n]:.2f} ms (slowest {1e3 * each.slowest[n]:.2f})" for n in each.best]
        ratio = each.best[arguments.feed] / each.best[1]
        print(f"batch {each.batch:3d}  tokens a feed after {BEFORE}: {', '.join(calls)}; {ratio:.2f} times")


if __name__ == "__main__":
    main()
