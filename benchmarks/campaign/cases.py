"""One case: an input mutated as its number says, a program run on it, and the verdict."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Lock

from .mutations import REGISTRY, Change, Mutation, NotApplicable, choices, words
from .oracles import Results, Run, digests
from .place import Place, lay_out, outside, plant, snapshot
from .runner import Runner
from .scenarios import Scenario
from .verdict import CONTROL, Outcome, verdict

UNCHANGED = Change("unchanged")


@dataclass
class Campaign:
    """What all cases share."""

    seed: str
    stock: Path
    scratch: Path
    run: Runner
    scenarios: Sequence[Scenario]
    only: list[Mutation] = field(default_factory=list)
    """Mutations to use, where not all of them."""
    keep: bool = False
    """Keep the files of cases."""
    references: dict[str, tuple[Results, Path]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    making: dict[str, Lock] = field(default_factory=dict)

    def random(self, number: int | str) -> Random:
        return Random(f"{self.seed} {number}")

    def case(self, number: int) -> Outcome:
        """Run one case."""
        random = self.random(number)
        scenario = random.choices(self.scenarios, [each.weight for each in self.scenarios])[0]
        return self.execute(str(number), scenario, random)

    def control(self, scenario: Scenario) -> Outcome:
        """Run a scenario on unmutated inputs."""
        return self.execute(CONTROL, scenario, None)

    def reference(self, scenario: Scenario) -> tuple[Results, Path]:
        """Digests of the result on unmutated inputs, and the output folder; made once.

        Raises `RuntimeError` where the program fails on them, or the scenario's patterns find no result.
        """
        with self.lock:
            making = self.making.setdefault(scenario.name, Lock())
        with making:
            if scenario.name not in self.references:
                place = self._lay_out(scenario, f"reference-{self.scenarios.index(scenario)}")
                self.run.run(scenario.words, place.work, place.home).expect(scenario.words)
                output = place.work / scenario.output
                results = digests(output, scenario.results)
                if scenario.results and not results:
                    raise RuntimeError(f"{scenario.name}: no file of the output is {' or '.join(scenario.results)}")
                self.references[scenario.name] = results, output
        return self.references[scenario.name]

    def _lay_out(self, scenario: Scenario, name: str) -> Place:
        place = lay_out(self.scratch / name, self.stock, scenario.inputs)
        if scenario.planted:
            plant(place.work / scenario.output)
        return place

    def mutate(self, scenario: Scenario, place: Place, random: Random) -> tuple[str, str, Change]:
        """Mutate an input of the scenario: the file, the name of the mutation, and what it did."""
        if scenario.targets:
            found = {path for pattern in scenario.targets for path in place.work.glob(pattern)}
            given = (path for path in found if (self.stock / path.relative_to(place.work)).is_file())
            files = sorted(path for path in given if path.is_file())
            # A file that several patterns name is as likely as these together.
            files = [f for f in files for pattern in scenario.targets if f in place.work.glob(pattern)]
        else:
            line, known = place.home / "words.txt", place.home / "options.txt"
            place.home.mkdir(exist_ok=True)
            words.write(line, scenario.words)
            shutil.copyfile(self.stock / f"options-{scenario.program.replace(' ', '-')}.txt", known)
            files = [line]
        for _ in range(100):
            path = random.choice(files)
            groups = choices(path) if scenario.targets else {"words": REGISTRY["words"]}
            if self.only:
                groups = {
                    kind: fit for kind, all_ in groups.items() if (fit := [each for each in all_ if each in self.only])
                }
            if not groups:
                continue
            weights = {"bytes": 2, "entry": 2}  # of three groups; the structure of a file has the most ways to fail
            group = random.choices(list(groups), [weights.get(kind, 5) for kind in groups])[0]
            mutation = random.choice(groups[group])
            try:
                done = mutation(path, random, place)
            except NotApplicable:
                continue
            except Exception as error:
                text = f"the mutation {mutation.__name__} failed on {path}, for {scenario.program}"
                raise RuntimeError(text) from error
            target = path.relative_to(place.work).as_posix() if scenario.targets else ""
            return target, mutation.__name__, done if isinstance(done, Change) else Change(done)
        return "", "none", UNCHANGED

    def execute(self, name: str, scenario: Scenario, random: Random | None) -> Outcome:
        """Lay out the inputs, mutate them unless there is no `random`, run the program, and judge."""
        results, output = self.reference(scenario)
        place = self._lay_out(scenario, f"case-{name}" if random else f"control-{self.scenarios.index(scenario)}")
        inside = place.work / scenario.output
        # Whatever the program itself wrote into its output may go; everything else is the user's.
        own = {f"work/{scenario.output}"} | {
            path.relative_to(place.root).as_posix()
            for path in inside.rglob("*")
            if (self.stock / path.relative_to(place.work)).exists()
        }
        target, mutation, change = self.mutate(scenario, place, random) if random else ("", CONTROL, UNCHANGED)
        line = scenario.words
        if random and not scenario.targets:
            line = words.read(place.home / "words.txt")
        before = snapshot(place)
        ended = self.run.run(line, place.work, place.home)
        after = snapshot(place)
        moved = outside(place, scenario.output, before, own, after)
        if not scenario.targets:  # the line may have named any output
            moved = [text for text in moved if not text.startswith("created") or "pwned" in text]
        try:
            found = digests(inside, scenario.results) if ended.code == 0 else {}
        except (OSError, ValueError) as error:
            found = {str(error): ""}
        run = Run(place, self.stock, inside, target, change, ended, found, results, output, line)
        outcome = verdict(name, scenario, mutation, run, moved)
        if not self.keep:
            for path in [place.root, *place.root.rglob("*")]:
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o700)
            shutil.rmtree(place.root, ignore_errors=True)
        return outcome
