"""The quantizer: its contract for every variant, how the codebook learns, and vector-quantize-pytorch as the oracle."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vector_quantize_pytorch import VectorQuantize

from vqgen.errors import UsageError
from vqgen.tokenizer import quantize
from vqgen.tokenizer.images import ImageConfig, open_images
from vqgen.tokenizer.pixels import to_float
from vqgen.tokenizer.quantize import QuantizerConfig, VectorQuantizer, kmeans, nearest

VARIANTS = [(codebook, l2) for codebook in ("ema", "gradient") for l2 in (True, False)]
variants = pytest.mark.parametrize(("codebook", "l2"), VARIANTS)


def make(dim=6, seed=0, identity=False, **options) -> VectorQuantizer:
    """A quantizer of latents with `dim` channels; `identity` leaves them as they are on the way in and out."""
    torch.manual_seed(seed)
    options = {"codebook_size": 16, "code_dim": dim if identity else 4, "revive_after": 0, **options}
    quantizer = VectorQuantizer(dim, QuantizerConfig(**options))
    if identity:
        for layer in (quantizer.project_in, quantizer.project_out):
            layer.weight.data = torch.eye(dim)[:, :, None, None]
            layer.bias.data.zero_()
    return quantizer


def latents(batch=2, dim=6, height=3, width=5, seed=1) -> Tensor:
    return torch.randn(batch, dim, height, width, generator=torch.Generator().manual_seed(seed))


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def place(quantizer: VectorQuantizer, codes: Tensor) -> None:
    """Put the codes where a test wants them, with the averages of a fresh codebook."""
    quantizer.codebook.data.copy_(codes)
    if quantizer.config.codebook == "ema":
        quantizer.counts.fill_(1)
        quantizer.sums.copy_(codes)


# ---- the contract of every variant ----


@variants
def test_round_trip(codebook, l2):
    quantizer = make(codebook=codebook, l2_normalize=l2).eval()
    z = latents()
    out = quantizer(z)
    assert out.z_q.shape == z.shape and out.z_q.dtype == z.dtype
    assert out.codes.shape == (2, 3, 5) and out.codes.dtype == torch.int64
    assert out.loss.shape == ()
    assert torch.equal(quantizer.encode(z), out.codes)
    torch.testing.assert_close(quantizer.decode(out.codes), out.z_q, atol=1e-6, rtol=1e-5)


@variants
def test_codes_are_in_raster_order_and_independent_of_the_batch(codebook, l2):
    quantizer = make(codebook=codebook, l2_normalize=l2).eval()
    z = latents()
    for image in range(2):
        for row in range(3):
            one = z[image : image + 1, :, row : row + 1, 2:3]
            assert quantizer.encode(one).item() == quantizer.encode(z)[image, row, 2]


@variants
def test_bf16_autocast_changes_no_code(codebook, l2):
    quantizer = make(codebook=codebook, l2_normalize=l2, codebook_size=256, code_dim=6, identity=True).eval()
    z = latents(8, 6, 16, 16)
    codes = quantizer.encode(z)
    flat, table = quantizer.vectors(z).bfloat16(), quantizer.codes_table().bfloat16()
    low = (table.square().sum(1) - 2 * flat @ table.T).argmin(1).view_as(codes)
    assert (low != codes).float().mean() > 0.01, "these latents would not show codes taken in bf16"
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
        assert torch.equal(out.codes, codes) and torch.equal(quantizer.encode(z), codes)
        assert torch.equal(out.z_q, expected.z_q) and torch.equal(out.loss, expected.loss)
        assert quantizer.decode(codes).dtype == torch.float32
        # The encoder hands over bf16 latents: they come back in their type, the loss stays in float32.
        half = quantizer(z.bfloat16())
    assert half.z_q.dtype == torch.bfloat16 and half.loss.dtype == torch.float32


def test_bf16_autocast_changes_neither_learning_nor_start():
    quantizer = make(revive_after=1, codebook_size=64)
    z = latents(8, 6, 8, 8)
    plain, cast = copy.deepcopy(quantizer), copy.deepcopy(quantizer)
    torch.manual_seed(0)
    plain.start(z)
    plain(z)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        cast.start(z)
        cast(z)
    assert same(state(plain), state(cast))


@variants
def test_evaluation_mode_changes_nothing(codebook, l2):
    quantizer = make(codebook=codebook, l2_normalize=l2, revive_after=1).eval()
    before = state(quantizer)
    for seed in range(3):
        codes = quantizer(latents(seed=seed)).codes
        quantizer.encode(latents(seed=seed))
        quantizer.decode(codes)
    assert same(before, state(quantizer))
    quantizer.train()
    quantizer.encode(latents())
    quantizer.decode(codes)
    assert same(before, state(quantizer)), "encode and decode learn in no mode"
    quantizer(latents())
    assert not same(before, state(quantizer))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("codebook_size", 1),
        ("code_dim", 0),
        ("code_dim", 1),
        ("codebook_decay", 0.0),
        ("codebook_decay", 1.0),
        ("commitment_weight", -0.1),
        ("revive_after", -1),
    ],
)
def test_impossible_options_are_named(option, value):
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}") as caught:
        QuantizerConfig(**{option: value})
    assert "\n" not in str(caught.value)


# ---- the nearest code ----


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    codes=st.integers(1, 20),
    dim=st.integers(1, 6),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    limit=st.integers(1, 300),
)
def test_nearest_is_brute_force_whatever_the_slices(seed, count, codes, dim, scale, limit):
    random = torch.Generator().manual_seed(seed)
    vectors = scale * torch.randn(count, dim, generator=random)
    table = scale * torch.randn(codes, dim, generator=random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "_DISTANCES", limit)
        found = nearest(vectors, table)
    distances = (vectors[:, None].double() - table[None].double()).square().sum(-1)
    assert found.shape == (count,) and found.dtype == torch.int64
    # Up to ties: the code found is as near as the nearest, within the rounding of float32.
    chosen = distances.gather(1, found[:, None])[:, 0]
    assert (chosen - distances.min(1).values).max() <= 1e-5 * scale**2


def test_nearest_of_nothing():
    assert nearest(torch.zeros(0, 3), torch.zeros(4, 3)).tolist() == []


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return out


def test_the_distance_matrix_is_never_whole():
    vectors, table = torch.randn(20_000, 8), torch.randn(4096, 8)
    with Largest() as naive:
        torch.cdist(vectors[:2000], table)
    assert naive.elements >= 2000 * 4096, "the watch does not see what it must"
    with Largest() as seen:
        nearest(vectors, table)
    assert seen.elements <= 2**22 < 20_000 * 4096 / 10

    quantizer = make(8, identity=True, codebook_size=4096)
    z = vectors[:2000].T.reshape(1, 8, 50, 40)
    with Largest() as seen:
        quantizer(z)
        quantizer.encode(z)
        quantizer.start(z[..., :5])
    assert seen.elements <= 2**22


# ---- losses and gradients ----


@variants
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.5])
def test_loss_by_hand(codebook, l2, weight):
    quantizer = make(codebook=codebook, l2_normalize=l2, commitment_weight=weight).eval()
    z = latents()
    out = quantizer(z)
    flat = torch.einsum("bdhw,cd->bhwc", z, quantizer.project_in.weight[:, :, 0, 0]) + quantizer.project_in.bias
    table = quantizer.codebook
    if l2:
        flat, table = flat / flat.norm(dim=-1, keepdim=True), table / table.norm(dim=-1, keepdim=True)
    distance = (flat - table[out.codes]).square().mean()
    # The weight stands on the commitment term alone: the codebook loss of a gradient codebook keeps weight 1.
    torch.testing.assert_close(out.loss, distance * (weight + (codebook == "gradient")))


@variants
def test_straight_through_gradient_is_the_identity(codebook, l2):
    quantizer = make(codebook=codebook, l2_normalize=l2, commitment_weight=0.0).eval()
    z = latents().requires_grad_()
    upstream = latents(seed=2)
    out = quantizer(z)
    (found,) = torch.autograd.grad((out.z_q * upstream).sum(), z, retain_graph=True)
    unquantized = quantizer.project_in(z)
    if l2:
        unquantized = F.normalize(unquantized, dim=1)
    (expected,) = torch.autograd.grad((quantizer.project_out(unquantized) * upstream).sum(), z)
    torch.testing.assert_close(found, expected)
    if codebook == "gradient":
        (reached,) = torch.autograd.grad((out.z_q * upstream).sum(), quantizer.codebook, allow_unused=True)
        assert reached is None, "codes learn from the codebook loss alone"


def test_straight_through_without_projection_passes_the_gradient_on():
    quantizer = make(identity=True, l2_normalize=False).eval()
    z, upstream = latents().requires_grad_(), latents(seed=2)
    (quantizer(z).z_q * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)


@pytest.mark.parametrize("l2", [True, False])
def test_commitment_reaches_the_encoder_and_codebook_loss_the_codebook(l2):
    def grads(weight: float) -> tuple[Tensor, Tensor]:
        quantizer = make(codebook="gradient", l2_normalize=l2, commitment_weight=weight).eval()
        z = latents().requires_grad_()
        quantizer(z).loss.backward()
        assert quantizer.project_out.weight.grad is None
        return z.grad, quantizer.codebook.grad

    (z_none, code_none), (z_one, code_one), (z_three, code_three) = grads(0.0), grads(1.0), grads(3.0)
    assert not z_none.any() and z_one.any()
    torch.testing.assert_close(z_three, 3 * z_one)
    assert code_none.any() and torch.equal(code_none, code_one) and torch.equal(code_one, code_three)


@pytest.mark.parametrize("l2", [True, False])
def test_ema_codebook_has_no_gradient(l2):
    quantizer = make(codebook="ema", l2_normalize=l2)
    out = quantizer(latents().requires_grad_())
    (out.loss + out.z_q.square().mean()).backward()
    assert {name for name, _ in quantizer.named_parameters()} == {
        f"project_{way}.{kind}" for way in ("in", "out") for kind in ("weight", "bias")
    }
    for name, buffer in quantizer.named_buffers():
        assert not buffer.requires_grad and buffer.grad is None, name


# ---- vector-quantize-pytorch as the oracle ----


def oracle(ours: VectorQuantizer, **options) -> VectorQuantize:
    """The library's quantizer with the codebook of `ours`; its defaults are decay 0.8 and commitment 1.0."""
    dim, size = ours.config.code_dim, ours.config.codebook_size
    library = VectorQuantize(dim, size, rotation_trick=False, eps=0.0, accept_image_fmap=True, **options)
    library._codebook.embed.data.copy_(ours.codebook[None])
    library._codebook.embed_avg.copy_(ours.codebook[None])
    return library.train()


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize(("decay", "commitment"), [(0.8, 1.0), (0.99, 0.25)])
def test_ema_parity(l2, decay, commitment):
    ours = make(8, identity=True, codebook_size=32, l2_normalize=l2, codebook_decay=decay, commitment_weight=commitment)
    settings = {} if (decay, commitment) == (0.8, 1.0) else {"decay": decay, "commitment_weight": commitment}
    theirs = oracle(ours, use_cosine_sim=l2, **settings)
    unused = 0
    for step in range(12):
        z = latents(2, 8, 4, 5, seed=step).requires_grad_()
        copied = z.detach().clone().requires_grad_()
        out, (quantized, codes, loss) = ours(z), theirs(copied)
        unused += 32 - len(codes.unique())
        assert torch.equal(out.codes, codes)
        torch.testing.assert_close(out.z_q, quantized)
        torch.testing.assert_close(out.loss, loss)
        upstream = latents(2, 8, 4, 5, seed=100 + step)
        (out.loss + (out.z_q * upstream).sum()).backward()
        (loss + (quantized * upstream).sum()).backward()
        torch.testing.assert_close(z.grad, copied.grad)
    torch.testing.assert_close(ours.codebook, theirs.codebook)
    torch.testing.assert_close(ours.counts, theirs._codebook.cluster_size[0])
    torch.testing.assert_close(ours.sums, theirs._codebook.embed_avg[0])
    assert unused, "unused codes are where implementations differ"
    assert not torch.equal(ours.codebook, make(8, identity=True, codebook_size=32, l2_normalize=l2).codebook)


