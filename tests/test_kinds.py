"""Every kind of quantizer by its name: one contract. Then SimVQ, residual and product quantizers by their papers."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.quantizers import flat, latents, pass_through, quantizer_options, same, state
from vector_quantize_pytorch import ResidualVQ, VectorQuantize
from vector_quantize_pytorch import SimVQ as LibrarySimVQ

from vqgen.errors import UsageError
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers import QUANTIZERS, quantizer_for
from vqgen.tokenizer.quantizers.base import QuantizedVectors, Quantizer
from vqgen.tokenizer.quantizers.codebook import Codebook
from vqgen.tokenizer.quantizers.options import SimVQConfig
from vqgen.tokenizer.quantizers.product import ProductQuantizer
from vqgen.tokenizer.quantizers.residual import ResidualQuantizer
from vqgen.tokenizer.quantizers.simvq import SimVQ
from vqgen.tokenizer.train import main
from vqgen.training.optimizer import averaged, update_average

# Every registered kind as it is by default, and the ways in which some differ.
CASES: dict[str, dict[str, Any]] = {kind: {"quantizer": kind} for kind in QUANTIZERS}
CASES["residual"]["depth"] = 3
CASES |= {
    "vq-rotation": {"estimator": "rotation"},
    "vq-euclidean": {"l2_normalize": False},
    "vq-gradient": {"codebook": "gradient"},
    "vq-gradient-euclidean": {"codebook": "gradient", "l2_normalize": False},
    "lfq-entropy": {"quantizer": "lfq", "entropy_weight": 0.1, "entropy_temperature": 0.5},
    "vq-entropy": {"entropy_weight": 0.1, "entropy_temperature": 0.3},
    "simvq-rotation": {"quantizer": "simvq", "estimator": "rotation"},
    "residual-shared": {"quantizer": "residual", "depth": 3, "shared_codebook": True},
    "residual-gradient-rotation": {
        "quantizer": "residual",
        "depth": 2,
        "codebook": "gradient",
        "estimator": "rotation",
    },
    "product-euclidean": {"quantizer": "product", "depth": 2, "l2_normalize": False},
    "product-gradient-rotation": {
        "quantizer": "product",
        "depth": 3,
        "codebook": "gradient",
        "estimator": "rotation",
    },
}
cases = pytest.mark.parametrize("case", CASES)
LEARNED = [name for name, options in CASES.items() if options.get("quantizer", "vq") in ("vq", "residual", "product")]


def make(case: str, dim: int = 6, seed: int = 0, **options: Any) -> Quantizer:
    """A quantizer of latents with `dim` channels, of about 64 codes."""
    torch.manual_seed(seed)
    options = {"codebook_size": 64, "code_dim": 4, **CASES[case], **options}
    return quantizer_for(dim, quantizer_options(**options))


def plain(case: str, width: int, **options: Any) -> Any:
    """A quantizer that gets and gives the vectors themselves."""
    quantizer = make(case, width, **options)
    pass_through(quantizer, width)
    return quantizer


# ---- the contract of every kind ----


@cases
@pytest.mark.parametrize("training", [True, False])
def test_round_trip(case: str, training: bool) -> None:
    quantizer = make(case)
    quantizer.initialize(latents(8, seed=2))
    quantizer.train(training)
    z, before = latents().requires_grad_(), state(quantizer)
    out = quantizer(z)
    shape = (2, 3, 5) if quantizer.depth == 1 else (2, 3, 5, quantizer.depth)
    assert quantizer.depth == (3 if "residual-shared" in case else getattr(quantizer.config, "depth", 1))
    assert out.z_q.shape == z.shape and out.z_q.dtype == z.dtype
    assert out.codes.shape == shape and out.codes.dtype == torch.int64
    assert out.codes.min() >= 0 and out.codes.max() < quantizer.codebook_size
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    assert all(value.shape == () and not value.requires_grad for value in out.stats.values())
    quantizer.load_state_dict(before)  # the codes have learned since
    quantizer.eval()
    assert torch.equal(quantizer.encode(z), out.codes)
    assert quantizer.decode(out.codes).shape == z.shape
    if case != "gumbel" or not training:  # its mixture in training is no code
        exact = {"rtol": 0, "atol": 0} if quantizer.config.fixed_codes else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(quantizer.decode(out.codes), out.z_q, **exact)
    usage = [len(part.unique()) / quantizer.codebook_size for part in out.codes.reshape(30, -1).unbind(1)]
    assert out.stats["usage"] == pytest.approx(sum(usage) / len(usage))
    shares = [part.bincount()[part.unique()] / 30 for part in out.codes.reshape(30, -1).unbind(1)]
    perplexities = [(-(share * share.log()).sum()).exp() for share in shares]
    torch.testing.assert_close(out.stats["perplexity"], torch.stack(perplexities).mean())


@cases
def test_codes_are_in_raster_order_and_independent_of_the_batch(case: str) -> None:
    quantizer = make(case).eval()
    z = latents()
    codes = quantizer.encode(z)
    assert len(codes.unique()) > 4
    for image in range(2):
        for row in range(3):
            one = quantizer.encode(z[image : image + 1, :, row : row + 1, 2:3])
            assert torch.equal(one[0, 0, 0], codes[image, row, 2])


@cases
def test_bf16_autocast_changes_nothing(case: str) -> None:
    one, two = make(case), make(case)
    z = latents(4, 6, 8, 8)
    torch.manual_seed(0)
    expected = one(z)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = two(z)
        assert torch.equal(two.eval().encode(z), one.eval().encode(z))
    assert torch.equal(out.z_q, expected.z_q) and torch.equal(out.loss, expected.loss)
    assert torch.equal(out.codes, expected.codes) and same(state(one), state(two))


@cases
def test_gradients_reach_latents_and_parameters(case: str) -> None:
    quantizer = make(case)
    z = latents().requires_grad_()
    out = quantizer(z)
    (out.loss + (out.z_q * latents(seed=2)).sum()).backward()
    assert z.grad is not None and torch.isfinite(z.grad).all() and (z.grad != 0).float().mean() > 0.9
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any() and parameter.grad.isfinite().all(), name


@cases
def test_evaluation_changes_nothing(case: str) -> None:
    quantizer = make(case, **({"revive_after": 1} if case in LEARNED else {})).eval()
    before = state(quantizer)
    out = quantizer(latents())
    quantizer.decode(quantizer.encode(latents()))
    assert torch.equal(out.codes, quantizer(latents()).codes)
    quantizer.train()
    quantizer.decode(quantizer.encode(latents()))
    assert same(before, state(quantizer)), "encode and decode update nothing in either mode"
    quantizer(latents())
    assert same(before, state(quantizer)) == (case not in LEARNED)


@cases
def test_learning_is_a_function_of_state_and_seed(case: str) -> None:
    """What learning needs is in the state: a copy of it goes the same way, revivals included."""
    options = {"revive_after": 2} if case in LEARNED else {}
    one, two = make(case, **options), make(case, seed=1, **options)
    for step in range(3):
        one(latents(seed=step))
    two.load_state_dict(one.state_dict())
    for step in range(3, 8):
        for quantizer in (one, two):
            torch.manual_seed(step)
            quantizer(latents(seed=step))
    assert same(state(one), state(two))


@cases
def test_a_model_folder_comes_back(case: str, tmp_path: Any) -> None:
    config = make(case).config
    model = VQGANConfig(width=8, multipliers=[1, 2], groups=4, blocks=1, attention=False, latent_dim=6)
    tokenizer = Tokenizer(TokenizerConfig([8, 12], 3, model, config))
    images = latents(2, 3, 8, 12).clamp(-1, 1)
    for _ in range(3):
        tokenizer(images)
    tokenizer.eval().save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    codes = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), codes)
    torch.testing.assert_close(loaded.decode(codes), tokenizer.decode(codes))
    assert json.loads((tmp_path / "vqgen.json").read_text())["codebook_size"] == tokenizer.codebook_size
    left_out = set(tokenizer.state_dict()) - set(tokenizer.inference_state())
    assert not any(name.endswith("codes") for name in left_out)
    if case in LEARNED:
        assert any(name.endswith("idle") for name in left_out)


@cases
def test_an_averaged_quantizer_goes_on_from_its_codes(case: str) -> None:
    """The average of models encodes; and its codes, taken over without what learning kept, learn on from there."""
    quantizer = make(case)
    average = averaged(quantizer)
    for step in range(4):
        quantizer(latents(seed=step))
        update_average(average, quantizer, 0.5, step)
    module: Any = average.module
    module.eval()
    codes = module.encode(latents())
    taken = make(case, seed=3)
    own = taken.state_dict()
    taken.load_state_dict({**module.state_dict(), **{name: own[name] for name in taken.training_state}})
    taken.reset_training_state()
    assert torch.equal(taken.eval().encode(latents()), codes)
    torch.testing.assert_close(taken.decode(codes), module.decode(codes))
    out = taken.train()(latents())
    assert torch.equal(out.codes, codes) and torch.isfinite(out.loss)


@cases
def test_what_is_not_finite_is_no_error_but_shows(case: str) -> None:
    quantizer = make(case).eval()
    z = latents()
    z[0, 0, 0, 0] = math.nan
    out = quantizer(z)
    assert not torch.isfinite(out.loss) or not torch.isfinite(out.z_q).all()


@pytest.mark.parametrize("case", [case for case in LEARNED if case != "vq-entropy"])
def test_kmeans_start_lowers_the_error(case: str) -> None:
    quantizer = make(case, code_dim=3).eval()
    z = latents(8, 6, 8, 8)
    before = quantizer(z)
    quantizer.initialize(z)
    after = quantizer(z)
    assert after.loss < 0.7 * before.loss and after.stats["usage"] > 0.6


@pytest.mark.parametrize("case", CASES)
def test_a_start_changes_a_quantizer_exactly_where_it_says_so(case: str) -> None:
    quantizer = make(case).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.initialize(latents(8, 6, 8, 8))
    changed = any(not torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert changed == quantizer.needs_initialization == (case in LEARNED)


# ---- options ----


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("depth", {"quantizer": "product", "depth": 1}),
        ("depth", {"quantizer": "residual", "depth": 0}),
        ("code-dim", {"quantizer": "product", "code_dim": 1}),
    ],
)
def test_impossible_options_are_named(option: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^--{option}: ") as caught:
        quantizer_options(**options)
    assert "\n" not in str(caught.value)


def test_too_many_codes_name_the_option_that_sets_them() -> None:
    for option, options in (
        ("codebook-size", {"codebook_size": 2**25}),
        ("levels", {"quantizer": "fsq", "levels": [1000] * 3}),
    ):
        with pytest.raises(UsageError, match=f"^--{option}: found .* codes, expected at most 2\\^24$"):
            quantizer_options(**options)


def test_counts_of_a_wrong_shape_are_named() -> None:
    class Flat(SimVQ):
        def quantize(self, flat: torch.Tensor) -> QuantizedVectors:
            found = super().quantize(flat)
            return replace(found, counts=found.counts[0])

    quantizer = Flat(6, SimVQConfig(codebook_size=64, code_dim=4))
    with pytest.raises(ValueError, match=r"^Flat: counts have shape \(64,\), expected .* \(1, 64\)$"):
        quantizer(latents(1, 6, 2, 2))


def test_a_kind_has_only_its_own_options(cli: Any) -> None:
    for kind, option, value in (
        ("vq", "depth", 2),
        ("product", "shared-codebook", "true"),
        ("fsq", "estimator", "rotation"),
        ("simvq", "entropy-weight", 0.1),
        ("gumbel", "entropy-temperature", 0.1),
        ("lfq", "codebook-decay", 0.9),
        ("residual", "levels", 8),
    ):
        done = cli(main, "--data", "demo", "--quantizer", kind, f"--{option}={value}")
        assert done.code == 2 and f"--{option}" in done.err and kind in done.err, done.err


# ---- SimVQ ----


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_simvq_parity(rotation: bool, weight: float) -> None:
    case = "simvq-rotation" if rotation else "simvq"
    ours = plain(case, 4, commitment_weight=weight)
    theirs = LibrarySimVQ(4, 64, rotation_trick=rotation, input_to_quantize_commit_loss_weight=weight)
    theirs.frozen_codebook.copy_(ours.codes)
    theirs.code_transform.load_state_dict(ours.transform.state_dict())
    z, upstream = latents(2, 4, 8, 8).requires_grad_(), latents(2, 4, 8, 8, seed=2)
    copied = z.detach().clone().requires_grad_()
    out = ours(z)
    quantized, codes, loss = theirs(flat(copied)[None])
    assert torch.equal(out.codes.flatten(), codes[0])
    torch.testing.assert_close(flat(out.z_q), quantized[0])
    torch.testing.assert_close(out.loss, loss)
    (out.loss + (out.z_q * upstream).sum()).backward()
    (loss + (quantized[0] * flat(upstream)).sum()).backward()
    torch.testing.assert_close(z.grad, copied.grad)
    torch.testing.assert_close(ours.transform.weight.grad, theirs.code_transform.weight.grad)


def test_simvq_moves_all_codes_by_one_step_on_few() -> None:
    """The frozen codebook stays; what the loss of a few codes changes is the map under all."""
    quantizer = plain("simvq", 4)
    assert isinstance(quantizer, SimVQ)
    assert {name for name, _ in quantizer.named_parameters() if "project" not in name} == {"transform.weight"}
    frozen, before = quantizer.codes.clone(), quantizer.lookup(torch.arange(64)).detach()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.5)
    out = quantizer(latents(1, 4, 1, 3))
    out.loss.backward()
    optimizer.step()
    assert len(out.codes.unique()) <= 3
    after = quantizer.lookup(torch.arange(64))
    assert torch.equal(quantizer.codes, frozen) and (before != after).any(dim=1).all()
    again = quantizer(latents(1, 4, 1, 3))
    assert again.loss < out.loss


# ---- residual ----


def residual(**options: Any) -> Any:
    return plain("residual", 4, **{"codebook_size": 16, "depth": 3, "revive_after": 0, **options})


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_residual_ema_parity(weight: float) -> None:
    ours = residual(commitment_weight=weight, codebook_decay=0.9)
    theirs = ResidualVQ(
        dim=4, num_quantizers=3, codebook_size=16, decay=0.9, commitment_weight=weight, rotation_trick=False, eps=0.0
    )
    for book, layer in zip(ours.depth_codebooks, theirs.layers):
        layer._codebook.embed.copy_(book.codes[None])
        layer._codebook.embed_avg.copy_(book.codes[None])
    for step in range(10):
        z = latents(2, 4, 4, 5, seed=step).requires_grad_()
        copied = z.detach().clone().requires_grad_()
        out = ours(z)
        quantized, codes, losses = theirs(flat(copied)[None])
        assert torch.equal(out.codes.flatten(0, 2), codes[0])
        torch.testing.assert_close(flat(out.z_q), quantized[0])
        # The library leaves the terms apart; the paper's loss is their sum. Their gradients to z add up the same.
        torch.testing.assert_close(out.loss, losses.sum())
        out.loss.backward()
        losses.sum().backward()
        torch.testing.assert_close(z.grad, copied.grad)
    for book, layer in zip(ours.depth_codebooks, theirs.layers):
        torch.testing.assert_close(book.codes, layer.codebook)
        torch.testing.assert_close(book.weights, layer._codebook.cluster_size[0])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_residual_by_hand(shared: bool, codebook: str) -> None:
    ours = residual(shared_codebook=shared, codebook=codebook, commitment_weight=0.7).eval()
    assert isinstance(ours, ResidualQuantizer) and len(ours.codebooks) == (1 if shared else 3)
    z, upstream = latents(2, 4, 4, 5).requires_grad_(), latents(2, 4, 4, 5, seed=2)
    out = ours(z)
    vectors = flat(z.detach())
    rest, partial, loss, wanted = vectors, torch.zeros_like(vectors), 0.0, torch.zeros_like(vectors)
    for depth, book in enumerate(ours.depth_codebooks):
        codes = (rest[:, None] - book.codes[None]).square().sum(-1).argmin(1)
        assert torch.equal(out.codes[..., depth].flatten(), codes)
        partial = partial + book.codes.detach()[codes]
        loss += (0.7 + (codebook == "gradient")) * (vectors - partial).square().mean()
        wanted += 2 * 0.7 * (vectors - partial) / vectors.numel()
        rest = vectors - partial
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(flat(out.z_q), partial)
    (out.loss + (out.z_q * upstream).sum()).backward()
    # The gradient passes the codes once, not once a depth.
    torch.testing.assert_close(flat(z.grad), flat(upstream) + wanted)


def test_residual_rotation_is_that_of_the_whole() -> None:
    ours = residual(estimator="rotation", commitment_weight=0.0).eval()
    z, upstream = latents(2, 4, 4, 5).requires_grad_(), latents(2, 4, 4, 5, seed=2)
    out = ours(z)
    out.z_q.backward(upstream)
    copied = flat(z.detach()).requires_grad_()
    one = VectorQuantize(4, 40, rotation_trick=True, commitment_weight=0.0, ema_update=False).train()
    one._codebook.embed.copy_(flat(out.z_q).detach()[None])  # each vector's sum of codes, as a code
    quantized, codes, _ = one(copied[None])
    keep = codes[0] == torch.arange(40)  # another's sum may be nearer: greedy choices are not the best
    assert keep.sum() > 10
    quantized.backward(flat(upstream)[None])
    torch.testing.assert_close(flat(z.grad)[keep], copied.grad[keep])


def test_each_depth_lowers_the_error_and_a_shared_codebook_learns_from_all() -> None:
    z = latents(8, 4, 8, 8)
    for shared in (False, True):
        ours = residual(shared_codebook=shared, codebook_size=32).eval()
        ours.initialize(z)
        codes = ours.encode(z).flatten(0, 2)
        errors, partial = [], torch.zeros(len(codes), 4)
        for depth, book in enumerate(ours.depth_codebooks):
            partial = partial + book.lookup(codes[:, depth])
            errors.append((flat(z) - partial).square().mean().item())
        assert errors[2] < 0.8 * errors[1] < 0.8 * 0.8 * errors[0], shared


def test_a_shared_codebook_takes_one_step_with_the_vectors_of_all_depths() -> None:
    ours = residual(shared_codebook=True, codebook_decay=0.9, codebook_size=6)
    (book,) = ours.codebooks
    before, z = book.codes.clone(), latents(2, 4, 4, 5)
    out = ours(z)
    counts, totals, rest = torch.full((6,), 0.9), 0.9 * before, flat(z)
    for codes in out.codes.flatten(0, 2).unbind(1):
        taken = F.one_hot(codes, 6).float()
        counts, totals = counts + 0.1 * taken.sum(0), totals + 0.1 * taken.T @ rest
        rest = rest - before[codes]
    used = torch.isin(torch.arange(6), out.codes)
    torch.testing.assert_close(book.weights, counts)
    torch.testing.assert_close(book.codes, torch.where(used[:, None], totals / counts[:, None], before))
    assert torch.equal(book.idle == 0, used)


# ---- product ----


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
def test_product_parity(l2: bool, rotation: bool) -> None:
    options = {"codebook_size": 16, "depth": 3, "codebook_decay": 0.9, "l2_normalize": l2, "code_dim": 2}
    ours = plain("product", 6, estimator="rotation" if rotation else "straight-through", **options)
    assert isinstance(ours, ProductQuantizer)
    theirs = VectorQuantize(
        dim=6,
        codebook_size=16,
        heads=3,
        codebook_dim=2,
        separate_codebook_per_head=True,
        decay=0.9,
        commitment_weight=0.25,
        use_cosine_sim=l2,
        rotation_trick=rotation,
        eps=0.0,
    )
    theirs._codebook.embed.copy_(torch.stack([book.codes for book in ours.depth_codebooks]))
    theirs._codebook.embed_avg.copy_(theirs._codebook.embed)
    for step in range(6):
        z, upstream = latents(2, 6, 4, 5, seed=step).requires_grad_(), latents(2, 6, 4, 5, seed=50 + step)
        copied = z.detach().clone().requires_grad_()
        out = ours(z)
        quantized, codes, loss = theirs(flat(copied)[None])
        assert torch.equal(out.codes.flatten(0, 2), codes[0])
        torch.testing.assert_close(flat(out.z_q), quantized[0])
        torch.testing.assert_close(out.loss, loss)
        (out.loss + (out.z_q * upstream).sum()).backward()
        (loss + (quantized[0] * flat(upstream)).sum()).backward()
        torch.testing.assert_close(z.grad, copied.grad)
    torch.testing.assert_close(torch.stack([book.codes for book in ours.depth_codebooks]), theirs._codebook.embed)


def test_product_parts_do_not_touch_each_other() -> None:
    ours = plain("product", 8, depth=2, codebook_size=16).eval()
    z = latents(1, 8, 4, 4)
    changed = z.clone()
    changed[:, 4:] += 1
    one, two = ours(z), ours(changed)
    assert torch.equal(one.codes[..., 0], two.codes[..., 0]) and not torch.equal(one.codes[..., 1], two.codes[..., 1])
    assert torch.equal(one.z_q[:, :4], two.z_q[:, :4])


# ---- what is logged ----


@pytest.mark.parametrize("case", LEARNED)
def test_learned_codebooks_log_distance_and_revivals(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several codebooks, all the codes that were revived."""
    quantizer, revived, update = make(case, revive_after=1).train(), list[torch.Tensor](), Codebook.update

    def noted(self: Codebook, *batch: Any) -> torch.Tensor:
        revived.append(update(self, *batch))
        return revived[-1]

    monkeypatch.setattr(Codebook, "update", noted)
    stats = quantizer(latents(seed=3)).stats
    assert len(revived) == len([name for name in state(quantizer) if name.endswith(".idle")])
    assert stats["codes_revived"] == sum(revived) > 0
    assert stats["code_distance"] > 0
    assert "codes_revived" not in quantizer.eval()(latents(seed=3)).stats


def test_the_distance_of_a_residual_quantizer_is_that_to_its_sums() -> None:
    quantizer = make("residual").eval()
    z = latents(seed=3)
    vectors = quantizer.vectors(z)
    rest = vectors - quantizer.lookup(quantizer.choose(vectors))
    expected = rest.square().sum() / vectors.square().sum()
    torch.testing.assert_close(quantizer(z).stats["code_distance"], expected)
