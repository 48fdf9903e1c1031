"""Orders in which the positions of a grid are drawn; needs no torch, so that options can check names."""

from collections.abc import Callable


def raster(height: int, width: int) -> list[int]:
    """Row by row from the top left."""
    return list(range(height * width))


ORDERS: dict[str, Callable[[int, int], list[int]]] = {"raster": raster}
"""Name -> function of the grid's height and width: a permutation of the raster indices, first drawn first."""
