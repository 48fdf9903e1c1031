"""vqgen-report: what a page says of runs written by hand, that it needs nothing else, and that a browser shows it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import write_codes
from torchvision.io import write_png

import vqgen.app.demo as demonstration
import vqgen.evaluation.report.program as reporting
from vqgen.config import as_dict, parse
from vqgen.evaluation.report import charts
from vqgen.evaluation.report.page import duration
from vqgen.prior.train import PriorTraining
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import QUANTIZERS, VQConfig
from vqgen.tokenizer.train import TokenizerTraining

SIZE = 12
CHROMIUM = shutil.which("chromium")


def picture(path: Path, shade: int, size: tuple[int, int] = (40, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(torch.full((3, *size), shade, dtype=torch.uint8), str(path))


def history(folder: Path, rows: Sequence[dict[str, Any]], tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def make_tokenizer(folder: Path, psnr: float = 24.0, words: Sequence[str] = (), model: bool = True) -> Path:
    """A tokenizer run of 40 steps, as if trained."""
    folder.mkdir(parents=True)
    config = parse(TokenizerTraining, ["--data", "demo", "--output", str(folder), "--steps", "40", *words])
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    rows: list[dict[str, Any]] = []
    for step in (10, 20, 30, 40):
        losses = {"train/reconstruction": 1 / step, "train/perplexity": 6.0 + step / 20, "train/loss": 2 / step}
        rows.append({"step": step, **losses, "train/per_second": 64.0, "train/lr": 1e-3, "train/grad_norm": "nan"})
        if step % 20 == 0:
            rows.append({"step": step, "heldout/psnr": psnr - 2 + step / 20, "heldout/perplexity": 7.0})
            picture(folder / f"images/step-{step:08d}.png", step)
    history(folder, rows)
    if model:
        torch.manual_seed(0)
        sizes = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
        quantizer = VQConfig(codebook_size=SIZE, code_dim=4)
        Tokenizer(TokenizerConfig([4, 6], 3, sizes, quantizer)).save(folder)
        (folder / "finished.json").write_text('{"steps": 40}')
    return folder


def make_prior(folder: Path, words: Sequence[str] = (), best: float = 2.0) -> Path:
    """A prior run, still training."""
    folder.mkdir(parents=True)
    config = parse(PriorTraining, ["--codes", "runs/codes", "--output", str(folder), "--steps", "900", *words])
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    rows: list[dict[str, Any]] = [{"step": 50, "train/loss": 3.0, "train/per_second": 100.0}]
    for step, nats in ((100, best), (200, best + 0.5)):
        rows += [{"step": step, "train/loss": nats - 0.1, "train/per_second": 100.0, "train/mfu": 0.3}]
        rows += [{"step": step, "heldout/nats_per_token": nats, "heldout/bits_per_dimension": nats / 10}]
    rows.append({"step": 200, "health": "prior overfits", "message": "prior overfits: 2.5 after 2; raise --dropout"})
    history(folder, rows)
    picture(folder / "images/step-00000100.png", 9)
    return folder


def make_codes(folder: Path, tokenizer: Path) -> Path:
    """Code files as if this tokenizer had made them."""
    folder.mkdir()
    write_codes(folder, size=SIZE)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = json.loads((tokenizer / "vqgen.json").read_text())["fingerprint"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def make_demo(folder: Path) -> Path:
    """tokenizer/, codes/, prior/ and samples/."""
    make_tokenizer(folder / "tokenizer")
    make_codes(folder / "codes", folder / "tokenizer")
    make_prior(folder / "prior")
    picture(folder / "samples/grid.png", 200)
    about = {"n": 20, "class_names": ["cat", "dog", "cow"], "settings": {"temperature": 0.5, "min_p": 0.1}}
    about["images"] = [{"class": ["cat", None, "dog"][i % 3], "text": f"no {i}" if i % 3 else None} for i in range(20)]
    (folder / "samples/samples.json").write_text(json.dumps(about))
    return folder


class Page(HTMLParser):
    """What a reader meets: texts, pictures, headings, and everything that would be fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def show(cli, tmp_path):
    """Call the program and read its page."""

    def call(*words: Any) -> Page:
        output = tmp_path / "page.html"
        result = cli(reporting.main, *words, "--output", output)
        assert result.code == 0, result.err
        assert result.out == f"look at {output}\n"
        return Page(output)

    return call


