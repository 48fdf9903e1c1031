"""Two processes on the CPU compute what one does, and hold the same codebook."""

import math
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.quantizers import quantizer_options
from processes import (
    PRIOR,
    TOKENIZE,
    TOKENIZER,
    Ended,
    in_step,
    kill_rank,
    launch,
    rows,
    run,
    run_together,
    steps,
    weights,
    write_images,
)
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from vqgen.artifact import load_artifact
from vqgen.tokenizer.quantizers import quantizer_for
from vqgen.tokenizer.quantizers.base import Quantizer
from vqgen.tokenizer.reconstruction import write_png_atomic
from vqgen.training.folder import read_sessions

# No dropout: its noise is each process's own.
STAGE_ONE = (
    "--data demo --channels 1 --size 16 --flip --width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 "
    "--codebook-size 32 --code-dim 4 --revive-after 2 --gan-weight 0.5 --gan-start 1 --gan-warmup 1 --gan-ramp 1 "
    "--gan-width 8 --gan-layers 2 --batch-size 16 --lr-warmup 2 --steps 6 --validation-images 40 --precision fp32 "
    "--log-every 1 --validate-every 4 --checkpoint-every 3"
).split()
STAGE_TWO = (
    "--dim 16 --layers 1 --heads 2 --dropout 0 --label-dropout 0 --preview-images 10 --lr-warmup 2 --batch-size 16 "
    "--steps 6 --precision fp32 --log-every 1 --validate-every 3 --checkpoint-every 3"
).split()
TOKENIZING = "--shard-size 50 --holdout 0.2 --precision fp32".split()
# `accelerate launch`, of this very environment.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 -m".split()


def alike(found: Path, expected: Path, names: list[str], tolerance: float) -> None:
    """The two histories have the same rows once each, and the same metrics under `names`."""
    assert [row["step"] for row in rows(found)] == [row["step"] for row in rows(expected)]
    for row, other in zip(rows(found), rows(expected)):
        for name in names:
            if name in other:
                assert row[name] == pytest.approx(other[name], rel=tolerance), (name, row["step"])


def main_alone_speaks(ended: list[Any]) -> None:
    """What is printed is printed once."""
    first, second = ended
    assert "step 6: " in first.ok().err
    assert "step 6: " not in second.ok().err


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer trained by one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    run(TOKENIZER, *STAGE_ONE, "--output", folder).ok()
    return folder


def test_broken_images_of_every_process_are_named_and_counted(tmp_path: Path) -> None:
    for split, count in ("train", 24), ("val", 4):
        (tmp_path / "in" / split).mkdir(parents=True)
        for index in range(count):
            image = torch.full((1, 16, 16), 9 * index, dtype=torch.uint8)
            write_png_atomic(tmp_path / "in" / split / f"{index:02d}.png", image)
    for index in (1, 3):  # in the share of the second process
        (tmp_path / "in" / "val" / f"{index:02d}.png").write_bytes(b"no image")
    words = [*STAGE_ONE, "--data", tmp_path / "in", "--max-broken", 0.2, "--output", tmp_path / "run"]
    first, second = run_together(TOKENIZER, *words)
    for index in (1, 3):
        assert first.ok().err.count(f"val/{index:02d}.png") == 1 and f"val/{index:02d}.png" not in second.ok().err
    assert "(2 broken images skipped)" in first.err


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two."""
    folder = tmp_path_factory.mktemp("double") / "run"
    main_alone_speaks(run_together(TOKENIZER, *STAGE_ONE, "--output", folder))
    return folder


def test_two_processes_train_the_tokenizer_that_one_does(single: Path, double: Path) -> None:
    first, expected = rows(double)[0], rows(single)[0]
    for name in ("reconstruction", "quantizer", "loss", "grad_norm", "lr"):
        assert first[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-5), name
    # Later steps follow, but for what differs by nature: rounding, and which random latent a revived code takes.
    alike(double, single, ["train/reconstruction", "heldout/psnr"], 0.05)
    assert "train/discriminator" in rows(double)[-2]
    tensors = load_artifact(double, "tokenizer").tensors
    assert tensors.keys() == load_artifact(single, "tokenizer").tensors.keys()


def test_two_processes_resume(tmp_path: Path, double: Path) -> None:
    """One of them alone receives a signal: they stop together where the run next logs, and resume exactly."""
    folder = tmp_path / "run"
    words = [*STAGE_ONE, "--output", folder]
    stopped = run_together(TOKENIZER, *words, "--log-every", 3, hooks=[None, in_step(2, signal.SIGTERM)])
    assert [ended.code for ended in stopped] == [143, 143], stopped
    assert steps(folder) == [3]
    main_alone_speaks(run_together(TOKENIZER, *words))
    assert weights(folder) == weights(double)
    assert rows(folder)[1:] == [row for row in rows(double) if row["step"] > 3]


def test_two_processes_refuse_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    ended = run_together(TOKENIZER, *STAGE_ONE, "--batch-size", 7, "--output", tmp_path / "run")
    assert all(process.code for process in ended)
    # The other may have found its partner gone before it came to look.
    next(process for process in ended if process.code == 2).refused(2, "--batch-size", "7", "2 processes")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, single: Path) -> Path:
    """Code files of 200 of the demo's images in five shards, made by one process."""
    folder = tmp_path_factory.mktemp("codes")
    write_images(folder / "images", 200)
    run(TOKENIZE, *TOKENIZING, "--data", folder / "images", "--tokenizer", single, "--output", folder / "codes").ok()
    return folder / "codes"