def test_gradient_parity():
    ours = make(8, identity=True, codebook_size=32, l2_normalize=False, codebook="gradient", commitment_weight=1.0)
    theirs = oracle(ours, learnable_codebook=True, ema_update=False)
    z = latents(2, 8, 4, 5).requires_grad_()
    copied = z.detach().clone().requires_grad_()
    out, (quantized, codes, loss) = ours(z), theirs(copied)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.z_q, quantized)
    # The library takes one distance whose gradient flows both ways; as two terms its value counts twice.
    torch.testing.assert_close(out.loss, 2 * loss)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(z.grad, copied.grad)
    torch.testing.assert_close(ours.codebook.grad, theirs._codebook.embed.grad[0])


# ---- how the codebook learns ----


def near(codes: Tensor, which: list[int], seed: int = 0) -> Tensor:
    """A batch of latents (1, D, 1, 8) that lie near the given codes."""
    noise = 0.01 * torch.randn(8, codes.shape[1], generator=torch.Generator().manual_seed(seed))
    return (codes[[which[i % len(which)] for i in range(8)]] + noise).T[None, :, None]


def test_unused_codes_stay_while_their_averages_fade():
    quantizer = make(4, identity=True, codebook_size=4, l2_normalize=False, codebook_decay=0.9)
    codes = 3 * torch.eye(4)
    place(quantizer, codes)
    for step in range(5):
        quantizer(near(codes, [0, 1], step))
    assert torch.equal(quantizer.codebook[2:], codes[2:])
    torch.testing.assert_close(quantizer.counts[2:], torch.full((2,), 0.9**5))
    torch.testing.assert_close(quantizer.sums[2:], 0.9**5 * codes[2:])
    assert (quantizer.codebook[:2] != codes[:2]).any(dim=1).all()
    assert quantizer.idle.tolist() == [0, 0, 5, 5]


