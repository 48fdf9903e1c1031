"""The quantizer: its contract for every variant, how the codebook learns, and vector-quantize-pytorch as the oracle."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.quantizers import Largest, latents, pass_through, same, same_under_autocast, state
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from vqgen.errors import UsageError
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.quantizers import codebook as codebooks
from vqgen.tokenizer.quantizers import search as search
from vqgen.tokenizer.quantizers.codebook import Codebook, entropies, with_gradient
from vqgen.tokenizer.quantizers.options import VQConfig
from vqgen.tokenizer.quantizers.search import kmeans, nearest
from vqgen.tokenizer.quantizers.vq import VectorQuantizer

VARIANTS = [(codebook, l2) for codebook in ("ema", "gradient") for l2 in (True, False)]
variants = pytest.mark.parametrize(("codebook", "l2"), VARIANTS)


def make(dim=6, seed=0, identity=False, **options) -> VectorQuantizer:
    """A quantizer of latents with `dim` channels; `identity` leaves them as they are on the way in and out."""
    torch.manual_seed(seed)
    options = {"codebook_size": 16, "code_dim": dim if identity else 4, "revive_after": 0, **options}
    quantizer = VectorQuantizer(dim, VQConfig(**options))
    if identity:
        pass_through(quantizer, dim)
    return quantizer


def place(quantizer: VectorQuantizer, codes: Tensor) -> None:
    """Put the codes where a test wants them, with the averages of a fresh codebook."""
    quantizer.codebook.codes.data.copy_(codes)
    if quantizer.config.codebook == "ema":
        quantizer.codebook.weights.fill_(1)


def sums(codebook: Codebook) -> Tensor:
    """The moving average of the sum of each code's vectors (K, d)."""
    return codebook.weights[:, None] * codebook.codes


# ---- precision and options ----


@variants
def test_bf16_autocast_changes_no_code(codebook, l2):
    quantizer = make(codebook=codebook, l2_normalize=l2, codebook_size=256, code_dim=6, identity=True).eval()
    z = latents(8, 6, 16, 16)
    codes = quantizer.encode(z)
    flat, table = quantizer.vectors(z).bfloat16(), quantizer.codebook.table().bfloat16()
    low = (table.square().sum(1) - 2 * flat @ table.T).argmin(1).view_as(codes)
    assert (low != codes).float().mean() > 0.01, "these latents would not show codes taken in bf16"
    same_under_autocast(quantizer, z)


def test_bf16_autocast_changes_neither_learning_nor_start():
    quantizer = make(revive_after=1, codebook_size=64)
    z = latents(8, 6, 8, 8)
    plain, cast = copy.deepcopy(quantizer), copy.deepcopy(quantizer)
    torch.manual_seed(0)
    plain.initialize(z)
    plain(z)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        cast.initialize(z)
        cast(z)
    assert same(state(plain), state(cast))


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
        VQConfig(**{option: value})
    assert "\n" not in str(caught.value)


