"""A process that is killed before its k-th file operation, in the tests' own process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

OPERATIONS = ("unlink", "rename", "replace", "rmdir", "mkdir", "fsync")


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """Raise `SystemExit` before file operation `number` (0 is the first) and before all that follow it.

    A process that is killed cleans nothing up. The operations that were done come back, and whether it was killed:
    the last of them is then "killed".
    """
    done: list[str] = []

    def dying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if len(done) >= number:
                done[number:] = ["killed"]
                raise SystemExit(137)
            done.append(name)
            return call(*arguments, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, dying(name, getattr(os, name)))
        try:
            yield done
        except SystemExit:
            assert done[-1] == "killed"
