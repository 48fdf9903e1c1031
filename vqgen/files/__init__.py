"""Files: reading what a user hands in, writing what is complete or absent, and output folders. Needs no torch."""

from .lock import locked
from .read import as_record, checksum, is_file, open_regular, parse_json, read_bytes, read_json, read_record, read_text
from .write import atomic_path, cache_folder, check_writable, write_json, write_text

# The files of a model folder, see `artifact.py`.
DESCRIPTION = "vqgen.json"
WEIGHTS = "model.safetensors"

__all__ = [
    "DESCRIPTION",
    "WEIGHTS",
    "as_record",
    "atomic_path",
    "cache_folder",
    "check_writable",
    "checksum",
    "is_file",
    "locked",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_record",
    "read_text",
    "write_json",
    "write_text",
]
