"""The progress bar of every program."""

import sys

from tqdm import tqdm


def progress(total: int, what: str, unit: str, main: bool, done: int = 0) -> tqdm:
    """A progress bar on the main process; none where the output is no terminal, e.g. in a log file."""
    hidden = None if main else True
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=hidden, file=sys.stderr, smoothing=0.1)
