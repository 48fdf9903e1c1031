"""The tests that run on a device."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .parts import Setup

ROOT = Path(__file__).parents[2]


def run(setup: Setup) -> dict[str, Any]:
    """Run the tests with `cuda` in their names or parameters; in the rehearsal one of those of the CPU."""
    files = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"\bdevice\b: str|cuda\.is_available", path.read_text())
    ]
    files = [path for path in files if path.name == "test_graphs.py"] if setup.tiny else files
    report, chosen = setup.folder / "report.xml", "cpu and step_reads" if setup.tiny else "cuda"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",  # each test by name, as the limit may cut them off
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        f"--junitxml={report}",
    ]
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT)
    suite = ElementTree.parse(report).getroot()[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = {
        f"{case.attrib['classname']}::{case.attrib['name']}": " ".join(problem.attrib.get("message", "").split())[:500]
        for case in suite
        for problem in [*case.findall("failure"), *case.findall("error")]
    }
    result = {**counts, "failed": failed, "files": [path.name for path in files]}
    if done.returncode:
        setup.report(result)
        raise RuntimeError(f"pytest ended with {done.returncode}: {len(failed)} tests failed")
    return result
