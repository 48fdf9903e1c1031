"""Leave out the emoji with a skin tone, which are half of all and differ in nothing else.

    python benchmarks/plain_emoji.py DATA PLAIN

DATA has train, heldout and novel.parquet of `image`, `text`, `label` (the style) and `key` (the emoji); PLAIN gets
the same.
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq

if __name__ == "__main__":
    data, plain = map(Path, sys.argv[1:])
    plain.mkdir(exist_ok=True)
    for file in sorted(data.glob("*.parquet")):
        table = pq.read_table(file)
        kept = table.filter(["skin tone" not in text for text in table.column("text").to_pylist()])
        pq.write_table(kept, plain / file.name)
        print(f"{file.stem}: {len(kept)} of {len(table)}")