def test_two_processes_write_the_codes_that_one_does(tmp_path: Path, codes: Path, single: Path) -> None:
    words = [*TOKENIZING, "--data", codes.parent / "images", "--tokenizer", single, "--output", tmp_path / "codes"]
    first, second = run_together(TOKENIZE, *words)
    assert "training images" in first.ok().out and not second.ok().out, "each took all the work"
    names = [path.name for path in sorted(codes.glob("*.safetensors"))]
    assert names == [path.name for path in sorted((tmp_path / "codes").glob("*.safetensors"))] and len(names) >= 5
    for name in [*names, "manifest.json", "tokenizer/model.safetensors"]:
        assert (codes / name).read_bytes() == (tmp_path / "codes" / name).read_bytes(), name


def test_damaged_codes_are_refused_in_every_process(tmp_path: Path, codes: Path) -> None:
    """The main process alone checks them; the others ended in the errors of a lost connection."""
    damaged = tmp_path / "codes"
    shutil.copytree(codes, damaged)
    shard = min(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for process in run_together(PRIOR, *STAGE_TWO, "--codes", damaged, "--output", tmp_path / "run"):
        process.refused(1, shard.name)


def test_two_processes_train_the_prior_that_one_does(tmp_path: Path, codes: Path) -> None:
    words = ["--codes", codes, *STAGE_TWO, "--output"]
    run(PRIOR, *words, tmp_path / "one").ok()
    main_alone_speaks(run_together(PRIOR, *words, tmp_path / "two"))
    first, expected = rows(tmp_path / "two")[0], rows(tmp_path / "one")[0]
    assert first["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    # The gradient is summed in another order, and AdamW magnifies that where a gradient is about zero.
    names = ["train/loss", "train/grad_norm", "heldout/nats_per_token", "heldout/bits_per_dimension"]
    alike(tmp_path / "two", tmp_path / "one", names, 1e-3)


# What `accelerate launch` makes of a configuration with FSDP.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
PRIOR_NAMES = ["train/loss", "train/grad_norm", "heldout/nats_per_token"]


def _say_share() -> None:
    """A process prints which share of the prior, its average and its optimizer's state it holds at the end."""
    from vqgen.prior.trainer import PriorTrainer

    def share(tensors: list[Tensor]) -> float:
        return sum(getattr(t, "_local_tensor", t).numel() for t in tensors) / sum(t.numel() for t in tensors)

    save = PriorTrainer.save

    def finish(self: PriorTrainer) -> None:
        moments = [s["exp_avg"] for s in self.optimizers["prior"].state.values()]
        for tensors in (list(self.prior.parameters()), list(self.average.parameters()), moments):
            print(f"share {share(tensors):.2f}")
        save(self)

    PriorTrainer.save = finish  # type: ignore[method-assign]


def test_a_sharded_prior_trains_as_a_whole_one_does(tmp_path: Path, codes: Path) -> None:
    """Half of everything on each of two; 33 held-out images make three batches on one, two on the other."""
    words = ["--codes", codes, *STAGE_TWO, "--validation-images", 33, "--accumulate", 2, "--output"]
    run(PRIOR, *words, tmp_path / "one").ok()
    main, other = run_together(PRIOR, *words, tmp_path / "two", environ=FSDP, hooks=[_say_share, None])
    main_alone_speaks([main, other])
    assert main.out.split() == ["share", "0.50"] * 3
    alike(tmp_path / "two", tmp_path / "one", PRIOR_NAMES, 1e-3)
    ours, theirs = (load_artifact(tmp_path / name, "prior").tensors for name in ("two", "one"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-3)
    assert (tmp_path / "two" / "images").is_dir()


DDP: dict[str, str] = {}
CHANGES = {
    "fsdp-to-one": (FSDP, None),
    "one-to-fsdp": (None, FSDP),
    "ddp-to-one": (DDP, None),
    "one-to-ddp": (None, DDP),
}


def go(
    module: str, words: list[Any], environ: dict[str, str] | None, folder: Path, stop: int | None = None
) -> list[int]:
    """Train on two processes with this environment, or on one for None, at most to step `stop`; the checkpoints."""
    hook = in_step(stop, signal.SIGTERM) if stop else None
    words = [*words, "--output", folder]
    if environ is None:
        ended = [run(module, *words, hook=hook)]
    else:
        ended = run_together(module, *words, environ=environ, hooks=[None, hook])
    assert all(process.code == (143 if stop else 0) for process in ended), [process.err for process in ended]
    return steps(folder)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", CHANGES.values(), ids=CHANGES)
def test_a_prior_resumes_on_another_number_of_processes(
    tmp_path: Path, codes: Path, before: dict[str, str] | None, after: dict[str, str] | None
) -> None:
    words = ["--codes", codes, *STAGE_TWO]
    assert go(PRIOR, words, before, tmp_path / "run", stop=4)[-1] == 4
    go(PRIOR, words, after, tmp_path / "run")
    go(PRIOR, words, None, tmp_path / "undisturbed")
    alike(tmp_path / "run", tmp_path / "undisturbed", PRIOR_NAMES, 1e-3)


@pytest.mark.parametrize("before, after", [(DDP, None), (None, DDP)], ids=["to-one", "from-one"])
def test_a_tokenizer_resumes_on_another_number_of_processes(
    tmp_path: Path, single: Path, before: dict[str, str] | None, after: dict[str, str] | None
) -> None:
    assert go(TOKENIZER, STAGE_ONE, before, tmp_path / "run", stop=3)[-1] == 3
    go(TOKENIZER, STAGE_ONE, after, tmp_path / "run")
    # As in two processes from the start: which latent a revived code takes is each number's own.
    alike(tmp_path / "run", single, ["train/reconstruction", "heldout/psnr"], 0.05)


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_a_process_was_killed(tmp_path: Path, codes: Path) -> None:
    """Both start anew and go on from the checkpoint, to the losses of a run that was left alone."""
    # Restarts that share torchrun's store may read from it the address of a process that is dead.
    torchrun = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--standalone", "--nproc-per-node", "2"]
    words = ["--codes", codes, *STAGE_TWO, "--steps", 60, "--output"]

    def ended(folder: Path, killed: bool) -> Ended:
        # More than one: on a busy machine gloo now and then fails to connect in an attempt.
        started = launch([*torchrun, "--max-restarts", "3", "-m", PRIOR], *words, folder)
        if killed:
            kill_rank(started, 1, folder, after=7)
        return started.wait()

    for attempt in range(3):  # now and then it does in all restarts: then the whole is tried anew
        found = ended(tmp_path / f"run-{attempt}", True)
        if not found.code or "Gloo connectFullMesh failed" not in found.err:
            break
    found.ok()
    ended(tmp_path / "undisturbed", False).ok()
    (tmp_path / f"run-{attempt}").rename(tmp_path / "run")
    sessions = [read_sessions(tmp_path / name) for name in ("run", "undisturbed")]
    assert list(map(len, sessions)) == [2, 1] and 6 <= sessions[0][1]["first_step"] < 60
    alike(tmp_path / "run", tmp_path / "undisturbed", PRIOR_NAMES, 1e-3)


def test_what_fsdp_cannot_do_is_refused(tmp_path: Path, codes: Path) -> None:
    prior = ["--codes", codes, *STAGE_TWO, "--output", tmp_path / "run"]
    for module, words, environ, parts in (
        (TOKENIZER, [*STAGE_ONE, "--output", tmp_path / "run"], FSDP, ["FSDP", "only the prior"]),
        (PRIOR, prior, {**FSDP, "FSDP_VERSION": "1"}, ["fsdp_version 1", "fsdp_version: 2"]),
        (PRIOR, [*prior, "--optimizer", "muon"], FSDP, ["--optimizer", "muon", "adamw"]),
    ):
        ended = run_together(module, *words, environ=environ)
        assert all(process.code for process in ended)
        next(process for process in ended if process.code == 2).refused(2, *parts)


@pytest.mark.slow
def test_under_accelerate_launch(tmp_path: Path, double: Path) -> None:
    ended = launch([*LAUNCH, TOKENIZER], *STAGE_ONE, "--output", tmp_path / "run").wait().ok()
    assert ended.err.count("step 6: ") == 1
    assert weights(tmp_path / "run") == weights(double)
    assert rows(tmp_path / "run") == rows(double)


# The quantizer by itself: its codebook on two processes, each with half of the latents.

KINDS: dict[str, dict[str, Any]] = {
    "ema": {},
    "gradient": {"codebook": "gradient"},
    "euclidean": {"l2_normalize": False},
    "entropy": {"entropy_weight": 0.2, "entropy_temperature": 0.5},
    "residual": {"quantizer": "residual", "depth": 2},
    "residual-shared": {"quantizer": "residual", "depth": 2, "shared_codebook": True},
    "product": {"quantizer": "product", "depth": 2},
    "simvq": {"quantizer": "simvq", "estimator": "rotation"},
}
States = list[dict[str, Tensor]]


def _latents(step: int) -> Tensor:
    """Latents (8, 6, 4, 4) whose directions change with the steps, so that codes fall out of use."""
    generator = torch.Generator().manual_seed(step)
    shift = torch.tensor([math.cos(step), math.sin(step), 0, 0, 0, 0]).view(1, 6, 1, 1)
    return torch.randn(8, 6, 4, 4, generator=generator) + 3 * shift


def _quantizer(kind: str) -> Quantizer:
    torch.manual_seed(0)
    learning = {"revive_after": 3, "codebook_decay": 0.8} if kind != "simvq" else {}
    return quantizer_for(6, quantizer_options(codebook_size=24, code_dim=4, **learning, **KINDS[kind]))


def _step(quantizer: Quantizer, z: Tensor) -> dict[str, Tensor]:
    """Quantize once: the state afterwards, and the gradients of the parameters, averaged over the processes."""
    quantizer.zero_grad()
    out = quantizer(z)
    (out.loss + out.z_q.square().mean()).backward()
    found = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for name, parameter in quantizer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if dist.is_initialized():
            dist.all_reduce(grad)
            grad /= 2
        found[f"{name}.grad"] = grad
    return found


def _train_quantizers(rank: int, folder: str) -> None:
    """Start, update and revive codebooks of each kind on one process of two; all states go to a file of its own."""
    # Processes that no longer agree wait for each other: not for half an hour.
    wait = timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=wait)
    states: dict[str, States] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        quantizer = _quantizer(kind)
        torch.manual_seed(100 + rank)  # from here on each process draws its own numbers
        quantizer.initialize(_latents(0).chunk(2)[rank])
        states[kind].append({name: value.clone() for name, value in quantizer.state_dict().items()})
        for step in range(1, 10):
            states[kind].append(_step(quantizer, _latents(step).chunk(2)[rank]))
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[States]]:
    """Every state on both processes, of codebooks of each kind."""
    folder = tmp_path_factory.mktemp("codebooks")
    start_processes(_train_quantizers, (str(folder),), nprocs=2, start_method="forkserver")
    both = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return {kind: [found[kind] for found in both] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_codebooks_stay_the_same_on_both(codebooks: dict[str, list[States]], kind: str) -> None:
    ours, theirs = codebooks[kind]
    books = [name.removesuffix("idle") for name in ours[0] if name.endswith("idle")]
    vectors = 256 if kind == "residual-shared" else 128  # a step; it learns from those of both depths at once
    revived = 0
    for step, (state, other) in enumerate(zip(ours, theirs)):
        for name, value in state.items():
            assert torch.equal(value, other[name]), f"{name} differs after step {step}"
        for book in books if step else []:
            before = ours[step - 1]
            assert state[f"{book}idle"].max() < 3, "a code died and was not revived"
            moved = (state[f"{book}codes"] != before[f"{book}codes"]).any(dim=1)
            here = (before[f"{book}idle"] == 2) & (state[f"{book}idle"] == 0)
            # Without an optimizer a gradient codebook moves by revival alone; an EMA code revived has the mean count.
            here &= moved if kind == "gradient" else state[f"{book}weights"] == vectors / 24
            assert moved[here].all()
            revived += int(here.sum())
    assert revived or kind == "simvq", "no code fell out of use: revival was not seen"


@pytest.mark.parametrize("kind", KINDS)
def test_one_update_of_two_processes_is_that_of_one(codebooks: dict[str, list[States]], kind: str) -> None:
    """k-means start, update and gradients over both halves, as one process over the whole."""
    states = codebooks[kind][0]
    quantizer = _quantizer(kind)
    torch.manual_seed(100)
    quantizer.initialize(_latents(0))
    torch.testing.assert_close(dict(quantizer.state_dict()), states[0])
    torch.testing.assert_close(_step(quantizer, _latents(1)), states[1])