# ---- the nearest code ----


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    codes=st.integers(1, 70),
    dim=st.integers(1, 6),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    rows=st.integers(1, 50),
    groups=st.integers(1, 9),
    columns=st.integers(1, 5),
    unit=st.booleans(),
)
def test_nearest_is_brute_force_whatever_the_tiles(seed, count, codes, dim, scale, rows, groups, columns, unit):
    random = torch.Generator().manual_seed(seed)
    vectors = scale * torch.randn(count, dim, generator=random)
    table = scale * torch.randn(codes, dim, generator=random)
    if unit:
        vectors, table = scale * F.normalize(vectors, dim=1), F.normalize(table, dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_GROUPS", groups)
        patch.setattr(search, "_tile", lambda device: (rows, groups * columns))
        found = nearest(vectors, table, unit)
    distances = (vectors[:, None].double() - table[None].double()).square().sum(-1)
    assert found.shape == (count,) and found.dtype == torch.int64
    # Up to ties: the code found is as near as the nearest, within the rounding of float32.
    chosen = distances.gather(1, found[:, None])[:, 0]
    assert (chosen - distances.min(1).values).max() <= 1e-5 * max(scale, scale**2)


@pytest.mark.parametrize("size", [1024, 5000, 16384])
@pytest.mark.parametrize("unit", [False, True])
def test_nearest_of_many_codes(size, unit):
    """Tiles as they are: several of them, and codes that do not divide into groups."""
    random = torch.Generator().manual_seed(size)
    vectors, table = (F.normalize(torch.randn(n, 8, generator=random), dim=1) for n in (300, size))
    if not unit:
        table = table * (1 + 0.2 * torch.rand(size, 1, generator=random))
    found = nearest(vectors, table, unit)
    distances = torch.cdist(vectors.double(), table.double()).square()
    expected = distances.argmin(1)
    assert (found == expected).float().mean() > 0.99
    assert (distances.gather(1, found[:, None])[:, 0] - distances.min(1).values).max() < 1e-6


def test_nearest_of_nothing():
    assert nearest(torch.zeros(0, 3), torch.zeros(4, 3)).tolist() == []


def test_the_distance_matrix_is_never_whole():
    vectors, table = torch.randn(20_000, 8), torch.randn(4096, 8)
    with Largest() as naive:
        torch.cdist(vectors[:2000], table)
    assert naive.elements >= 2000 * 4096, "the watch does not see what it must"
    most = math.prod(search._tile(torch.device("cpu")))
    with Largest() as seen:
        nearest(vectors, table)
    assert seen.elements <= max(most, 20_000 * 8) < 20_000 * 4096 / 10

    quantizer = make(8, identity=True, codebook_size=4096)
    z = vectors[:2000].T.reshape(1, 8, 50, 40)
    with Largest() as seen:
        quantizer(z)
        quantizer.encode(z)
        quantizer.initialize(z[..., :5])
    assert seen.elements <= max(most, 4096 * 8)


# ---- losses and gradients ----


@variants
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.5])
def test_loss_by_hand(codebook, l2, weight):
    quantizer = make(codebook=codebook, l2_normalize=l2, commitment_weight=weight).eval()
    z = latents()
    out = quantizer(z)
    flat = torch.einsum("bdhw,cd->bhwc", z, quantizer.project_in.weight[:, :, 0, 0]) + quantizer.project_in.bias
    table = quantizer.codebook.codes
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
        (reached,) = torch.autograd.grad((out.z_q * upstream).sum(), quantizer.codebook.codes, allow_unused=True)
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
        return z.grad, quantizer.codebook.codes.grad

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


# ---- the rotation trick ----


def rotation(z: Tensor, q: Tensor) -> Tensor:
    """The matrix of the rotation in the plane of z and q that turns z's direction to q's, by its angle; float64."""
    z, q = z / z.norm(), q / q.norm()
    cosine = z @ q
    across = q - cosine * z
    across = across / across.norm()
    plane = torch.stack([z, across], dim=1)  # an orthonormal basis of it
    sine = (1 - cosine**2).sqrt()
    turned = torch.stack([cosine * z + sine * across, cosine * across - sine * z], dim=1)
    return torch.eye(len(z), dtype=z.dtype) - plane @ plane.T + turned @ plane.T


def test_rotation_gradient_is_that_of_the_rotated_and_scaled_vector():
    z, q = (torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    upstream = torch.randn_like(z)
    z.requires_grad_()
    out = with_gradient(z, q, "rotation")
    assert torch.equal(out, q)
    out.backward(upstream)
    for row in range(7):
        matrix = rotation(z[row].detach(), q[row])
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64))
        scaled = matrix * (q[row].norm() / z[row].detach().norm())
        torch.testing.assert_close(scaled @ z[row].detach(), q[row])
        torch.testing.assert_close(z.grad[row], scaled.T @ upstream[row])


def test_rotation_parity():
    z, q, upstream = latents(3, 6, 4, 4).permute(0, 2, 3, 1), latents(3, 4, 4, 6, 5), latents(3, 4, 4, 6, 6)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = with_gradient(ours.flatten(0, 2), q.flatten(0, 2), "rotation")
    expected = rotate_to(theirs, q)
    torch.testing.assert_close(out.view(z.shape), expected)
    out.backward(upstream.flatten(0, 2))
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not torch.allclose(ours.grad, upstream, atol=0.1), "copied, not rotated"


