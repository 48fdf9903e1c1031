"""Randomness as a function of (seed, step), and checkpoints, which need nothing else to resume."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vqgen.errors import UserError
from vqgen.seeding import BLOCK, WINDOW, _scattered, _window, epoch_slice, hash64, step_seed, window_slice
from vqgen.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint

# ---- the order of examples ----


@given(count=st.integers(1, 50), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_each_epoch_holds_every_example_once(count, seed, epoch):
    order = epoch_slice(count, seed, epoch * count, count)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(count))


@given(count=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_an_order_that_is_computed_is_a_permutation_too(count, seed, epoch):
    order = _scattered(count, seed, epoch, np.arange(count))
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(count))
    assert np.array_equal(_scattered(count, seed, epoch, np.arange(count)[::-3]), order[::-3])


def test_a_billion_examples_are_shuffled_in_no_memory():
    count = 10**9
    first, second = (epoch_slice(count, 0, start, 50_000) for start in (0, count))
    for order in (first, second):
        assert len(set(order.tolist())) == len(order) and 0 <= order.min() <= order.max() < count
        # Uniform: each tenth of the range gets a tenth, and neighbours are a third of the range apart.
        assert np.abs(np.histogram(order, 10, (0, count))[0] / 5000 - 1).max() < 0.06
        assert abs(np.abs(np.diff(order)).mean() / count - 1 / 3) < 0.01
    assert (first != second).all()
    both = epoch_slice(count, 0, count - 5, 10)
    assert np.array_equal(both[5:], second[:5]) and np.array_equal(epoch_slice(count, 0, count - 5, 5), both[:5])


@given(
    count=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 500),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5),
)
def test_a_slice_depends_on_its_position_alone(count, seed, start, sizes):
    """Slices of any sizes, across epochs and in any order of calls, are pieces of one endless sequence."""
    ends = list(itertools.accumulate(sizes, initial=start))
    pieces = [epoch_slice(count, seed, at, size) for at, size in reversed(list(zip(ends, sizes)))]
    whole = epoch_slice(count, seed, start, sum(sizes))
    assert np.array_equal(np.concatenate(pieces[::-1]), whole)
    one_by_one = [epoch_slice(count, seed, at, 1)[0] for at in range(start, start + min(sum(sizes), 20))]
    assert one_by_one == whole[:20].tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_slice(20, seed, 20 * epoch, 20)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    first = [epoch_slice(20, seed, 0, 1)[0] for seed in range(200)]
    assert len(set(first)) == 20, "any example may come first"


def test_a_slice_that_is_changed_changes_no_other():
    before = epoch_slice(10, 0, 0, 10)
    epoch_slice(10, 0, 0, 10)[:] = 0
    assert np.array_equal(epoch_slice(10, 0, 0, 10), before)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 5000), batch=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_each_epoch_of_windows_holds_every_example_once(count, batch, seed):
    order = np.concatenate([window_slice(count, seed, step, batch) for step in range(2 * count // batch + 1)])
    first, second = order[:count], order[count : 2 * count]
    assert order.dtype == np.int64 and sorted(first.tolist()) == sorted(second.tolist()) == list(range(count))
    assert count < 50 or (first != second).any()
    _window.cache_clear()
    step = count // batch
    assert np.array_equal(window_slice(count, seed, step, batch), order[step * batch : (step + 1) * batch])


def test_the_neighbours_of_a_block_have_one_place_in_batches_of_one_window():
    count, batch = 3 * WINDOW * 8 + 1000, 8
    steps = np.stack([window_slice(count, 5, step, batch) for step in range(3 * WINDOW)]).reshape(3, WINDOW, batch)
    for window in steps:
        blocks = window // BLOCK
        assert all((np.unique(blocks[:, place], return_counts=True)[1] == BLOCK).all() for place in range(batch))
        assert len(np.unique(blocks)) == WINDOW * batch // BLOCK, "a block is at one place"
        runs = np.diff(blocks, axis=0) != 0
        assert runs.mean() > 0.6, "the blocks of a place are mixed: three in four batches go on to another one"
    # Over a billion, too, blocks are from everywhere.
    far = np.concatenate([window_slice(10**9, 0, step, 64) for step in range(0, 40 * WINDOW, WINDOW)])
    assert np.abs(np.histogram(far, 4, (0, 10**9))[0] / 640 - 1).max() < 0.15


def test_step_seeds_are_distinct_and_fit_every_generator():
    places = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (11,), (1, 1), (-1,), (12, 3), (1, 23)]
    seeds = [step_seed(seed, *place) for seed in range(50) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))
    np.random.default_rng(max(seeds))
    assert step_seed(3, 4, 5) == step_seed(3, 4, 5)


def test_step_seeds_are_the_same_everywhere():
    """A run resumed by another version of Python or on another machine draws the same."""
    # printf '7\0-1' | b2sum -l 64, its bytes in reverse order.
    assert hash64(7, -1) == int.from_bytes(bytes.fromhex("045a9d6cbf516af0"), "little")
    assert step_seed(7, -1) == hash64(7, -1) >> 1
    assert hash64("1", "23") != hash64("12", "3") != hash64("123")
    assert hash64("\udce9.png") != hash64("e.png"), "names of files that are no valid text have a place too"


# ---- checkpoints ----


class Net(nn.Module):
    def __init__(self, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)


def trained(seed: int = 0, steps: int = 3) -> tuple[Net, torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    net = Net(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        train(net, optimizer, schedule, step)
    return net, optimizer, schedule


def train(net: Net, optimizer, schedule, step: int) -> None:
    torch.manual_seed(step)
    net.norm(net.linear(torch.randn(8, 4))).square().sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def saved(folder: Path, step: int, seed: int = 0, keep: int = 2) -> Path:
    net, optimizer, schedule = trained(seed)
    return save_checkpoint(folder, step, {"net": net}, {"o": optimizer, "s": schedule}, {"best": 1.5}, keep)


def test_a_restored_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    net, optimizer, schedule = trained()
    path = save_checkpoint(tmp_path, 3, {"net": net}, {"o": optimizer, "s": schedule}, {"best": 1.5}, 2)
    other, other_optimizer, other_schedule = trained(seed=9, steps=1)
    state = load_checkpoint(path, {"net": other}, {"o": other_optimizer, "s": other_schedule})
    assert state["step"] == 3 and state["extra"] == {"best": 1.5}
    for step in range(3, 6):
        train(net, optimizer, schedule, step)
        train(other, other_optimizer, other_schedule, step)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    assert schedule.get_last_lr() == other_schedule.get_last_lr()


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100, 2000):
        saved(tmp_path, step)
        (tmp_path / ".step-00009999.1.part").mkdir(exist_ok=True)  # what a kill left behind is no checkpoint
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000100", "step-00002000"]
    assert checkpoints(tmp_path / "none") == []


def test_a_checkpoint_can_be_written_again(tmp_path):
    saved(tmp_path, 5)
    path = saved(tmp_path, 5, seed=3)
    net, optimizer, schedule = trained(seed=7)
    load_checkpoint(path, {"net": net}, {"o": optimizer, "s": schedule})
    assert torch.equal(net.linear.weight, trained(seed=3)[0].linear.weight)


def test_a_gradient_scaler_comes_and_goes(tmp_path):
    """Where `auto` is fp16 on one machine and another precision on the next."""
    net, optimizer, schedule = trained()
    parts, scaler = {"o": optimizer, "s": schedule}, torch.amp.GradScaler("cpu", init_scale=8.0)
    without = save_checkpoint(tmp_path, 3, {"net": net}, parts, {}, 2)
    load_checkpoint(without, {"net": net}, {**parts, "scaler": scaler})
    assert scaler.get_scale() == 8
    scaled = save_checkpoint(tmp_path, 4, {"net": net}, {**parts, "scaler": scaler}, {}, 2)
    load_checkpoint(scaled, {"net": net}, parts)
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0)
    load_checkpoint(scaled, {"net": net}, {**parts, "scaler": fresh})
    assert fresh.get_scale() == 8
    with pytest.raises(UserError, match=r"optimizers\.pt"):
        load_checkpoint(scaled, {"net": net}, {**parts, "another": optimizer})


def test_no_pickle_is_run(tmp_path):
    """A checkpoint from elsewhere holds a call in place of an optimizer: it is refused, not called."""
    path = saved(tmp_path, 5)

    class Call:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"o": Call(), "s": {}}, path / "optimizers.pt")
    refused(path)
    assert not (tmp_path / "ran").exists()


def refused(path: Path, net: nn.Module | None = None) -> str:
    fresh, optimizer, schedule = trained(steps=1)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, {"net": net or fresh}, {"o": optimizer, "s": schedule})
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["net.safetensors", "optimizers.pt", "state.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "other"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, name, damage):
    path = saved(tmp_path, 5)
    data = (path / name).read_bytes()
    if damage == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": b"something else"}[damage])
    refused(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    assert "net.safetensors" in refused(saved(tmp_path, 5), Net(width=6))