def test_unused_codes_stay_when_their_averages_have_vanished():
    quantizer = make(4, identity=True, codebook_size=4, l2_normalize=False, codebook_decay=0.01)
    codes = 3 * torch.eye(4)
    place(quantizer, codes)
    for step in range(60):
        quantizer(near(codes, [0, 1], step))
    assert quantizer.counts[2] == 0, "the averages should be gone by now"
    assert torch.equal(quantizer.codebook[2:], codes[2:])


@variants
def test_dead_codes_are_revived_after_exactly_so_many_steps(codebook, l2):
    options = {"codebook_size": 4, "l2_normalize": l2, "codebook": codebook, "codebook_decay": 0.9}
    revived = make(4, identity=True, revive_after=3, **options)
    plain = make(4, identity=True, revive_after=0, **options)
    codes = torch.eye(4)
    place(revived, codes)
    place(plain, codes)
    # Code 2 is used once more at the second step, so that code 3 dies at the third step, code 2 at the fifth.
    for step, used in enumerate([[0, 1], [0, 1, 2], [0, 1], [0, 1], [0, 1]], start=1):
        z = near(codes, used, step)
        revived(z)
        plain(z)
        dead = {3: 3, 5: 2}.get(step)
        if dead is not None:
            batch = revived.vectors(z)
            assert (batch - revived.codebook[dead]).norm(dim=1).min() < 1e-6, "a revived code is a latent of the batch"
            assert revived.idle[dead] == 0
            if codebook == "ema":
                # The statistics restart as those of an average code: 8 vectors over 4 codes.
                assert revived.counts[dead] == 2
                torch.testing.assert_close(revived.sums[dead], 2 * revived.codebook[dead])
        else:
            untouched = [code for code in (2, 3) if not (code == 3 and step > 3)]
            assert torch.equal(revived.codebook[untouched], plain.codebook[untouched]), step
        # What is used learns as if there were no revival; latents now nearest to a revived code are no longer theirs.
        if step <= 3:
            assert torch.equal(revived.codebook[:3], plain.codebook[:3])
            if codebook == "ema":
                assert torch.equal(revived.counts[:3], plain.counts[:3])
                assert torch.equal(revived.sums[:3], plain.sums[:3])