@pytest.mark.parametrize("opposite", [0.0, -1.0, -2.0])
def test_rotation_gradient_is_finite_where_no_plane_is(opposite):
    q = latents(1, 6, 1, 4)[0, :, 0].T
    z = (opposite * q).requires_grad_()
    with_gradient(z, q, "rotation").backward(torch.ones_like(q))
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("l2", [False, True])
def test_rotation_parity_of_the_whole_quantizer(l2):
    ours = make(8, identity=True, codebook_size=32, l2_normalize=l2, estimator="rotation")
    theirs = oracle(ours, use_cosine_sim=l2, rotation_trick=True, decay=0.99, commitment_weight=0.25)
    for step in range(3):
        z, upstream = latents(2, 8, 4, 5, seed=step).requires_grad_(), latents(2, 8, 4, 5, seed=100 + step)
        copied = z.detach().clone().requires_grad_()
        out, (quantized, codes, loss) = ours(z), theirs(copied)
        assert torch.equal(out.codes, codes)
        torch.testing.assert_close(out.z_q, quantized)
        (out.loss + (out.z_q * upstream).sum()).backward()
        (loss + (quantized * upstream).sum()).backward()
        torch.testing.assert_close(z.grad, copied.grad)


# ---- directions ----


def test_scaled_has_the_values_and_the_gradient_of_normalize():
    codebook = make(codebook_size=4).codebook
    z = torch.cat([latents(1, 6, 1, 9)[0, :, 0].T, torch.zeros(1, 6), torch.full((1, 6), 1e-20)]).requires_grad_()
    upstream = torch.randn(11, 6)
    out, expected = codebook.scaled(z), F.normalize(z, dim=1)
    torch.testing.assert_close(out, expected)
    (found,) = torch.autograd.grad(out, z, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, z, upstream)[0])
    double = z[:9].detach().double().requires_grad_()
    assert torch.autograd.gradcheck(codebook.scaled, double)


# ---- the entropy loss ----


