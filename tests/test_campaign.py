"""The hostile campaign itself: mutations repeat, and verdicts see what they are there for."""

import dataclasses
import faulthandler
import json
import os
import pickle
import re
import signal
import socket
import time
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from benchmarks.campaign import kills, stock, zygote
from benchmarks.campaign.cases import Campaign
from benchmarks.campaign.mutations import (
    KINDS,
    REGISTRY,
    Change,
    NotApplicable,
    choices,
    load,
    mutation,
    tensors,
    words,
)
from benchmarks.campaign.oracles import Run, damage_is_found, same
from benchmarks.campaign.place import Place, lay_out, outside, plant, snapshot
from benchmarks.campaign.runner import Ended
from benchmarks.campaign.scenarios import scenarios
from benchmarks.campaign.table import failures, markdown
from benchmarks.campaign.verdict import CONTROL, Outcome, verdict
from vqgen.sampling.compression.archive import Header, Picture, Stream, write_archive

ROOT = Path(__file__).parents[1]
FILES = (
    "image.png",
    "image.jpg",
    "image.gif",
    "a.json",
    "a.jsonl",
    "a.yaml",
    "a.safetensors",
    "a.pt",
    "a.parquet",
    "a.vqc",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of every kind that has mutations of its own."""
    folder = tmp_path_factory.mktemp("stock") / "files"
    folder.mkdir()
    pictures = stock.pictures()
    for name, source in (("image.png", "00-rgb.png"), ("image.jpg", "05-exif.jpeg"), ("image.gif", "08-moving.gif")):
        (folder / name).write_bytes(pictures[source])
    tree = {"step": 3, "n": 8, "list": [1, "a"], "part": {"x": 0.5}}
    (folder / "a.json").write_text(json.dumps(tree))
    (folder / "a.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (folder / "a.yaml").write_text(yaml.dump(tree))
    tensors = {"codes": np.zeros((3, 4), np.uint8), "w": np.ones(5, np.float32), "v": np.zeros(5, np.float32)}
    save_file(tensors, folder / "a.safetensors")
    torch.save({"state_dict": {"w": torch.ones(3)}}, folder / "a.pt")
    rows = [{"bytes": pictures["00-rgb.png"], "path": "a.png"}] * 4
    header = Header("0", "a", "b", "exact", 64, "c", [Picture("a.png", 16, 16)], [Stream(3, 0)])
    write_archive(folder / "a.vqc", header, [np.arange(3, dtype=np.uint32)])
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 0, 1]}), folder / "a.parquet")
    return folder.parent


def tree_of(place: Place) -> dict[str, object]:
    """What the case holds; archives of torch.save hold their time."""
    found = snapshot(place).items()
    return {
        name: entry.kind if name.endswith(".pt") else f"{entry.kind} {entry.content.partition(' ')[0]}"
        for name, entry in found
    }


def mutated(inputs: Path, root: Path, name: str, function, seed: int) -> tuple[object, dict[str, object]]:
    place = lay_out(root, inputs, ["files"])
    try:
        return function(place.work / "files" / name, Random(seed), place), tree_of(place)
    except NotApplicable:
        return None, {}
    finally:
        for path in place.root.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)


@pytest.mark.parametrize("name", FILES)
def test_mutations_are_a_function_of_the_seed_and_change_something(inputs, tmp_path, name):
    before = tree_of(lay_out(tmp_path / "case", inputs, ["files"]))
    for kind, functions in choices(Path(name)).items():
        if kind in ("bytes", "entry") and name != "a.json":
            continue  # the same for every file
        for function in functions:
            done = []
            for seed in (0, 1, 2):
                first, second = (mutated(inputs, tmp_path / "case", name, function, seed) for _ in range(2))
                assert first == second, function.__name__
                done.append(first[0] is not None and (name.endswith(".pt") or first[1] != before))
            narrow = (
                "samples_list",
                "other_file",
                "swapped",
                "unix_socket",
                "out_of_range",
                "sizes",
                "exif",
                "linked_folder",
            )
            assert any(done) or function.__name__ in narrow, function.__name__


def test_every_kind_of_file_has_mutations():
    assert {*KINDS.values(), "bytes", "entry", "words"} == set(REGISTRY)


def test_mutations_of_command_lines_change_words(tmp_path):
    place = lay_out(tmp_path, tmp_path, [])
    line = place.work / "words.txt"
    (place.work / "options.txt").write_text("--seed\n--size")
    given = ["vqgen-sample", "--n", "4", "--output", "out"]
    for seed, function in enumerate(REGISTRY["words"] * 5):
        words.write(line, given)
        try:
            said = function(line, Random(seed), place)
        except NotApplicable:
            continue
        found = words.read(line)
        assert found[0] == given[0] and (found != given or said.startswith("swap")), said
        (place.work / "pipe").unlink(missing_ok=True)


def test_mutations_of_other_people_are_loaded(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from benchmarks.campaign.mutations import Change, mutation\n"
        "@mutation('json')\n"
        "def to_three(path, random, place):\n"
        "    path.write_text('3')\n"
        "    return Change('three', invalid=True)\n"
    )
    (own,) = load(tmp_path / "mine.py")
    assert own.__name__ == "to_three" and own in choices(Path("x.json"))["json"]
    REGISTRY["json"].remove(own)


def test_jobs_and_scenarios_name_inputs_that_the_stock_makes():
    made = Path(stock.__file__).read_text(encoding="utf-8")
    for scenario in scenarios():
        for name in scenario.inputs:
            assert f'"{name.partition("/")[0]}"' in made or name.startswith("parquet"), name
        assert scenario.targets or scenario.kind == "command lines"
    for job in kills.jobs():
        for name in (*job.inputs, *filter(None, [job.begun])):
            assert f'"{name.partition("/")[0]}"' in made, name
    assert len({job.name for job in kills.jobs()}) == len(kills.jobs())


def test_every_program_is_killed_but_those_that_are_named(project):
    covered = {job.program for job in kills.jobs()}
    assert sorted(project["project"]["scripts"]) == sorted([*covered, *kills.UNCOVERED])
    told = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in told for name in kills.UNCOVERED)


# ---- verdicts ----


def run_of(tmp_path: Path, ended: Ended, change: Change = Change("x"), results=(), reference=()) -> Run:  # noqa: B008
    place = Place(tmp_path)
    out = place.work / "out"
    return Run(place, tmp_path, out, "a.json", change, ended, dict(results), dict(reference), out, ["vqgen-sample"])


def judged(tmp_path, ended, change=Change("x"), results=(), reference=(), moved=(), oracle=same) -> Outcome:  # noqa: B008
    scenario = dataclasses.replace(scenarios()[0], oracle=oracle)
    return verdict("1", scenario, "m", run_of(tmp_path, ended, change, results, reference), list(moved))


def ended(code: int, err: str = "", hang: bool = False) -> Ended:
    return Ended(code, "", err, hang, 1.0)


LINE = "vqgen-sample: a.json cannot be read as JSON; restore it\n"
TRACEBACK = (
    "Traceback (most recent call last):\n  x\nKeyError: 'a'\nvqgen-sample: this is a defect of vqgen; report it\n"
)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (ended(0), "ok"),
        (ended(1, LINE), "refused"),
        (ended(2, "50%|#### | 1/2\r 100%|####| 2/2\n" + LINE), "refused"),
        (ended(1, "vqgen-sample: something went wrong\n"), "clumsy"),
        (ended(1, "vqgen-sample: --n \x1b[31mred\n"), "clumsy"),
        (ended(-11), "crash"),
        (ended(-9, hang=True), "hang"),
        (ended(1, TRACEBACK), "unhandled"),
        (ended(1), "unhandled"),
        (ended(3, LINE), "unhandled"),
        (ended(1, LINE * 2), "unhandled"),
    ],
)
def test_what_a_program_ends_with_is_told_apart(tmp_path, given, found):
    assert judged(tmp_path, given).verdict == found


def test_another_result_is_silent_unless_it_is_right(tmp_path):
    one, other = {"w": "1"}, {"w": "2"}
    assert judged(tmp_path, ended(0), results=one, reference=one).verdict == "ok"
    assert judged(tmp_path, ended(0), results=one, reference=other).verdict == "silent"
    assert judged(tmp_path, ended(0), results={}, reference=other).verdict == "silent"
    assert judged(tmp_path, ended(0), Change("x", honest=True), one, other).verdict == "ok"
    invalid = Change("NaN", invalid=True)
    anything = lambda run: ""  # noqa: E731
    assert judged(tmp_path, ended(0), invalid, one, other, oracle=anything).verdict == "silent"
    assert judged(tmp_path, ended(0), invalid, one, one, oracle=anything).verdict == "ok"
    assert judged(tmp_path, ended(0), Change("x"), one, other, oracle=anything).verdict == "ok"


def test_a_check_that_overlooks_damage_is_silent(tmp_path):
    """--verify has no results; its oracle compares the shard with the one that was written."""
    (verify,) = (each for each in scenarios() if each.oracle is damage_is_found)
    place, stock = Place(tmp_path / "case"), tmp_path / "stock"
    for folder, content in ((place.work, b"damaged"), (stock, b"written")):
        (folder / "codes").mkdir(parents=True)
        (folder / "codes" / "codes-00000.safetensors").write_bytes(content)
    words, shard = ["vqgen-tokenize", "--verify"], "codes/codes-00000.safetensors"
    run = Run(place, stock, place.work / "out", shard, Change("x"), ended(0), {}, {}, place.work / "out", words)
    assert verdict("1", verify, "m", run, []).detail == "damage was not found"
    (place.work / shard).write_bytes(b"written")
    assert verdict("1", verify, "m", run, []).verdict == "ok"


def test_what_changes_outside_of_the_output_is_seen(tmp_path):
    def changes(act) -> list[str]:
        place = lay_out(tmp_path / "case", tmp_path, [])
        (place.work / "out" / "checkpoints").mkdir(parents=True)
        (place.work / "out" / "model").write_text("old")
        plant(place.work / "out")
        before = snapshot(place)
        act(place)
        return outside(place, "out", before, {"work/out/model", "work/out"}, snapshot(place))

    assert changes(lambda place: (place.work / "out" / "model").unlink()) == []
    assert changes(lambda place: (place.work / "out" / "new").touch()) == []
    assert changes(lambda place: (place.home).mkdir()) == []
    assert changes(lambda place: place.victims[0].unlink()) == ["removed victim.txt"]
    assert changes(lambda place: place.victims[1].write_text("x")) == ["changed work/victim.txt"]
    assert changes(lambda place: place.victims[1].chmod(0o600)) == ["changed work/victim.txt"]
    assert changes(lambda place: (place.work / "out" / "thesis.txt").unlink()) == ["removed work/out/thesis.txt"]
    assert changes(lambda place: (place.work / "stray").touch()) == ["created work/stray"]
    assert outside(Place(tmp_path), "out", {}, set(), {}) == []

    def through_link(place: Place) -> None:
        (place.elsewhere / "step-00000002" / "state.json").unlink()

    assert changes(through_link) == ["removed elsewhere/step-00000002/state.json"]


def request(**values: object) -> dict:
    return {"limit": 0.3, "kill_after": 0, **values}


def forked(act) -> int:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            act()
        finally:
            os._exit(0)
    return pid


def test_the_zygote_tells_crashes_hangs_and_kills_apart():
    def crash() -> None:
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)

    crashed = zygote._wait(forked(crash), request(limit=30))
    assert crashed[:2] == (-signal.SIGSEGV, False)
    code, hang, _ = zygote._wait(forked(lambda: time.sleep(60)), request())
    assert hang and code == -signal.SIGKILL
    code, hang, seconds = zygote._wait(forked(lambda: time.sleep(60)), request(kill_after=0.1))
    assert (code, hang) == (-signal.SIGKILL, False) and seconds < 20
    assert zygote._wait(forked(lambda: None), request(limit=30))[:2] == (0, False)


def test_a_program_dies_before_the_operation_that_is_named(tmp_path):
    def act() -> None:
        zygote._count_operations(2, "keep", str(tmp_path / "log"))
        (tmp_path / "other").touch()
        (tmp_path / "keep-1").write_text("x")
        (tmp_path / "keep-1").rename(tmp_path / "keep-2")

    assert zygote._wait(forked(act), request(limit=30))[0] == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep-1", "log", "other"]
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_the_table_counts_and_failures_are_repeated_by_their_number(tmp_path):
    outcomes = [judged(tmp_path, ended(0)), judged(tmp_path, ended(-11))]
    tried = {"killed": [kills.Tried("kill-3", "tokenize, new", "killed before operation 3", False, "differs: x")]}
    assert "| images | 2 | 1 | 0 | 0 | 1 |" in markdown(outcomes, tried) and "| killed | 1 | 0 |" in markdown(
        outcomes, tried
    )
    assert [each.case for each in failures(outcomes, tried)] == ["1", "kill-3"]


@pytest.mark.parametrize(("code", "counted"), [(0, False), (1, True), (2, True)])
def test_a_control_that_is_refused_is_a_failure(tmp_path, code, counted):
    """A program that refuses every input would pass otherwise."""
    control = dataclasses.replace(judged(tmp_path, ended(code, LINE)), mutation=CONTROL)
    mutated = dataclasses.replace(control, mutation="flipped_bits")
    assert failures([control, mutated], {}) == [control] * counted


class Refusing:
    """In place of a runner: every program ends with this code and writes nothing."""

    def __init__(self, code: int) -> None:
        self.code = code

    def run(self, words, folder, home, *given, **more) -> Ended:
        return ended(self.code, LINE)


@pytest.mark.parametrize(("code", "said"), [(1, LINE), (0, "codes-*.safetensors")], ids=["refused", "nothing written"])
def test_a_scenario_has_a_result_on_valid_inputs(inputs, tmp_path, code, said):
    """Without one, no result of damaged inputs could be found to be another."""
    scenario = dataclasses.replace(scenarios()[0], inputs=("files",), targets=("files/*",))
    assert scenario.results
    with pytest.raises(RuntimeError, match=re.escape(said)):
        Campaign("0", inputs, tmp_path, Refusing(code), [scenario]).case(0)


def test_registering_needs_a_kind():
    @mutation("json")
    def mine(path, random, place):
        return "x"

    assert REGISTRY["json"].pop() is mine
    assert socket.AF_UNIX  # sockets are among the mutations


def test_the_code_in_pickles_would_run(tmp_path):
    for state_dict in (False, True):
        mark = tmp_path / f"mark-{state_dict}"
        pickle.loads(tensors.pickled_code(mark, state_dict))
        assert mark.exists()