def test_a_revived_code_keeps_its_new_place_while_it_is_used():
    quantizer = make(4, identity=True, codebook_size=4, l2_normalize=False, revive_after=2, codebook_decay=0.9)
    codes = 3 * torch.eye(4)
    place(quantizer, codes)
    for step in range(2):
        quantizer(near(codes, [0, 1], step))
    moved = quantizer.codebook.clone()
    # Old statistics would drag the code back towards its old place: 3 times a unit vector away.
    for step in range(2, 6):
        quantizer(near(codes, [0, 1], step))
    assert (moved[2:] - codes[2:]).norm(dim=1).min() > 3
    assert (quantizer.codebook[2:] - moved[2:]).norm(dim=1).max() < 0.1


def patches(side: int = 2) -> Tensor:
    """Real latents: grey demo images (12 of 32x32), folded so that each position holds side x side pixels."""
    config = ImageConfig(size=[32, 32], channels=1)
    data = open_images("demo", "heldout", config)
    images = to_float(torch.stack([data[i].image for i in range(12)]))
    return F.pixel_unshuffle(images, side)


@variants
def test_kmeans_start_lowers_the_error(codebook, l2):
    z = patches()
    quantizer = make(4, identity=True, codebook_size=64, codebook=codebook, l2_normalize=l2).eval()
    before = quantizer(z)
    torch.manual_seed(3)
    quantizer.start(z)
    after = quantizer(z)
    assert after.loss < 0.5 * before.loss
    assert after.stats["usage"] > 0.9
    if codebook == "ema":
        share = z.numel() / 4 / 64
        torch.testing.assert_close(quantizer.sums, quantizer.codebook * share)
        assert (quantizer.counts == share).all()
    # The same random state starts the same codebook.
    again = make(4, identity=True, codebook_size=64, codebook=codebook, l2_normalize=l2)
    torch.manual_seed(3)
    again.start(z)
    assert torch.equal(again.codebook, quantizer.codebook)


