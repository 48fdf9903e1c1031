"""What a prior is trained on: each option against its formula, and that it changes what it should and nothing else."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import conditioning_of, small_prior, tokens_for

from vqgen.devices import matrix_rate
from vqgen.errors import UsageError
from vqgen.prior.objective import accuracy, corrupted, objective
from vqgen.prior.options import ObjectiveConfig
from vqgen.prior.vocabulary import Vocabulary

CODES = Vocabulary(11, 1, (2, 3))


def given(seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(4, 6, 11), torch.randint(11, (4, 6))


def test_accuracy_is_the_share_among_the_likeliest():
    logits, targets = given()
    wanted = torch.rand(4, 6) < 0.5
    for weights, chosen in ((None, torch.ones_like(wanted)), (wanted / wanted.float().mean(), wanted)):
        found = accuracy(logits, targets, weights)
        for k in (1, 5):
            right = (logits.topk(k).indices == targets[..., None]).any(-1)
            torch.testing.assert_close(found[f"top{k}_accuracy"], right[chosen].float().mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_terms_are_their_formulas(smoothing, z):
    logits, targets = given()
    terms, total = objective(logits, targets, ObjectiveConfig(label_smoothing=smoothing, z_loss=z), CODES)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    smoothed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    squared = z * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(terms["cross-entropy"], plain)
    torch.testing.assert_close(total, smoothed + squared)
    assert set(terms) == {"cross-entropy", *(["smoothing"] if smoothing else []), *(["z-loss"] if z else [])}


def test_smoothing_reaches_only_the_codes_that_may_follow():
    """Ids of the conditions and codes of another depth are never targets, and keep their low probabilities."""
    config, vocabulary = ObjectiveConfig(label_smoothing=0.3), Vocabulary(5, 2, (1, 3))
    logits, targets = given()[0].requires_grad_(), torch.tensor([0, 7, 3, 5, 4, 9]).expand(4, 6)
    terms, total = objective(logits, targets, config, vocabulary)
    total.backward()
    wanted = torch.zeros(6, 11)
    for position, target in enumerate(targets[0]):
        wanted[position, slice(*vocabulary.allowed(position))] = 0.3 / 5
        wanted[position, target] += 0.7
    log = logits.detach().log_softmax(-1)
    torch.testing.assert_close(total, -(wanted * log).sum(-1).mean())
    torch.testing.assert_close(terms["cross-entropy"], F.nll_loss(log.flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(logits.grad, (log.exp() - wanted) / 24)


def test_half_precision_logits_are_summed_in_float32():
    logits, targets = given()
    config = ObjectiveConfig(label_smoothing=0.1, z_loss=0.1)
    exact = objective(logits.bfloat16().double(), targets, config, CODES)[1]
    found = objective(logits.bfloat16(), targets, config, CODES)[1]
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=1e-5)


def test_z_loss_pulls_the_normaliser_to_one():
    logits, targets = (given()[0] + 5).requires_grad_(), given()[1]
    optimizer = torch.optim.SGD([logits], 5.0)
    for _ in range(300):
        optimizer.zero_grad()
        objective(logits, targets, ObjectiveConfig(z_loss=1.0), CODES)[1].backward()
        optimizer.step()
    assert logits.logsumexp(-1).abs().max() < 0.5


@pytest.mark.parametrize("depth", [1, 3])
def test_corruption_replaces_codes_by_codes_of_their_depth(depth):
    conditioning = conditioning_of(50, depth, (8, 8), 4, ["a", "b", "c", "d"])
    vocabulary = conditioning.vocabulary
    codes = torch.randint(50, (64, 8, 8, depth) if depth > 1 else (64, 8, 8))
    tokens = torch.cat([conditioning.prefixes(conditioning.conditions(), range(64)), vocabulary.to_tokens(codes)], 1)
    torch.manual_seed(0)
    found = corrupted(tokens, 0.3, conditioning)
    assert torch.equal(found[:, 0], tokens[:, 0])
    for position in range(vocabulary.length):
        start, end = vocabulary.allowed(position)
        assert ((found[:, 1 + position] >= start) & (found[:, 1 + position] < end)).all()
    # One in 50 is replaced by itself.
    assert (found != tokens).float().mean() == pytest.approx(0.3 * 0.98, abs=0.03)
    assert corrupted(tokens, 0.0, conditioning) is tokens
    assert not (corrupted(tokens, 1.0, conditioning)[:, 1:] == tokens[:, 1:]).float().mean() > 0.05


def test_labels_are_dropped_at_their_share_and_the_given_stay():
    conditioning = conditioning_of(8, 1, (2, 3), 3)
    conditioning.classes.dropout = 0.2
    tokens = torch.full((10_000, 7), 1)
    tokens[:, 0] = 9
    torch.manual_seed(0)
    found = conditioning.dropped(tokens)
    assert (tokens[:, 0] == 9).all() and torch.equal(found[:, 1:], tokens[:, 1:])
    assert set(found[:, 0].tolist()) == {9, conditioning.null}
    assert (found[:, 0] == conditioning.null).float().mean() == pytest.approx(0.2, abs=0.02)


OUTSIDE = [(name, value) for name in ("token_corruption", "label_smoothing") for value in (-0.1, 1.5, math.nan)]
OUTSIDE += [("label_dropout", value) for value in (-0.1, 1, 1.5, math.nan)] + [("z_loss", -0.1), ("z_loss", math.nan)]


@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: "):
        ObjectiveConfig(**{name: value})


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_checkpointing_changes_no_gradient(backbone):
    found = []
    for checkpointing in (False, True):
        prior = small_prior(backbone).train()
        if checkpointing:
            prior.checkpoint_gradients()
        torch.manual_seed(1)  # the same dropout, also when it is computed again
        prior(tokens_for(prior)).square().mean().backward()
        found.append([p.grad for p in prior.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_operations_are_counted_by_hand():
    prior = small_prior()  # width 16, 2 layers, hidden 64, 8 codes + 3 classes + null, 6 codes an image
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 64) + 16 * 12
    assert prior.flops_per_token() == 2 * matrices + 2 * 4 * 16 * 6


def test_the_matrix_rate_is_a_rate():
    rate = matrix_rate(torch.device("cpu"), "no")
    assert 1e8 < rate < 1e15
