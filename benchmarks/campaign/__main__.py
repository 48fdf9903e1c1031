"""`python -m benchmarks.campaign`: see the docstring of the package and docs/robustness.md."""

import argparse
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from . import stock, table
from .cases import Campaign
from .kills import Kills, Tried
from .mutations import load
from .runner import runner
from .scenarios import scenarios
from .verdict import Outcome

T = TypeVar("T", Outcome, Tried)


def options(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="mutated inputs")
    parser.add_argument(
        "--kills", type=int, default=200, help="kills; a fifth as many full disks, a tenth as many pairs"
    )
    parser.add_argument("--seed", default="0", help="decides every case")
    parser.add_argument("--workers", type=int, default=2, help="cases at the same time")
    parser.add_argument("--only", nargs="*", metavar="CASE", help="run these cases alone and keep their files")
    parser.add_argument("--mutations", nargs="*", type=Path, default=[], metavar="FILE.py", help="further mutations")
    parser.add_argument("--only-mutations", action="store_true", help="use those of --mutations alone")
    parser.add_argument("--scratch", type=Path, help="an empty folder to work in, kept; by default a temporary one")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args(words)


def progress(results: Iterable[T], count: int, what: str) -> Iterator[T]:
    """Pass results on; print how far it is now and then, and each failure with what repeats it."""
    start = shown = time.monotonic()
    for number, each in enumerate(results, 1):
        if each.failed:
            print(each.line, flush=True)
        if time.monotonic() - shown > 30 or number == count:
            shown = time.monotonic()
            print(f"{number} of {count} {what}, {shown - start:.0f} s", file=sys.stderr, flush=True)
        yield each


def main(words: list[str] | None = None) -> int:
    """Run the campaign; 1 where anything happened that must not."""
    given = options(words)
    warnings.simplefilter("ignore")  # of decoders, about images that are damaged on purpose
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    own = [each for file in given.mutations for each in load(file)]
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="vqgen-campaign-"))
    (scratch / "stock").mkdir(parents=True)
    start = time.monotonic()
    try:
        with runner(given.workers) as run, ThreadPoolExecutor(given.workers) as pool:
            print("making valid inputs", file=sys.stderr, flush=True)
            stock.make(scratch / "stock", run)
            campaign = Campaign(given.seed, scratch / "stock", scratch, run, scenarios())
            campaign.keep = given.only is not None
            campaign.only = own if given.only_mutations else []
            kills = Kills(campaign)

            def each(function: Callable[[int], T], numbers: list[int], what: str) -> list[T]:
                return list(progress(pool.map(function, numbers), len(numbers), what))

            def chosen(name: str, count: int) -> list[int]:
                if given.only is None:
                    return list(range(count))
                return [int(word.rpartition("-")[2]) for word in given.only if word.rpartition("-")[0] == name]

            tried: dict[str, list[Tried]] = {}
            outcomes: list[Outcome] = []
            if given.only is None and given.cases:
                outcomes += progress(
                    pool.map(campaign.control, campaign.scenarios), len(campaign.scenarios), "controls"
                )
            outcomes += each(campaign.case, chosen("", given.cases), "cases")
            disturbed = {"kill": given.kills, "disk": given.kills // 5, "pair": given.kills // 10}
            numbers = {name: chosen(name, count) for name, count in disturbed.items()}
            if any(numbers.values()):
                tried["undisturbed"] = list(progress(kills.prepare(), 0, "jobs that failed undisturbed"))
                tried["killed"] = each(kills.kill, numbers["kill"], "kills")
                tried["disk full"] = each(kills.disk, numbers["disk"], "full disks")
                # One at a time: a pair needs two workers.
                tried["started twice"] = list(progress(map(kills.pair, numbers["pair"]), len(numbers["pair"]), "pairs"))
    finally:
        if given.scratch is None and given.only is None:
            shutil.rmtree(scratch, ignore_errors=True)
    if given.only is not None:
        for outcome in (*outcomes, *(each for rows in tried.values() for each in rows)):
            print(outcome.line)
        print(f"files are kept in {scratch}")
    elif table.failures(outcomes, tried):
        print(f"--seed {given.seed} --only CASE repeats a case and keeps its files")
    print(table.markdown(outcomes, tried))
    if given.output:
        about = {
            "cases": given.cases,
            "kills": given.kills,
            "seed": given.seed,
            "mutations": [f.name for f in given.mutations],
        }
        table.write(given.output, about, outcomes, tried, time.monotonic() - start)
    return 1 if table.failures(outcomes, tried) else 0


if __name__ == "__main__":
    sys.exit(main())