def test_kmeans_beats_the_points_it_starts_from():
    vectors = patches().permute(0, 2, 3, 1).flatten(0, 2)

    def error(centres: Tensor) -> float:
        return (vectors - centres[nearest(vectors, centres)]).square().sum(1).mean().item()

    torch.manual_seed(0)
    chosen = error(vectors[torch.randperm(len(vectors))[:32]])
    torch.manual_seed(0)
    assert error(kmeans(vectors, 32)) < 0.8 * chosen


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("l2", [False, True])
def test_kmeans_start_with_fewer_vectors_than_codes(count, l2):
    z = latents(1, 6, 1, count)
    quantizer = make(identity=True, codebook_size=32, l2_normalize=l2).eval()
    quantizer.start(z)
    assert torch.isfinite(quantizer.codebook).all()
    out = quantizer(z)
    assert out.loss < 1e-3 and len(out.codes.unique()) == count


# ---- statistics ----


@variants
def test_statistics_of_known_histograms(codebook, l2):
    codes = torch.eye(4)
    quantizer = make(4, identity=True, codebook_size=4, codebook=codebook, l2_normalize=l2).eval()
    place(quantizer, codes)
    uniform = quantizer(near(codes, [0, 1, 2, 3])).stats
    assert uniform["perplexity"] == pytest.approx(4) and uniform["usage"] == 1
    one = quantizer(near(codes, [2])).stats
    assert one["perplexity"] == pytest.approx(1) and one["usage"] == 0.25
    uneven = quantizer(near(codes, [0, 1, 0, 0])).stats
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert uneven["perplexity"] == pytest.approx(math.exp(entropy)) and uneven["usage"] == 0.5


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_training_state_is_what_only_learning_needs(codebook):
    quantizer = make(codebook=codebook).eval()
    names = set(quantizer.state_dict())
    assert quantizer.training_state < names and "codebook" not in quantizer.training_state
    other = make(seed=5, codebook=codebook).eval()
    kept = {name: value for name, value in quantizer.state_dict().items() if name not in quantizer.training_state}
    own = {name: value for name, value in other.state_dict().items() if name in quantizer.training_state}
    other.load_state_dict({**kept, **own})
    z = latents()
    assert torch.equal(other(z).z_q, quantizer(z).z_q) and torch.equal(other.encode(z), quantizer.encode(z))
