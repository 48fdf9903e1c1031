"""vqgen-eval codebook: images of codes, counts and neighbours."""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import SIZE, codes_for, make_prior
from helpers.quantizers import quantizer_options
from torchvision.io import decode_image, write_png

import vqgen.evaluation.program as program
from vqgen.evaluation.codebook import code_vectors, nearest_codes
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.data.pixels import to_uint8
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig


@pytest.mark.parametrize("depth", [1, 2])
def test_counts_and_tiles_are_those_of_a_naive_loop(cli, tmp_path, depth):
    model = make_prior(tmp_path / "model", depth=depth)
    codes = codes_for(tmp_path / "codes", model, depth=depth)
    words = ["--tokenizer", model / "tokenizer", "--codes", codes, "--output", tmp_path / "out"]
    result = cli(program.main, "codebook", *words)
    assert result.code == 0 and "codes used over" in result.out, result.err
    found = json.loads((tmp_path / "out/codebook.json").read_text())
    counts = [[0] * SIZE for _ in range(depth)]
    for split in ("train", "heldout"):
        files = CodeFiles(codes, split)
        for image in range(len(files)):
            for view in range(files.views):
                for position in files.gather(range(image, image + 1), view).reshape(-1, depth).tolist():
                    for which, code in enumerate(position):
                        counts[which][code] += 1
    assert found["counts"] == counts
    tokenizer = Tokenizer.load(model / "tokenizer")
    first = max(range(SIZE), key=lambda code: (counts[0][code], -code))
    common = [max(range(SIZE), key=lambda code: (row[code], -code)) for row in counts]
    assert first == common[0]
    rows, columns = (min(4, side) for side in tokenizer.grid)
    grid = torch.tensor(common).expand(1, rows, columns, depth)
    tile = to_uint8(tokenizer.decode(grid if depth > 1 else grid[..., 0]))[0]
    atlas = decode_image(str(tmp_path / "out/atlas.png"))
    assert torch.equal(atlas[:, 1 : 1 + tile.shape[1], 1 : 1 + tile.shape[2]], tile.expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["vq", "fsq", "lfq", "residual", "simvq"])
def test_neighbours_are_the_nearest_in_what_the_decoder_sees(kind):
    torch.manual_seed(0)
    extra = {"levels": [4, 4]} if kind == "fsq" else {"depth": 2} if kind == "residual" else {}
    quantizer = quantizer_options(kind, codebook_size=16, code_dim=4, **extra)
    model = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    tokenizer = Tokenizer(TokenizerConfig([8, 8], 3, model, quantizer)).eval()
    table = code_vectors(tokenizer)
    assert table.shape == (tokenizer.depth, 16, 8)
    near = nearest_codes(table, 5, 3)
    expected = sorted((float((table[0, i] - table[0, 5]).norm()), i) for i in range(16) if i != 5)[:3]
    assert [d for _, d in near] == pytest.approx([d for d, _ in expected])
    if tokenizer.depth > 1:
        assert all(index >= 16 for index, _ in nearest_codes(table, 21, 3))
        codes = torch.tensor([[3, 7]]).view(1, 1, 1, 2)
        whole = tokenizer.quantizer.decode(codes).flatten()
        nothing = tokenizer.quantizer.decode(torch.zeros(1, 1, 1, 2, dtype=torch.long)).flatten()
        torch.testing.assert_close(whole, table[0, 3] + table[1, 7] - nothing)  # each depth adds its own


def test_neighbours_are_told_and_shown(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    words = ["--tokenizer", model / "tokenizer", "--output", tmp_path / "out", "--neighbours", 2, 5, "--k", 3]
    result = cli(program.main, "codebook", *words)
    assert result.code == 0 and "near 2: " in result.out and "near 5: " in result.out, result.err
    found = json.loads((tmp_path / "out/codebook.json").read_text())
    assert "counts" not in found and len(found["neighbours"]["5"]) == 3
    assert (tmp_path / "out/neighbours.png").is_file()


def test_what_does_not_fit_is_refused(cli, tmp_path):
    model, other = make_prior(tmp_path / "model"), make_prior(tmp_path / "other", depth=2)
    codes = codes_for(tmp_path / "codes", other, depth=2)
    for words, part in (
        (["--codes", codes], "another tokenizer"),
        (["--neighbours", SIZE], f"--neighbours: found {SIZE}, expected 0 to {SIZE - 1}"),
        (["--k", 0], "--k: found 0"),
        (["--codes", tmp_path / "nowhere"], "nowhere"),
    ):
        result = cli(program.main, "codebook", "--tokenizer", model / "tokenizer", "--output", tmp_path / "out", *words)
        assert result.code and part in result.err and len(result.err.strip().splitlines()) == 1, result.err
    assert not Path(tmp_path / "out").exists()


def test_only_its_own_files_are_replaced(cli, tmp_path):
    model, out = make_prior(tmp_path / "model"), tmp_path / "out"
    words = ["codebook", "--tokenizer", model / "tokenizer", "--output", out, "--neighbours", 2]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for _ in range(2):
        assert cli(program.main, *words).code == 0
    (out / "codebook.json").unlink()  # as after a kill
    assert cli(program.main, *words).code == 0
    for name in ("atlas.png", "neighbours.png", "codebook.json"):
        whole = (out / name).read_bytes()
        for foreign in (b"mine", b"", b'{"version": "0.1.0"}'):
            (out / name).write_bytes(foreign)
            result = cli(program.main, *words)
            assert result.code == 2 and str(out / name) in result.err and (out / name).read_bytes() == foreign
        (out / name).write_bytes(whole)
    # Version 0.1 did not mark its pictures, later ones do.
    about = json.loads((out / "codebook.json").read_text())
    write_png(torch.zeros(3, 4, 4, dtype=torch.uint8), str(out / "atlas.png"))
    for version, code in (("0.10.0", 2), ("0.1.0", 0)):
        (out / "codebook.json").write_text(json.dumps({**about, "version": version}))
        assert cli(program.main, *words).code == code
    assert (out / "notes.txt").read_text() == "mine"


def test_what_a_kill_left_goes(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    left = [tmp_path / "out" / f".{name}.vqgen-0123456789abcdef.part" for name in ("atlas.png", "codebook.json")]
    for path in left:
        path.mkdir(parents=True)
    assert cli(program.main, "codebook", "--tokenizer", model / "tokenizer", "--output", tmp_path / "out").code == 0
    assert not any(path.exists() for path in left)
