"""What a case came to."""

import re
from dataclasses import dataclass
from typing import Literal

from .oracles import Run, same, same_or_said
from .scenarios import Scenario

Verdict = Literal["ok", "refused", "clumsy", "crash", "hang", "unhandled", "outside", "silent"]
VERDICTS: tuple[Verdict, ...] = ("ok", "refused", "clumsy", "crash", "hang", "unhandled", "outside", "silent")
FAILURES = VERDICTS[3:]
"""What must not happen to a mutated input; a control must be ok."""
CONTROL = "control"
"""In place of a mutation's name, where nothing was done to the input."""


@dataclass(frozen=True)
class Outcome:
    """A case and its verdict."""

    case: str
    kind: str
    verdict: Verdict
    program: str
    mutation: str
    target: str
    change: str
    detail: str
    """The last line of the errors, or what was found."""
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether this must not happen."""
        return self.verdict in FAILURES or (self.mutation == CONTROL and self.verdict != "ok")

    @property
    def line(self) -> str:
        """One line of a report."""
        about = f"{self.mutation}: {self.target} {self.change}".replace("\n", " ")
        detail = self.detail.encode("ascii", "backslashreplace").decode()
        return f"case {self.case} | {self.verdict} | {self.program} | {about[:160]} | {detail[:300]}"


def of_error(run: Run) -> tuple[Verdict, str]:
    """The verdict on a program that did not end well."""
    ended, lines = run.ended, run.ended.lines
    last = lines[-1] if lines else ""
    if ended.hang:
        return "hang", f"{ended.seconds:.0f} s; {last}"
    if ended.code < 0:
        return "crash", f"signal {-ended.code}; {last}"
    said = [line for line in lines if re.match(r"vqgen-[a-z-]+( [a-z]+)?: ", line)]
    if "Traceback (most recent call last)" in ended.err or "defect of vqgen" in ended.err:
        raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
        return "unhandled", raised[-1] if raised else last
    if ended.code not in (1, 2):
        return "unhandled", f"exit code {ended.code}; {last}"
    if len(said) != 1 or said[0] != last:
        return "unhandled", f"{len(said)} lines of error; {last}"
    # The line names an option, or a file or folder that the user knows.
    known = {name for part in (run.target, *run.words[1:]) for name in part.split("/") if len(name) > 1}
    if not (re.search(r"--|\w+/|\.\w{2,}|'.+'|RUN\b|RECEIPT\b", last) or any(name in last for name in known)):
        return "clumsy", last
    if len(last) > 600 or re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", last):
        return "clumsy", f"{len(last)} characters, or control characters: {last}"
    return "refused", last


def verdict(case: str, scenario: Scenario, mutation: str, run: Run, moved: list[str]) -> Outcome:
    """Judge a case; a change outside of the output weighs more than how the program ended."""
    detail = ""
    if run.ended.code == 0 and not run.ended.hang:
        found, detail = "ok", ""
        differs = same(run)
        if differs or not scenario.results:  # an oracle of a program without results looks elsewhere
            honest = run.change.honest and scenario.oracle in (same, same_or_said)
            wrong = "" if honest else scenario.oracle(run)
            if differs and run.change.invalid and not wrong:
                wrong = f"invalid content was accepted; {differs}"
            if wrong:
                found, detail = "silent", wrong
    else:
        found, detail = of_error(run)
    if moved and found != "crash":
        found, detail = "outside", "; ".join(moved)[:300]
    change, target = run.change.text, run.target
    return Outcome(case, scenario.kind, found, scenario.program, mutation, target, change, detail, run.ended.seconds)  # type: ignore[arg-type]
