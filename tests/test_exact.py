"""Image i is the same, bit for bit, in every batch and at every number of threads of a CPU.

Priors: the one in the package, and one of the demo's shape with random weights. Logits are compared, not only codes: a
last bit turns a code once in many thousand images.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.decoding import generate
from vqgen.sampling.decoding.generate import Drawn, image_uniforms
from vqgen.sampling.decoding.linear import ROWS, Linear
from vqgen.sampling.decoding.threads import on_threads
from vqgen.sampling.drawing import Recipe
from vqgen.sampling.generator import DEFAULT, Generator
from vqgen.sampling.known import Known
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import VQConfig

SIZES = (1, 7, 16, 20, 32, 40, 64, 128)
COUNT = max(SIZES)
LENGTH = 64
TAIL = 3  # codes that completions draw
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

precisions = pytest.mark.parametrize("precision", DTYPES)
priors = pytest.mark.parametrize("name", ["package", "demo"])
guidance = pytest.mark.parametrize("scale", [1.0, 3.0])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Give the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the NLL of an image a sum, exact in every order, of the bits of all logits it was drawn from."""
    original = generate.decode_one

    def marked(
        logits: Tensor, start: int, uniforms: Tensor, settings: SamplingSettings, scales: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor]:
        tokens, nats = original(logits, start, uniforms, settings, scales)
        bits = logits.contiguous().view(torch.int32).long()
        marks = (bits * torch.arange(1, bits.shape[1] + 1)).sum(1) % 1_000_003
        return tokens, (marks.view(-1, len(tokens)).sum(0) + nats.view(torch.int32) % 1009).double()

    monkeypatch.setattr(generate, "decode_one", marked)


@cache
def generator_of(name: str, precision: str) -> Generator:
    if name == "package":
        return Generator.load(DEFAULT, "cpu", precision)
    torch.manual_seed(0)
    # As configs/demo-tokenizer.yaml and demo-prior.yaml say.
    architecture = VQGANConfig(64, 48, [1, 2], 2, blocks=1, attention=False, groups=8)
    tokenizer = Tokenizer(TokenizerConfig([32, 32], 1, architecture, VQConfig(codebook_size=512, code_dim=8)))
    conditioning = Conditioning(Vocabulary(512, 1, (8, 8)), [Classes(10)])
    prior = Prior(PriorConfig("llama", 192, 4, 3), conditioning, (1, 32, 32), "demo")
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(5)  # type: ignore[operator, union-attr]
    return Generator(prior, tokenizer, torch.device("cpu"), precision)


def tail_of(generator: Generator) -> Known:
    """All codes but the last `TAIL` of seven images."""
    codes = torch.randint(512, (7, 8, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(LENGTH).view(1, 8, 8) < LENGTH - TAIL
    return Known(codes, mask.expand(7, 8, 8), generator.vocabulary)


@precisions
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(384, 1024), (1152, 384), (256, 704), (192, 512), (512, 192), (40, 24), (33, 17)])
def test_a_row_of_a_product_does_not_depend_on_the_others(shape, bias, precision):
    """Nor on its place; in sums that are nothing but rounding, so that another order shows."""
    torch.manual_seed(0)
    half = torch.randn(shape[0] + ROWS, shape[1] // 2).to(DTYPES[precision])
    both = torch.cat([half, half, half[:, : shape[1] % 2]], 1)[:, torch.randperm(shape[1])]
    weight = both[: shape[0]] * torch.randn(shape[1]).sign().to(both.dtype)
    torch.set_num_threads(1)
    linear = Linear(weight, torch.zeros(shape[0], dtype=both.dtype) if bias else None)
    y, x = both[shape[0] :], torch.zeros(ROWS, shape[0], dtype=both.dtype)
    whole, added = linear(y), linear.added(x, y)
    assert whole.unique().numel() > 100
    for rows in range(1, ROWS):
        for part in (slice(rows), slice(ROWS - rows, ROWS)):
            assert torch.equal(linear(y[part]), whole[part]), rows
            assert torch.equal(linear.added(x[part], y[part]), added[part]), rows
    assert torch.equal(linear(y.roll(5, 0)), whole.roll(5, 0))
    # More rows than one product takes, as in a prompt.
    assert torch.equal(linear(torch.cat([y, y, y])), torch.cat([whole] * 3))


@priors
@precisions
@guidance
def test_an_image_depends_on_no_batch_and_no_number_of_threads(name, precision, scale, seen):
    """Of the first codes; the slow test below draws all."""
    generator = generator_of(name, precision)
    settings, conditioning = SamplingSettings(guidance_scale=scale, top_p=0.95), generator.conditioning
    allowed = [generator.vocabulary.allowed(position) for position in range(3)]
    prefix = conditioning.prefixes(conditioning.conditions(), range(COUNT))
    uniforms = image_uniforms(3, range(COUNT), 3)

    def drawn(part: slice) -> Drawn:
        contrasts = [generate.Contrast(conditioning.without(prefix[part]), scale)] if scale != 1 else []
        return generate.generate(generator.decoder, prefix[part], allowed, uniforms[part], settings, contrasts)

    whole = drawn(slice(COUNT))
    assert whole.nats.unique().numel() > 20  # images alike would prove little
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in SIZES:
            for part in (slice(size), slice(COUNT - size, COUNT)):
                found = drawn(part)
                assert torch.equal(found.tokens, whole.tokens[part]), (threads, size)
                assert torch.equal(found.nats, whole.nats[part]), (threads, size)


@pytest.mark.slow
@priors
@precisions
@guidance
def test_128_whole_images_depend_on_no_batch_and_no_number_of_threads(name, precision, scale, seen):
    generator, settings = generator_of(name, precision), SamplingSettings(guidance_scale=scale)
    codes, marks = generator.draw_codes(range(COUNT), Recipe(None, settings, 0, COUNT))
    images = generator.decode(codes)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in SIZES:
            count = min(size + 7, COUNT)  # a batch and a part of the next
            found = generator.draw_codes(range(count), Recipe(None, settings, 0, size))
            assert torch.equal(found[0], codes[:count]) and torch.equal(found[1], marks[:count]), (threads, size)
        assert torch.equal(generator.decode(codes), images)


@precisions
def test_nor_does_an_oversampled_completion(precision, seen):
    generator = generator_of("demo", precision)
    settings, known = SamplingSettings(oversample=1.25), tail_of(generator)
    whole = None
    for threads, size in ((1, 40), (1, 7), (2, 16), (2, 128)):
        torch.set_num_threads(threads)
        found = generator.draw_codes(range(2, 5), Recipe({"class": [1]}, settings, 0, size), known)
        whole = whole or found
        assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1]), (threads, size)


