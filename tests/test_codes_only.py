"""CodesOnly: `generate` of transformers draws what vqgen draws, from any prior's folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import SIZE, make_prior, text_part
from transformers import AutoModelForCausalLM, LogitsProcessorList

import vqgen.prior.export.program as exporting
from vqgen.errors import UserError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.export.logits_processor import CodesOnly
from vqgen.prior.model import Prior
from vqgen.prior.parts.part import Classes, Part
from vqgen.prior.parts.source import MaskedSource, PairedSource
from vqgen.prior.parts.text import Text
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.codes.format import SourceRecord

PROMPTS = ["a red shoe", "a bag", ""]


def text() -> Text:
    return text_part(PROMPTS * 3, 5)


def with_parts(folder: Path, backbone: str, depth: int, *parts: Part) -> Path:
    """A random prior of 2x3 codes with further parts in front of the class."""
    made = Prior.load(make_prior(folder / "plain", backbone, depth))
    torch.manual_seed(1)
    conditioning = Conditioning(Vocabulary(SIZE, depth, (2, 3)), [*parts, Classes(3)])
    prior = Prior(made.config, conditioning, made.image_shape, made.tokenizer_fingerprint)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(10)
    prior.save(folder, folder / "plain" / "tokenizer")
    return folder


def agrees(folder: Path, generator: Generator, conditions: dict) -> None:
    """Greedy in float32, every token of `generate` in an exported folder is that of our sampler."""
    theirs, count = AutoModelForCausalLM.from_pretrained(folder).eval(), 5
    with torch.no_grad():  # so that ids of the conditioning are often the most likely ones
        theirs.lm_head.weight[generator.vocabulary.size :] *= 20
    conditions = generator.conditioning.conditions(conditions)
    layout = generator.conditioning.layout(conditions)
    ours = generator.draw(range(count), conditions, SamplingSettings(temperature=0))
    prefix = layout.prefixes(conditions, range(count))
    processors = LogitsProcessorList([CodesOnly.from_folder(folder)])
    ask = {"do_sample": False, "pad_token_id": layout.null, "attention_mask": torch.ones_like(prefix)}
    tokens = theirs.generate(prefix, logits_processor=processors, **ask)  # its generation_config has the length
    found = layout.split(tokens)[1]
    assert torch.equal(found, generator.vocabulary.to_tokens(ours.codes))
    # The test says something: without the processor other ids are drawn.
    assert not torch.equal(found, layout.split(theirs.generate(prefix, **ask))[1])


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
@pytest.mark.parametrize("depth", [1, 3])
def test_generate_draws_what_we_draw(cli, tmp_path, backbone, depth):
    model = make_prior(tmp_path / "model", backbone, depth)
    assert cli(exporting.main, "--model", model, "--output", tmp_path / "export").code == 0
    agrees(tmp_path / "export", Generator.load(model, "cpu", "fp32"), {})
    unconditional = make_prior(tmp_path / "unconditional", backbone, depth, names=None)
    assert cli(exporting.main, "--model", unconditional, "--output", tmp_path / "other").code == 0
    agrees(tmp_path / "other", Generator.load(unconditional, "cpu", "fp32"), {})


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
@pytest.mark.parametrize("depth", [1, 2])
def test_generate_draws_what_we_draw_after_text_and_source(cli, tmp_path, backbone, depth):
    source = PairedSource(SourceRecord("degraded", [2, 3], "d" * 64, ["grey"]), 0.1)
    model = with_parts(tmp_path / "model", backbone, depth, text(), source)
    assert cli(exporting.main, "--model", model, "--output", tmp_path / "export").code == 0
    generator = Generator.load(model, "cpu", "fp32")
    sources = torch.randint(SIZE, (2, *generator.vocabulary.shape), generator=torch.Generator().manual_seed(0))
    agrees(tmp_path / "export", generator, {"text": PROMPTS, "source": sources, "class": [2, 0]})


def test_a_source_that_may_be_missing(tmp_path):
    """One processor serves sequences with and without it."""
    model = with_parts(tmp_path, "llama", 1, MaskedSource(0.5))
    conditioning, processor = Prior.load(model).conditioning, CodesOnly.from_folder(model)
    scores = torch.randn(1, conditioning.size)
    unknown = torch.full((1, 6), conditioning.masked_source.absent[0])
    for prefix in (torch.tensor([[SIZE]]), torch.cat([unknown, torch.tensor([[SIZE]])], 1)):
        masked = processor(prefix, scores)
        assert torch.equal(masked[:, :SIZE], scores[:, :SIZE]) and masked[:, SIZE:].isinf().all()
    with pytest.raises(UserError, match="input_ids"):
        processor(torch.cat([unknown[:, :3], torch.tensor([[SIZE]])], 1), scores)


def test_positions_are_those_of_each_row_and_faults_are_named():
    conditioning = Conditioning(Vocabulary(4, 2, (1, 2)), [Classes(2)])
    processor, scores = CodesOnly(conditioning), torch.zeros(1, conditioning.size)

    def legal(*ids: int) -> list[int]:
        return processor(torch.tensor([ids]), scores)[0].isfinite().nonzero()[:, 0].tolist()

    assert legal(8) == legal(10, 3, 5) == [0, 1, 2, 3] and legal(9, 0) == legal(9, 0, 4, 1) == [4, 5, 6, 7]
    for ids in ([3], [8, 9], [0, 8], [8, 0, 4, 0, 4]):
        with pytest.raises(UserError, match="input_ids"):
            legal(*ids)


def test_a_folder_that_describes_no_prior_is_one_line(tmp_path):
    model = make_prior(tmp_path / "model")
    with pytest.raises(UserError, match="tokenizer"):
        CodesOnly.from_folder(model / "tokenizer")
    with pytest.raises(UserError, match="does not exist"):
        CodesOnly.from_folder(tmp_path)


def test_the_public_name_costs_nothing_until_it_is_used():
    code = "import sys, vqgen; print('torch' in sys.modules); vqgen.CodesOnly; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "True"]
