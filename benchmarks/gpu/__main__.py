"""`python -m benchmarks.gpu`: run the parts one after another, and write the result after each."""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import __doc__ as about
from .parts import PARTS, perform, result_of
from .table import table

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
# What the parts import; the server of forks uses no device.
PRELOADED = ["vqgen.prior.trainer", "vqgen.tokenizer.trainer", "vqgen.sampling.write_samples"]
PRELOADED += ["transformers.models.llama", "benchmarks.sample"]
REHEARSED = 4
"""By how much the limits of the parts are longer in a rehearsal: a CPU may be busy."""


def options(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=about, formatter_class=form)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal at tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=8, help="of the whole; parts that begin later are left out")
    parser.add_argument("--output", type=Path, help="JSON file; by default in benchmarks/results/gpu/")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result, and do nothing else")
    return parser.parse_args(words)


def run(name: str, device: str, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own, for at most `limit` seconds."""
    folder = Path(tempfile.mkdtemp(prefix="vqgen-gpu-"))
    start = time.perf_counter()
    process = multiprocessing.get_context("forkserver").Process(target=perform, args=(name, device, folder))
    process.start()
    process.join(limit)
    killed = limit if process.is_alive() else None
    assert process.pid is not None
    with suppress(ProcessLookupError):  # the part may have no group yet
        os.killpg(process.pid, signal.SIGKILL)  # with all that it started
    process.kill()
    process.join()
    found = result_of(folder, killed)
    shutil.rmtree(folder, ignore_errors=True)
    return {"wall_seconds": round(time.perf_counter() - start, 1), **found}


def main(words: list[str] | None = None) -> int:
    """Run the parts; 1 where there is no device or a part failed."""
    given = options(words)
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return 0
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} finds none; --device cpu rehearses the run", file=sys.stderr)
        return 1
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": str(given.device == "cpu")}
    name = "rehearsal" if given.device == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).lower()
    output = given.output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    end, parts = time.monotonic() + 60 * given.minutes, dict[str, Any]()
    for part in given.parts:
        limit = min(PARTS[part].limit * (REHEARSED if given.device == "cpu" else 1), end - time.monotonic())
        parts[part] = run(part, given.device, limit) if limit > 5 else {"not_run": "no time was left"}
        output.write_text(json.dumps({"device": given.device, "parts": parts}, indent=1) + "\n")
        ended = parts[part].get("error", parts[part].get("not_run", "done")).strip().splitlines()[-1]
        print(f"{part:>15} {parts[part].get('wall_seconds', 0):6.1f} s  {ended}", flush=True)
    print(f"\n{table({'device': given.device, 'parts': parts})}\n\n{output}")
    return int(any("error" in found for found in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
