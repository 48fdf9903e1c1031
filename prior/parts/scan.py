"""Scan orders: a prior that also learns grids flipped and transposed, named by one token, against overfitting.

The orders of an image are further data where images are few (Jun et al. 2020, who condition on the augmentation), and
are given up for raster order in the course of the run (Yu et al. 2024, who anneal random orders). Drawing is in raster
order alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.prior.options import ObjectiveConfig
from vqgen.tokenizer.codes.format import CodeFiles

from .part import Part, Rows

ANNEALED = (0.5, 0.75)
"""Shares of the run between which the share of other orders falls from all to none."""


def scanned(codes: Tensor, scans: np.ndarray) -> Tensor:
    """Codes (B, h, w[, depth]), each grid in its scan order, (B,).

    0 is raster order. Bits of the others: 1 columns reversed, 2 rows reversed, 4 then transposed, of square grids.
    """
    found = codes.clone()
    for scan in np.unique(scans).tolist():
        rows = torch.from_numpy(scans == scan)
        part = codes[rows].flip([dim for bit, dim in ((1, 2), (2, 1)) if scan & bit])
        found[rows] = part.transpose(1, 2) if scan & 4 else part
    return found


class Scan(Part):
    """The scan order of a sequence; absent is raster order."""

    name, option = "scan", "scan"

    def __init__(self, ids: int) -> None:
        """`ids`: 8 orders of a square grid, 4 of another, which cannot be transposed."""
        self.ids = ids

    @classmethod
    def for_files(cls, files: CodeFiles, options: ObjectiveConfig) -> "Scan | None":
        grids = [files.grid, *([files.source.grid] if files.source else [])]
        square = all(rows == columns for rows, columns in grids)
        return cls(8 if square else 4) if options.scan_orders else None

    @classmethod
    def from_description(cls, about: Mapping[str, Any]) -> "Scan | None":
        if "scan_orders" not in about:
            return None
        if (ids := about["scan_orders"]) not in (4, 8) or isinstance(ids, bool):
            raise ValueError("scan_orders has to be 4 or 8")
        return cls(ids)

    def describe(self) -> dict[str, Any]:
        return {"scan_orders": self.ids}

    @property
    def informative(self) -> bool:
        return False  # drawing knows raster order alone

    def draw(self, count: int, progress: float, random: np.random.Generator) -> np.ndarray:
        """Scan orders (count,) of a step of training, before which this share of the run is done."""
        first, last = ANNEALED
        share = min(1.0, max(0.0, (last - progress) / (last - first)))
        return np.where(random.random(count) < share, random.integers(self.ids, size=count), 0)

    def of_rows(self, rows: Rows) -> Tensor:
        if rows.scans is None:
            return torch.tensor(self.absent).expand(len(rows.codes), -1)
        return self.absent[0] - torch.from_numpy(rows.scans)[:, None]

    def of_value(self, value: Any) -> list[int]:
        raise UsageError(f"scan: found {value}, but images are drawn in raster order; leave it out")

    def parse(self, given: Any) -> list[Any]:
        return list(given) if isinstance(given, Sequence) else [given]

    def legend(self) -> str:
        return f"{self.first} to {self.absent[0] - 1} other scan orders, {self.absent[0]} raster order"

    @property
    def note(self) -> str:
        return f"The first id is {self.absent[0]}, raster order; the other orders are of training alone."