def test_a_tokenizer(show, tmp_path):
    run = make_tokenizer(tmp_path / "run")
    page = show(run)
    about = [text for text in page.texts if text.startswith("Perplexity of the codes: ")]
    described = "training from 6.5 at step 10 to 8 at step 40; held-out from 7 at step 20 to 7 at step 40."
    assert about == [f"Perplexity of the codes: {described}"]
    for text in ("Finished, 40 steps, 64 images a second, 40 s of training steps", "PSNR dB 24", "Reconstruction loss"):
        assert text in page.text
    assert "Gradient norm" not in page.text, "none of its numbers is one"
    assert "run.steps 40" in page.text and "no code files of this tokenizer" in page.text
    assert "The machine was not recorded" in page.text and "samples" not in page.text.lower()
    steps = [image["alt"] for image in page.named("img")]
    assert [alt.rpartition(" ")[2] for alt in steps if alt] == ["20", "40"]


def test_the_codebook(show, tmp_path):
    run = make_tokenizer(tmp_path / "run")
    folder = make_codes(tmp_path / "codes", run)
    page = show(run, "--codes", folder)
    files = CodeFiles(folder, "train")
    codes = files.gather(range(len(files)), 0).flatten()
    counts = torch.bincount(codes, minlength=SIZE)
    assert f"{int((counts > 0).sum())} of {SIZE} codes in use" in page.text and "9 images (train)" in page.text
    painted = [
        (image["alt"] or "").rpartition(" ")[2] for image in page.named("img") if "code " in (image["alt"] or "")
    ]
    order = counts.argsort(descending=True, stable=True).tolist()
    assert [int(code) for code in painted] == [*order[:6], *order[:5:-1]]


def test_codes_that_are_used_unevenly_fall_into_their_bars():
    from vqgen.evaluation.codebook import Usage
    from vqgen.evaluation.report.codebook import LABELS, usage_charts

    usage = Usage(1, ["train"], torch.tensor([[0, 0, 1, 7, 8, 16, 64, 0]]))  # even use: 12
    bars, ranks = usage_charts(usage)
    values = {bar.label: int(bar.value) for bar in bars.bars}
    assert values == {**dict.fromkeys(LABELS, 0), "never": 3, "<⅛": 1, "½–1": 2, "1–2": 1, "4–8": 1}
    assert usage.metrics["codes_used"] == 5 and len(ranks.lines[0].points.split()) == 5
    assert Usage(1, ["train"], torch.full((2, 8), 3)).metrics["perplexity"] == pytest.approx(8)


@pytest.mark.parametrize("kind", ["residual", "product"])
def test_codes_of_several_depths_are_painted(tmp_path, kind):
    from vqgen.evaluation.codebook import Usage
    from vqgen.evaluation.report.codebook import code_images

    sizes = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    quantizer = QUANTIZERS[kind](depth=2, codebook_size=SIZE, code_dim=4)
    tokenizer = Tokenizer(TokenizerConfig([4, 6], 3, sizes, quantizer))
    counts = torch.arange(2 * SIZE).view(2, SIZE)
    most, least = code_images(tokenizer, Usage(1, ["train"], counts))
    assert [(each.depth, each.code) for each in most] == [(1, code) for code in reversed(range(SIZE))]
    assert [(each.depth, each.code) for each in least] == [(0, code) for code in range(SIZE)]
    assert (most[0].uses, most[0].image.width, most[0].image.height) == (23, 6, 4)


def test_a_prior(show, tmp_path):
    page = show(make_prior(tmp_path / "prior"))
    for text in (
        "Not finished: step 200 of 900",
        "Step 200 prior overfits: 2.5 after 2; raise --dropout",
        "There is no vqgen.json yet",
        "At step 100 Negative log-likelihood nats per token 2 Bits per dimension (rate of the codes) bits 0.2",
        "Negative log-likelihood: training from 3 at step 50 to 2.4 at step 200; held-out from 2 at step 100 to 2.5 at",
        "Model-FLOPs utilisation",
    ):
        assert text in page.text, text
    assert "no health findings" not in page.text and "Receipts" not in page.text


def test_a_demo_is_shown_as_a_whole_with_its_samples_first(show, tmp_path):
    page = show(make_demo(tmp_path / "demo"))
    order = [page.text.index(text) for text in ("20 generated images", "Last validation", "Samples over time")]
    assert order == sorted(order)
    assert "cow" not in page.text, "no image is of it"
    prompts = ", ".join(f"“no {i}”" for i in range(15) if i % 3)
    for text in (
        f"images; drawn of {prompts} and 3 more; classes cat, dog.",
        "temperature 0.5, min p 0.1",
        "codes in use",
    ):
        assert text in page.text
    assert (page.named("img")[0]["alt"] or "").startswith("A grid of 20")