def soft_entropies(flat: Tensor, table: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, whole."""
    distances = (flat[:, None] - table[None]).square().sum(-1)
    p = (-distances / temperature).softmax(dim=1)
    each = torch.special.entr(p).sum(dim=1).mean()
    return each, torch.special.entr(p.mean(dim=0)).sum()


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("limit", [1, 100, 10_000])
def test_entropies_are_those_of_the_definition(monkeypatch, temperature, limit):
    monkeypatch.setattr(codebooks, "_SOFT_ELEMENTS", limit)
    flat = latents(1, 3, 1, 40)[0, :, 0].T.double().requires_grad_()
    table = latents(1, 3, 1, 13, seed=2)[0, :, 0].T.double().requires_grad_()
    found, expected = entropies(flat, table, temperature, True), soft_entropies(flat, table, temperature)
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two)
        grads = torch.autograd.grad(one, (flat, table), retain_graph=True)
        torch.testing.assert_close(grads, torch.autograd.grad(two, (flat, table), retain_graph=True))


@variants
def test_entropy_loss_of_the_quantizer(codebook, l2):
    """Its value and gradients are those of the codes before they learned, though they move in place."""
    options = {"codebook": codebook, "l2_normalize": l2, "revive_after": 1, "commitment_weight": 0.0}
    quantizer = make(identity=True, entropy_weight=0.3, entropy_temperature=0.2, entropy_diversity=0.7, **options)
    z = latents().requires_grad_()
    codes = quantizer.codebook.codes.detach().clone().requires_grad_(codebook == "gradient")
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    if l2:
        flat, table = F.normalize(flat, dim=1), F.normalize(codes, dim=1)
    else:
        table = codes
    each, mean = soft_entropies(flat, table, 0.2)
    expected = 0.3 * (each - 0.7 * mean)
    out = quantizer(z)
    assert not torch.equal(quantizer.codebook.codes, codes), "nothing moved: nothing was tested"
    if codebook == "gradient":
        expected = expected + F.mse_loss(table[out.codes.flatten()], flat.detach())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close((out.stats["entropy_each"], out.stats["entropy_mean"]), (each, mean))
    out.loss.backward()
    inputs = (z, codes) if codebook == "gradient" else (z,)
    grads = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(z.grad, grads[0])
    if codebook == "gradient":
        torch.testing.assert_close(quantizer.codebook.codes.grad, grads[1])


def test_entropy_loss_wants_sure_choices_and_even_use():
    """By gradient alone latents move to codes, to different ones."""
    quantizer = make(4, identity=True, codebook_size=8, l2_normalize=False, commitment_weight=0.0, entropy_weight=1.0)
    config = quantizer.config
    config.entropy_temperature = 0.5
    quantizer.eval()
    z = (0.3 * latents(1, 4, 4, 4)).requires_grad_()
    first = quantizer(z)
    for _ in range(60):
        (grad,) = torch.autograd.grad(quantizer(z).loss, z)
        z = (z - 2 * grad).detach().requires_grad_()
    last = quantizer(z)
    assert last.stats["entropy_each"] < 0.5 * first.stats["entropy_each"]
    assert last.stats["entropy_mean"] > 0.95 * math.log(8)


def test_the_soft_choices_are_never_whole(monkeypatch):
    monkeypatch.setattr(codebooks, "_SOFT_ELEMENTS", 2**17)
    flat, table = torch.randn(500, 4, requires_grad=True), torch.randn(4096, 4, requires_grad=True)
    with Largest() as seen:
        each, mean = entropies(flat, table, 0.1, True)
        (each - mean).backward()
    assert seen.elements <= 2**17 < 500 * 4096 / 10
    assert flat.grad.any() and table.grad.any()


# ---- vector-quantize-pytorch as the oracle ----


def oracle(ours: VectorQuantizer, **options) -> VectorQuantize:
    """The library's quantizer with the codebook of `ours`; its defaults are decay 0.8 and commitment 1.0."""
    dim, size = ours.config.code_dim, ours.config.codebook_size
    options = {"rotation_trick": False, **options}
    library = VectorQuantize(dim, size, eps=0.0, accept_image_fmap=True, **options)
    library._codebook.embed.data.copy_(ours.codebook.codes[None])
    library._codebook.embed_avg.copy_(ours.codebook.codes[None])
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
    torch.testing.assert_close(ours.codebook.codes, theirs.codebook)
    torch.testing.assert_close(sums(ours.codebook), theirs._codebook.embed_avg[0])
    if not l2:
        torch.testing.assert_close(ours.codebook.weights, theirs._codebook.cluster_size[0])
    assert unused, "unused codes are where implementations differ"
    assert not torch.equal(
        ours.codebook.codes, make(8, identity=True, codebook_size=32, l2_normalize=l2).codebook.codes
    )


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
    torch.testing.assert_close(ours.codebook.codes.grad, theirs._codebook.embed.grad[0])


# ---- how the codebook learns ----


def near(codes: Tensor, which: list[int], seed: int = 0) -> Tensor:
    """A batch of latents (1, D, 1, 8) that lie near the given codes."""
    noise = 0.01 * torch.randn(8, codes.shape[1], generator=torch.Generator().manual_seed(seed))
    return (codes[[which[i % len(which)] for i in range(8)]] + noise).T[None, :, None]


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("size", [24, 300])  # fewer and more codes than vectors
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_moving_averages_are_those_of_the_paper(l2, size, decay):
    """van den Oord et al., appendix A.1, with both averages in float64, over many steps of changing latents."""
    quantizer = make(5, identity=True, codebook_size=size, l2_normalize=l2, codebook_decay=decay)
    codes = quantizer.codebook.codes.double()
    counts, totals = torch.ones(size, dtype=torch.float64), codes.clone()
    seen = torch.zeros(size, dtype=torch.bool)
    for step in range(150):
        z = 0.7 * latents(1, 5, 8, 8, seed=step) + latents(1, 5, 1, 1, seed=step // 10)
        out = quantizer(z)
        flat, taken = z.permute(0, 2, 3, 1).flatten(0, 2).double(), F.one_hot(out.codes.flatten(), size).double()
        flat = F.normalize(flat, dim=1) if l2 else flat
        counts = decay * counts + (1 - decay) * taken.sum(0)
        totals = decay * totals + (1 - decay) * taken.T @ flat
        used = taken.any(0)
        seen |= used
        mean = F.normalize(totals, dim=1) if l2 else totals / counts[:, None]
        codes = torch.where(used[:, None], mean, codes)
        torch.testing.assert_close(quantizer.codebook.codes, codes.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums(quantizer.codebook), totals.float(), rtol=1e-4, atol=1e-5)
    if l2:
        torch.testing.assert_close(quantizer.codebook.codes.norm(dim=1), torch.ones(size))
    assert seen.sum() > 5 and (quantizer.codebook.idle > 3).any()


def test_unused_codes_stay_while_their_averages_fade():
    quantizer = make(4, identity=True, codebook_size=4, l2_normalize=False, codebook_decay=0.9)
    codes = 3 * torch.eye(4)
    place(quantizer, codes)
    for step in range(5):
        quantizer(near(codes, [0, 1], step))
    assert torch.equal(quantizer.codebook.codes[2:], codes[2:])
    torch.testing.assert_close(quantizer.codebook.weights[2:], torch.full((2,), 0.9**5))
    assert (quantizer.codebook.codes[:2] != codes[:2]).any(dim=1).all()
    assert quantizer.codebook.idle.tolist() == [0, 0, 5, 5]


def test_unused_codes_stay_when_their_averages_have_vanished():
    quantizer = make(4, identity=True, codebook_size=4, l2_normalize=False, codebook_decay=0.01)
    codes = 3 * torch.eye(4)
    place(quantizer, codes)
    for step in range(60):
        quantizer(near(codes, [0, 1], step))
    assert quantizer.codebook.weights[2] == 0, "the averages should be gone by now"
    assert torch.equal(quantizer.codebook.codes[2:], codes[2:])


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
        stats = revived(z).stats
        plain(z)
        dead = {3: 3, 5: 2}.get(step)
        assert stats["codes_revived"] == (dead is not None)
        if dead is not None:
            batch = revived.codebook.scaled(revived.vectors(z))
            nearest_latent = (batch - revived.codebook.codes[dead]).norm(dim=1).min()
            assert nearest_latent < 1e-6, "a revived code is a latent of the batch"
            assert revived.codebook.idle[dead] == 0
            if codebook == "ema":
                # The statistics restart as those of an average code: 8 vectors over 4 codes.
                assert revived.codebook.weights[dead] == 2
        else:
            untouched = [code for code in (2, 3) if not (code == 3 and step > 3)]
            assert torch.equal(revived.codebook.codes[untouched], plain.codebook.codes[untouched]), step
        # What is used learns as if there were no revival; latents now nearest to a revived code are no longer theirs.
        if step <= 3:
            assert torch.equal(revived.codebook.codes[:3], plain.codebook.codes[:3])
            if codebook == "ema":
                assert torch.equal(revived.codebook.weights[:3], plain.codebook.weights[:3])


def test_a_revived_code_keeps_its_new_place_while_it_is_used():
    quantizer = make(4, identity=True, codebook_size=4, l2_normalize=False, revive_after=2, codebook_decay=0.9)
    codes = 3 * torch.eye(4)
    place(quantizer, codes)
    for step in range(2):
        quantizer(near(codes, [0, 1], step))
    moved = quantizer.codebook.codes.clone()
    # Old statistics would drag the code back towards its old place: 3 times a unit vector away.
    for step in range(2, 6):
        quantizer(near(codes, [0, 1], step))
    assert (moved[2:] - codes[2:]).norm(dim=1).min() > 3
    assert (quantizer.codebook.codes[2:] - moved[2:]).norm(dim=1).max() < 0.1


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_dead_codes_take_a_vector_each_and_the_rest_wait(codebook):
    quantizer = make(4, identity=True, codebook_size=30, l2_normalize=False, codebook=codebook, revive_after=9)
    codes = torch.randn(30, 4, generator=torch.Generator().manual_seed(3)) + 100
    codes[7] = 0
    place(quantizer, codes)
    book = quantizer.codebook
    book.idle.fill_(20)
    for step in range(1, 5):  # every latent takes code 7, or one that was revived; the others lie far away
        z = latents(1, 4, 2, 4, seed=step)
        before = book.codes.detach().clone()
        quantizer(z)
        flat = quantizer.vectors(z)
        moved = [code for code in range(30) if (before[code] > 90).all() and (book.codes[code] < 90).all()]
        assert moved == sorted(moved) and len(moved) == min(8, 29 - 8 * (step - 1))
        taken = [(flat == book.codes[code]).all(dim=1).nonzero().item() for code in moved]
        assert len(set(taken)) == len(taken), "two codes at one place"
        assert not book.idle[moved].any()
        if codebook == "ema":
            assert (book.weights[moved] == 8 / 30).all()
    assert (book.codes < 90).all()


def test_reviving_without_a_look_changes_nothing_where_none_is_dead():
    """On a GPU nobody looks whether any code is dead."""
    quantizer = make(4, identity=True, codebook_size=6, revive_after=3)
    quantizer(latents(1, 4, 4, 4))
    book, before = quantizer.codebook, state(quantizer)
    flat = book.scaled(quantizer.vectors(latents(1, 4, 4, 4)))
    book._revive(flat, book.choose(flat), torch.zeros(6, dtype=torch.bool))
    assert same(before, state(quantizer))


def test_an_average_of_codebooks_compares_directions_still():
    """Averaged codes are shorter than 1: they get unit length where they are used, and by `reset_training_state`."""
    quantizer = make(codebook_size=64).eval()
    quantizer.codebook.codes.mul_(torch.linspace(0.2, 0.9, 64)[:, None])
    z = latents(8, 6, 8, 8)
    codes, decoded = quantizer.encode(z), quantizer.decode(quantizer.encode(z))
    flat, table = quantizer.codebook.scaled(quantizer.vectors(z)), F.normalize(quantizer.codebook.codes, dim=1)
    assert torch.equal(codes.flatten(), (flat @ table.T).argmax(dim=1))
    quantizer.reset_training_state()
    torch.testing.assert_close(quantizer.codebook.codes.norm(dim=1), torch.ones(64))
    assert torch.equal(quantizer.encode(z), codes)
    torch.testing.assert_close(quantizer.decode(codes), decoded)


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
    quantizer.initialize(z)
    after = quantizer(z)
    assert after.loss < 0.5 * before.loss
    assert after.stats["usage"] > 0.9
    if codebook == "ema":
        weights, share = quantizer.codebook.weights, z.numel() / 4 / 64
        # The mean count; of directions, the length of their sum, which is less than their number.
        assert (weights > 0).all() and (weights <= share * 1.0001).all() if l2 else (weights == share).all()
    # The same random state starts the same codebook.
    again = make(4, identity=True, codebook_size=64, codebook=codebook, l2_normalize=l2)
    torch.manual_seed(3)
    again.initialize(z)
    assert torch.equal(again.codebook.codes, quantizer.codebook.codes)


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
    quantizer.initialize(z)
    assert torch.isfinite(quantizer.codebook.codes).all()
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
    assert quantizer.training_state < names and "codebook.codes" not in quantizer.training_state
    other = make(seed=5, codebook=codebook).eval()
    kept = {name: value for name, value in quantizer.state_dict().items() if name not in quantizer.training_state}
    own = {name: value for name, value in other.state_dict().items() if name in quantizer.training_state}
    other.load_state_dict({**kept, **own})
    z = latents()
    assert torch.equal(other(z).z_q, quantizer(z).z_q) and torch.equal(other.encode(z), quantizer.encode(z))
