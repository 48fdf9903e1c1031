"""Progress bar of every program."""

import sys

from tqdm import tqdm


def progress(total: int, what: str, unit: str, main: bool, done: int = 0) -> tqdm:
    """Return a progress bar, shown on the main process where stderr is a terminal."""
    hidden = None if main else True
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=hidden, file=sys.stderr, smoothing=0.1)