def test_receipts_of_a_run_are_shown(show, tmp_path):
    prior, mark = make_prior(tmp_path / "prior"), {"kind": "prior", "fingerprint": "a" * 64}
    (prior / "vqgen.json").write_text(json.dumps(mark))
    receipt = {
        "kind": "vqgen receipt",
        "program": "likelihood",
        "options": {"split": "heldout", "unconditional": True},
        "fingerprints": {"prior": "a" * 64},
        "counts": {"images": 9},
        "metrics": {"nats_per_token": 1.75, "perplexity": 5.75, "nats_by_class": {"cat": 1.5}},
        "environment": {},
        "details": {"nats_by_position": [[1.0, 2.0], [3.0, 4.0]]},
    }
    (prior / "likelihood-heldout.json").write_text(json.dumps(receipt))
    (prior / "other.json").write_text(json.dumps({**receipt, "fingerprints": {"prior": "b" * 64}}))
    old = {name: value for name, value in receipt.items() if name not in ("metrics", "details")}
    (prior / "old.json").write_text(json.dumps({**old, "figures": {"bits_per_dimension": 0.125}}))
    page = show(prior)
    for text in (
        "vqgen-eval likelihood 9 images; split heldout; without their classes",
        "Negative log-likelihood nats per token 1.75",
        "Negative log-likelihood, cat nats per token 1.5",
        "(rate of the codes) bits 0.125",
        "other.json",
    ):
        assert text in page.text, text
    maps = [image for image in page.named("img") if (image["alt"] or "").startswith("Heat map")]
    assert [image["width"] for image in maps] == ["192"]


