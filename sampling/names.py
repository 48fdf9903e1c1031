"""The classes of a prior by the names that people give them."""

import difflib
import re
from collections.abc import Sequence

from vqgen.errors import UsageError
from vqgen.prior.model import Prior


def find_classes(words: Sequence[str] | None, prior: Prior) -> list[int]:
    """The classes to draw in turn; [-1] for an unconditional prior.

    A word is a class's name or, where no class is called so, its index or several of them with commas between; None
    means every class. Raises `UsageError`.
    """
    count, names = prior.vocabulary.classes, prior.class_names or []
    if words is None:
        return list(range(count)) or [-1]
    if not count:
        raise UsageError(f"--class: found {' '.join(words)}, but the model is unconditional; leave --class out")
    found = []
    folded = [name.casefold() for name in names]
    for word in words:
        if word in names:
            found.append(names.index(word))
        elif folded.count(word.casefold()) == 1:
            found.append(folded.index(word.casefold()))
        elif re.fullmatch(r"-?\d+", word):
            if not 0 <= int(word) < count:
                raise UsageError(f"--class: found {word}, expected an index from 0 to {count - 1} or a name")
            found.append(int(word))
        elif "," in word.strip(","):
            found += find_classes([part.strip() for part in word.split(",")], prior)
        else:
            close = difflib.get_close_matches(word.casefold(), folded, n=1)
            hint = (
                f"did you mean {names[folded.index(close[0])]!r}?" if close else f"give an index from 0 to {count - 1}"
            )
            listed = f" (the classes are {', '.join(names)})" if names and not close and count <= 20 else ""
            raise UsageError(f"--class: the model knows no class {word!r}; {hint}{listed}")
    if not found:
        raise UsageError("--class: found no class; name at least one")
    return found