@priors
def test_nor_do_pixels_and_the_codes_of_given_images(name):
    generator = generator_of(name, "fp32")
    codes = torch.randint(512, (21, 8, 8), generator=torch.Generator().manual_seed(0))
    images = generator.decode(codes)
    again = generator.encode(images)
    assert images.unique().numel() > 20 and again.unique().numel() > 20
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for part in (slice(1), slice(7, 14), slice(21)):
            assert torch.equal(generator.decode(codes[part]), images[part]), (threads, part)
            assert torch.equal(generator.encode(images[part]), again[part]), (threads, part)


def test_an_odd_shape_is_no_exception(seen):
    """No width fills a vector: elements at the end of an array are computed in another way."""
    torch.manual_seed(0)
    conditioning = Conditioning(Vocabulary(51, 1, (2, 2)), [Classes(3)])
    shape = PriorConfig("gpt2", 36, 2, 2, hidden_dim=45)
    prior = Prior(shape, conditioning, (1, 32, 32), "odd")
    for precision in DTYPES:
        generator = Generator(prior, generator_of("demo", "fp32").tokenizer, torch.device("cpu"), precision)
        codes, marks = generator.draw_codes(range(70), Recipe(batch_size=70))
        for size in (1, 17, 33, 64):
            found = generator.draw_codes(range(70), Recipe(batch_size=size))
            assert torch.equal(found[0], codes) and torch.equal(found[1], marks), (precision, size)


def test_each_thread_computes_alone():
    torch.set_num_threads(3)
    assert on_threads(lambda number: (number, torch.get_num_threads()), range(7)) == [(n, 1) for n in range(7)]
    assert torch.get_num_threads() == 3
    # Also in a thread of the pool, which has one.
    assert on_threads(lambda _: on_threads(lambda number: number + 1, range(3)), range(2)) == [[1, 2, 3]] * 2


def test_an_error_in_one_thread_drops_what_has_not_begun():
    torch.set_num_threads(2)
    begun: list[int] = []
    go = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise KeyboardInterrupt
        go.wait(600)

    with pytest.raises(KeyboardInterrupt):
        on_threads(work, range(20))
    go.set()
    on_threads(lambda number: number, range(2))  # behind all that was left
    assert len(begun) <= 3, "the one that raised, and one on each thread"


def test_an_error_in_one_thread_ends_the_others():
    generator = generator_of("demo", "fp32")
    torch.set_num_threads(2)
    counts: list[int] = []

    def stop(tokens: Tensor) -> None:
        counts.append(len(tokens))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.draw_codes(range(128), Recipe(batch_size=128, on_token=stop))
    assert sum(counts) <= 128, "at most one position of each image"
