"""Errors of the user."""

from collections.abc import Callable
from typing import Any

import pytest

from vqgen.errors import UserError


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """The one line of the error that a call ends with."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