def test_a_prior_that_fills_in(show, tmp_path):
    """Its losses of codes that are filled in share a chart, and its weights are those of the mean of both NLLs."""
    prior = make_prior(tmp_path / "prior", ["--inpainting", "0.5"])
    rows = [json.loads(line) for line in (prior / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "heldout/nats_per_token" in row:  # 2.0 at step 100 and 2.5 at step 200
            row["heldout/inpainting_nats_per_token"] = 1.0 if row["step"] == 200 else 3.25
        elif row["step"] == 100:
            row["train/inpainting_loss"] = 3.125
    history(prior, rows)
    (prior / "vqgen.json").write_text(json.dumps({"kind": "prior", "fingerprint": "a" * 64}))
    receipt = {
        "kind": "vqgen receipt",
        "program": "inpainting",
        "options": {"split": "test"},
        "fingerprints": {"prior": "a" * 64},
        "counts": {"images": 9},
        "metrics": {"hole_nats": {"surroundings": 4.5}, "seam": {"filled": 1.25}},
        "environment": {},
    }
    windows = {**receipt, "program": "windows", "options": {"size": [64, 64]}, "metrics": {"seam": 1.5}}
    for found in (receipt, windows):
        (prior / f"{found['program']}.json").write_text(json.dumps(found))
    page = show(prior)
    for text in (
        "At step 200",
        "vqgen-eval inpainting 9 images; split test",
        "NLL of the hole, surroundings nats per token 4.5",
        "Step across the border over steps inside, filled 1.25",
        "vqgen-eval windows 9 images",
        "Step across seams over steps inside windows 1.5",
        "codes filled in: training from 3.125 at step 100 to 3.125 at step 100; held-out from 3.25 at step 100 to 1 at",
    ):
        assert text in page.text, text


def test_the_demo_ends_with_its_page(cli, tmp_path, monkeypatch):
    demo = make_demo(tmp_path / "demo")
    for name in ("tokenizer.train.train", "tokenizer.codes.writer.tokenize", "prior.train.train"):
        monkeypatch.setattr(f"vqgen.{name}", lambda config: None)
    monkeypatch.setattr("vqgen.app.stages.samples_are_drawn", lambda samples, prior: True)
    monkeypatch.setattr("vqgen.app.stages.check_folders", lambda output: None)  # they are made up
    result = cli(demonstration.main, "--output", demo)
    last = result.out.strip().splitlines()[-1]
    assert result.code == 0 and str(demo / "samples/grid.png") in last and str(demo / "report.html") in last
    assert "20 generated images" in Page(demo / "report.html").text
    (demo / "report.html").write_text("mine")
    assert "is no report" in cli(demonstration.main, "--output", demo).err


def test_runs_side_by_side(show, tmp_path):
    make_tokenizer(tmp_path / "a/run", psnr=24, words=["--lr", "0.25"])
    make_tokenizer(tmp_path / "b/run", psnr=26, words=["--lr", "0.5"])
    page = show(tmp_path / "a/run", tmp_path / "b/run")
    assert "Options in which they differ a/run b/run optimizer.lr 0.25 0.5 Recons" in page.text
    assert "At step 40 40 PSNR dB 24 26" in page.text
    assert re.search(r'<td>24</td><td class="?best"?>26</td>', page.html)
    (about,) = [text for text in page.texts if text.startswith("PSNR: ")]
    assert about == "PSNR: a/run from 23 at step 20 to 24 at step 40; b/run from 25 at step 20 to 26 at step 40."
    assert "b/run, training from 6.5" in page.text, "dashed, where both sides are there"


def test_metrics_of_other_data_are_not_called_better(show, tmp_path):
    make_tokenizer(tmp_path / "a")
    make_tokenizer(tmp_path / "b", psnr=26, words=["--data", "elsewhere"])
    assert "class=best" not in show(tmp_path / "a", tmp_path / "b", make_prior(tmp_path / "c")).html


@pytest.mark.parametrize(
    "words",
    ["--size 16", "--channels 1", "--fit pad", "--holdout 0.1", "--validation-images 5"],
    ids=lambda words: words,
)
def test_metrics_of_other_validation_images_are_not_called_better(show, tmp_path, words):
    make_tokenizer(tmp_path / "a")
    make_tokenizer(tmp_path / "b", psnr=26, words=words.split())
    assert "class=best" not in show(tmp_path / "a", tmp_path / "b").html


def test_secrets_in_urls_are_not_shown(show, tmp_path):
    page = show(make_tokenizer(tmp_path / "run", words=["--data", "https://bob:hunter2@host/a.tar?token=letmein"]))
    assert "https://host/a.tar" in page.text and "hunter2" not in page.html and "letmein" not in page.html


def test_a_fifo_is_no_report(cli, tmp_path):
    os.mkfifo(tmp_path / "page.html")
    descriptor = os.open(tmp_path / "page.html", os.O_RDWR)  # so that what reads it does not wait for ever
    os.write(descriptor, bytes(2000))
    result = cli(reporting.main, make_tokenizer(tmp_path / "run"), "--output", tmp_path / "page.html")
    os.close(descriptor)
    assert result.code == 2 and "--output" in result.err and "not a regular file" in result.err


def test_sessions_are_listed(show, tmp_path):
    run = make_tokenizer(tmp_path / "run")
    about = {"device": "cpu", "cpu": "An Old One", "threads": 3, "torch": "2.0"}
    sessions = [
        {"began": "2026-01-02T03:04:05+00:00", "first_step": first, "last_step": last, "seconds": 3700.0, **about}
        for first, last in ((0, 20), (20, 40))
    ]
    (run / "machine.json").write_text(json.dumps({"sessions": sessions}))
    page = show(run)
    for text in ("2 h 03 min in all", "2026-01-02 03:04:05 UTC 20–40 1 h 01 min cpu An Old One 3", "An Old One"):
        assert text in page.text, text


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        (None, "There is no metrics.jsonl"),
        ("", "Nothing has been logged yet"),
        ('{"step": 5, "train/loss": 1.0}\n{"step": 6, "trai', "One line of metrics.jsonl cannot be read"),
        ('{"step": 5, "train/loss": 1.0}\n12\n[]\n{"a": 1}\n\0\xff\n', "4 lines of metrics.jsonl cannot be read"),
        ('{"step": 5, "train/loss": 1.0}\n', "It has not been validated yet"),
        ('{"step": 5, "train/loss": NaN, "heldout/psnr": 1e400}\n', "There are no pictures of reconstructions"),
        ('{"step": 0, "train/loss": 0.0, "heldout/psnr": -3}\n', "There is no vqgen.json yet"),
    ],
)
def test_what_an_unfinished_run_lacks_is_said(show, tmp_path, content, missing):
    run = make_tokenizer(tmp_path / "run", model=False)
    shutil.rmtree(run / "images")
    picture(run / "images/step-00000004.png", 1)
    data = (run / "images/step-00000004.png").read_bytes()
    (run / "images/step-00000004.png").write_bytes(data[: len(data) // 2])
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content, encoding="latin-1")
    page = show(run)
    assert missing in page.text and not page.named("img")
    assert ("Total loss" in page.text) == ("1.0" in (content or "") or "0.0" in (content or ""))


def test_numbers_that_no_run_writes_are_left_out(show, tmp_path):
    run = make_tokenizer(tmp_path / "run")
    lines = [
        '{"step": 1, "train/loss": 1' + "0" * 400 + "}",
        '{"step": -3, "train/loss": 0.5}',
        '{"step": 2, "train/loss": 1e308}',
        '{"step": 3, "train/loss": -1e308}',
        '{"step": 4, "train/loss": 0.25}',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    session = {"began": "2026-01-01", "first_step": 0, "last_step": 4, "seconds": math.nan}
    (run / "machine.json").write_text(json.dumps({"sessions": [session, {"began": 3}]}))
    samples = tmp_path / "samples"
    picture(samples / "grid.png", 1)
    for odd in ({"settings": [1]}, {"class_names": 3}, {"n": {}}, {"images": 3}, {"images": [3, {"text": [1]}]}):
        (samples / "samples.json").write_text(json.dumps({"settings": {}, "n": 1, **odd}))
        assert "4 lines of metrics.jsonl" in show(run).text and show(samples).named("img")


def test_a_finished_run_without_its_history_says_how_far_it_went(show, tmp_path):
    run = make_tokenizer(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert "Finished, 40 steps" in show(run).text


def test_a_configuration_that_cannot_be_read(show, tmp_path):
    run = make_tokenizer(tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    page = show(run)
    assert "no config.yaml that can be read" in page.text and "PSNR" in page.text and "Finished" in page.text


def test_names_are_escaped(show, tmp_path):
    name = "<script>alert(1)<&'\""
    one, two = make_tokenizer(tmp_path / name), make_tokenizer(tmp_path / "b", words=["--data", "<b>&x"])
    history(two, [{"step": 1, "train/<i>": 2.0, "health": "x", "message": "<u>&"}])
    page = show(one, two)
    assert (
        not page.named("script") and not page.named("b</script") and "<i>" not in page.html and "<u>" not in page.html
    )
    assert name in page.text and "<b>&x" in page.text and "<u>&" in page.text


def test_the_same_folders_give_the_same_bytes(show, tmp_path):
    demo = make_demo(tmp_path / "demo")
    assert show(demo).html == show(demo).html


def test_nothing_is_fetched_and_everything_is_named(show, tmp_path):
    page = show(make_demo(tmp_path / "demo"))
    bare = re.sub(r"data:image/png;base64,[\w+/=]*", "", page.html)
    assert bare.startswith("<!DOCTYPE html>") and not re.search(r"(?i)https?:|//[a-z]|@import|url\(", bare)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert name not in attributes or re.match("data:image/png;base64,|#", attributes[name] or "")
        assert not any(name.startswith("on") for name in attributes)
    assert all(image["alt"] for image in page.named("img"))
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    drawn = [svg for svg in page.named("svg") if svg.get("role") == "img"]
    assert len(drawn) > 10
    for svg in drawn:
        assert all(name in identifiers for name in (svg["aria-labelledby"] or "").split())
    assert all("scope" in heading for heading in page.named("th"))


def test_what_is_no_run_is_refused(cli, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    tokenizer, other = make_tokenizer(tmp_path / "run"), make_tokenizer(tmp_path / "other", model=False)
    codes = make_codes(tmp_path / "codes", tokenizer)
    (strange := tmp_path / "strange").mkdir()
    (strange / "photo.png").touch()
    (mine := tmp_path / "mine.html").write_text("<p>mine")
    page = ["--output", tmp_path / "page.html"]
    cases: list[tuple[int, Sequence[Any], Sequence[str]]] = [
        (2, [tmp_path / "nowhere", *page], [f"{tmp_path / 'nowhere'} does not exist", "name the folder"]),
        (2, [empty, *page], [f"{empty} is no run", "holds nothing"]),
        (2, [strange, *page], [f"{strange} is no run", "photo.png", "name the folder"]),
        (2, [mine, *page], ["mine.html is a file"]),
        (2, [codes, *page], ["codes holds code files", "--codes"]),
        (2, page, ["RUN", "needed"]),
        (2, [tokenizer, "--output", mine], ["mine.html is no report"]),
        (2, [tokenizer, "--output", strange], ["is a folder"]),
        (2, [make_prior(tmp_path / "prior"), "--codes", codes, *page], ["--codes", "no tokenizer run"]),
        (1, [other, "--codes", codes, *page], ["--codes", "no model is finished"]),
        (1, [tokenizer, "--codes", tmp_path / "nowhere", *page], ["nowhere", "does not exist"]),
        (1, [tokenizer, "--output", mine / "page.html"], ["cannot write", "page.html"]),
    ]
    for code, words, parts in cases:
        result = cli(reporting.main, *words)
        assert result.code == code and len(result.err.strip().splitlines()) == 1, result.err
        assert all(part in result.err for part in parts), result.err
    assert mine.read_text() == "<p>mine" and not (tmp_path / "page.html").exists()
    with torch.no_grad():
        changed = Tokenizer.load(tokenizer)
        changed.decoder.last.bias += 1
    changed.save(other)
    result = cli(reporting.main, other, "--codes", codes, *page)
    marks = [json.loads((folder / "vqgen.json").read_text())["fingerprint"][:12] for folder in (tokenizer, other)]
    assert result.code == 1 and all(mark in result.err for mark in marks)


def test_numbers_are_written_for_people():
    written = {
        0.0: "0",
        26.4581: "26.46",
        1.0: "1",
        0.85982: "0.8598",
        7275.5: "7,276",
        3.1e-5: "3.1e-5",
        -0.0706: "-0.0706",
    }
    assert {value: charts.number(value) for value in written} == written
    assert [duration(s) for s in (0.42, 59.4, 61, 3599, 3660)] == [
        "0.4 s",
        "59 s",
        "1 min 01 s",
        "59 min 59 s",
        "1 h 01 min",
    ]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[5.0], [1e-9, 1e-9], [0, 0], [-1, 1e6], [1e-8, 1e3], [3, 3.0001], [1, 9.5]])
def test_charts_keep_within_their_frame(values, log):
    points = [(float(step), float(value)) for step, value in enumerate(values)]
    chart = charts.line_chart("x", "", [charts.Series("a", points, 0)], log)
    places = [tuple(map(float, pair.split(","))) for pair in chart.lines[0].points.split()]
    assert all(charts.LEFT <= x <= charts.RIGHT and charts.TOP <= y <= charts.BOTTOM for x, y in places)
    assert 1 <= len(chart.y_ticks) <= 8 and all(
        charts.TOP - 1 <= tick.at <= charts.BOTTOM + 1 for tick in chart.y_ticks
    )
    assert len({tick.text for tick in chart.y_ticks}) == len(chart.y_ticks)


def test_thinning_keeps_peaks_and_ends():
    points = [(float(x), 0.0) for x in range(10_000)]
    points[1234], points[5678] = (1234.0, 9.0), (5678.0, -9.0)
    kept = charts.thinned(points)
    assert len(kept) <= 2 * charts.BUCKETS + 2 and kept == sorted(kept)
    assert {points[0], points[1234], points[5678], points[-1]} <= set(kept)


def browse(*words: Any) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):  # its helpers would outlive it
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_a_browser_shows_it_at_every_width(show, tmp_path):
    """Chromium has no window narrower than 500 pixels, so a frame of the width stands in for it."""
    make_tokenizer(tmp_path / ("a-run-with-a-long-name" * 4))
    long = make_tokenizer(tmp_path / "b", words=["--data", "/a/very/long/path" * 12])
    page = show(tmp_path / ("a-run-with-a-long-name" * 4), long, make_demo(tmp_path / "demo"))
    script = "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth].join(), '*')</script>"
    # The page's own policy would not let the script run.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.html)
    (tmp_path / "measured.html").write_text(html.replace("</body>", f"{script}</body>"), encoding="utf-8")
    for width in (1280, 390):
        outer = tmp_path / f"outer-{width}.html"
        outer.write_text(
            "<title>nothing</title><script>onmessage = event => document.title = event.data</script>"
            f"<iframe src=measured.html width={width} height=900 style='border: 0'></iframe>"
        )
        shown = browse("--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()).stdout
        found = re.search(r"<title>(\d+),(\d+)</title>", shown)
        assert found and int(found[1]) == width >= int(found[2]), shown[:200]
        shot = tmp_path / f"{width}.png"
        options = ["--enable-logging=stderr", "--v=0", f"--window-size={width},900", f"--screenshot={shot}"]
        done = browse(*options, (tmp_path / "page.html").as_uri())
        assert "CONSOLE" not in done.stderr and shot.stat().st_size > 5000, done.stderr
