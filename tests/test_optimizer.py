"""Muon beside `torch.optim.Muon`, which parameters it takes, and that its state survives a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantizers import quantizer_options
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import VQConfig
from vqgen.training.checkpoint import load_checkpoint, save_checkpoint
from vqgen.training.optimizer import Muon, averaged, optimizer_for, orthogonalised, update_average
from vqgen.training.options import OptimizerConfig
from vqgen.training.schedule import Plan

SETTINGS = OptimizerConfig(optimizer="muon", lr=1e-2, weight_decay=0.1, lr_warmup=0, lr_schedule="constant_with_warmup")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 40))


def walk(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, seed: int = 1) -> None:
    made = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(32, 48, generator=made)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (33, 33), (128, 1152)])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_singular_values_come_near_one(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], precision: str) -> None:
    monkeypatch.setattr("vqgen.training.optimizer.precision_of", lambda *_: precision)
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-6, 1.0, 1e3])[:, None, None]
    for given, made in zip(matrices, orthogonalised(matrices).float(), strict=True):
        u, _, v = torch.linalg.svd(given, full_matrices=False)
        # What is left of it in its own singular vectors is a diagonal near 1: nothing was turned.
        inner = u.T @ made @ v.T
        assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.3
        assert (inner - inner.diagonal().diag()).norm() < 0.05 * inner.norm()


def test_matrices_move_as_torchs_muon_and_the_rest_as_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgen.training.optimizer.precision_of", lambda *_: "bf16")  # as torch's, whatever the hardware
    ours, theirs = net(), net()
    optimizer, _ = optimizer_for(ours, SETTINGS, Plan(100))
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    rest = [p for p in theirs.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    walk(ours, [optimizer], 1)
    walk(theirs, [muon, adamw], 1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    # Both round to bfloat16, in products of other shapes: later steps agree less closely.
    walk(ours, [optimizer], 10, seed=2)
    walk(theirs, [muon, adamw], 10, seed=2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_moves_as_its_matrix(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(48, 32, 3, 3), torch.randn(48, 32, 3, 3)
    conv = nn.Parameter(weight.clone(memory_format=layout))
    matrix = nn.Parameter(weight.flatten(1).clone())
    for parameter, given in ((conv, gradient.to(memory_format=layout)), (matrix, gradient.flatten(1))):
        parameter.grad = given
        Muon([{"params": [parameter], "muon": True}], 1e-2, (0.9, 0.95)).step()
    torch.testing.assert_close(conv.flatten(1), matrix, rtol=0, atol=1e-4)
    assert not torch.equal(conv, weight)


def taken(model: nn.Module) -> set[str]:
    optimizer, _ = optimizer_for(model, SETTINGS, Plan(10))
    held = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    return {name for name, p in model.named_parameters() if id(p) in held}


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_prior_it_takes_neither_embeddings_nor_head(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    names = taken(LlamaForCausalLM(config))
    assert len(names) == 7 and all(".self_attn." in name or ".mlp." in name for name in names)


def test_of_a_tokenizer_it_takes_neither_codebook_nor_pixels() -> None:
    quantizer = VQConfig(codebook_size=64, code_dim=32, codebook="gradient")
    model = VQGANConfig(width=32, multipliers=[1, 1], blocks=1, latent_dim=32, groups=4)
    names = taken(Tokenizer(TokenizerConfig([16, 16], 3, model, quantizer)))
    shapes = {name: p.shape for name, p in Tokenizer(TokenizerConfig([16, 16], 3, model, quantizer)).named_parameters()}
    assert any("codebook" in name for name in shapes) and not any("codebook" in name for name in names)
    assert all(shapes[name].numel() // shapes[name][0] >= 32 and shapes[name][0] >= 32 for name in names)
    assert len(names) > 10


SMALL = VQGANConfig(width=32, multipliers=[1, 1], blocks=1, latent_dim=32, groups=4)
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda options=options: Tokenizer(TokenizerConfig([16, 16], 3, SMALL, quantizer_options(**options)))
        for name, options in {
            "vq": {},
            "vq-gradient": {"codebook": "gradient", "code_dim": 32},
            "residual": {"quantizer": "residual", "depth": 2},
            "residual-gradient": {"quantizer": "residual", "depth": 2, "codebook": "gradient", "code_dim": 32},
            "product-gradient": {"quantizer": "product", "depth": 2, "codebook": "gradient", "code_dim": 32},
            "simvq": {"quantizer": "simvq", "code_dim": 32},
            "gumbel": {"quantizer": "gumbel", "codebook_size": 64, "code_dim": 32},
            "fsq": {"quantizer": "fsq"},
            "lfq": {"quantizer": "lfq", "codebook_size": 64},
        }.items()
    },
    **{
        name: lambda name=name: Prior(
            PriorConfig(backbone=name, dim=64, layers=1, heads=2),
            Conditioning(Vocabulary(64, 1, (2, 2)), [Classes(3)]),
            (3, 8, 8),
            "0" * 64,
        )
        for name in ("llama", "qwen3", "gpt2")
    },
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_the_groups_are_those_of_version_0_1(name: str, kind: Any) -> None:
    """Checkpoints hold the optimizer's state by index: it went by names of parameters then."""
    model, groups = MODELS[name](), dict[tuple[float, bool], list[str]]()
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for parameter, p in model.named_parameters():
        matrix = p.ndim >= 2 and "codebook" not in parameter
        wide = matrix and min(p.flatten(1).shape) >= 32 and id(p) not in looked_up and "lm_head" not in parameter
        groups.setdefault((0.1 if matrix else 0.0, wide and kind == "muon"), []).append(parameter)
    names = {id(p): parameter for parameter, p in model.named_parameters()}
    optimizer, _ = optimizer_for(model, OptimizerConfig(optimizer=kind, weight_decay=0.1), Plan(10))
    found = [((g["weight_decay"], g["muon"]), [names[id(p)] for p in g["params"]]) for g in optimizer.param_groups]
    assert found == list(groups.items())


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    straight = net()
    optimizer, schedule = optimizer_for(straight, SETTINGS, Plan(10))
    walk(straight, [optimizer], 3)
    states = {"optimizer": optimizer, "schedule": schedule}
    path = save_checkpoint(tmp_path, 3, {"net": straight}, states, {}, keep=1)
    walk(straight, [optimizer], 3, seed=7)
    resumed = net(seed=5)
    optimizer, schedule = optimizer_for(resumed, SETTINGS, Plan(10))
    load_checkpoint(path, {"net": resumed}, {"optimizer": optimizer, "schedule": schedule})
    walk(resumed, [optimizer], 3, seed=7)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns_what_adamw_learns_slowly() -> None:
    """Linear regression on inputs of scales three orders of magnitude apart, and along no axis, as Adam's rates are."""
    losses = {}
    for kind in ("adamw", "muon"):
        torch.manual_seed(0)
        turned = torch.linalg.qr(torch.randn(64, 64)).Q
        inputs, target = torch.randn(512, 64) * torch.logspace(0, -3, 64) @ turned, torch.randn(64, 64) / 8
        model = nn.Linear(64, 64, bias=False)
        settings = OptimizerConfig(optimizer=kind, lr=0.02, weight_decay=0.0, lr_warmup=0)
        optimizer, schedule = optimizer_for(model, settings, Plan(200))
        for _ in range(200):
            model.zero_grad()
            (model(inputs) - inputs @ target.T).square().mean().backward()
            optimizer.step()
            schedule.step()
        # How far the map itself is from the one to be found, in all directions alike.
        losses[kind] = (model.weight - target).square().mean().item()
    assert losses["muon"] < losses["adamw"]


def test_a_loaded_state_lies_beside_the_parameters() -> None:
    """Also the step counts of AdamW's part: on a GPU its fused update takes them from nowhere else."""
    model = net()
    optimizer, _ = optimizer_for(model, SETTINGS, Plan(10))
    walk(model, [optimizer], 1)
    other = net().to("meta")
    resumed, _ = optimizer_for(other, SETTINGS, Plan(10))
    resumed.load_state_dict(optimizer.state_dict())
    tensors = [value for state in resumed.state.values() for value in state.values() if torch.is_tensor(value)]
    assert len(tensors) == 3 + 3 * 3 and {value.device.type for value in tensors} == {"meta"}


def test_the_average_is_that_of_torch(device: str) -> None:
    """Bit for bit, integer buffers included, and the counter stays on the host."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).to(device)
    ours, theirs = averaged(model), averaged(model)
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 6, device=device))  # batch norm counts its batches
        update_average(ours, model, 0.9, step)
        theirs.multi_avg_fn = get_ema_multi_avg_fn(min(0.9, (1 + step) / (10 + step)))
        theirs.update_parameters(model)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    assert ours.n_averaged.device.type == "cpu"
