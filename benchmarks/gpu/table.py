"""The table of a result, for docs/gpu.md."""

from collections.abc import Iterator
from typing import Any

Row = tuple[str, str]


def table(result: dict[str, Any]) -> str:
    """Markdown of what was measured; parts that failed or were left out are named."""
    rows = [row for name, found in result["parts"].items() for row in _rows(name, found)]
    lines = [f"| {what} | {value} |" for what, value in rows]
    return "\n".join(["| what | result |", "|---|---|", *lines])


def _rows(name: str, found: dict[str, Any]) -> Iterator[Row]:
    kind, _, of = name.partition("-")
    yield from {
        "machine": _machine,
        "tests": _tests,
        "drawing": _drawing,
        "package": _package,
        "prior": _training,
        "tokenizer": _training,
        "quantizer": _quantizer,
        "tokenizing": _tokenizing,
        "processes": _processes,
    }[kind](f"{kind} {of}".strip(), found)
    for ending in ("error", "not_run"):
        if ending in found:
            yield name, f"{ending}: {str(found[ending]).strip().splitlines()[-1].replace('|', '/')}"


def _machine(_name: str, found: dict[str, Any]) -> Iterator[Row]:
    if "device" in found:
        memory = f", {found['memory_gb']:.0f} GB" if "memory_gb" in found else ""
        yield "device", f"{found['device']}{memory}, torch {found['torch']}"
    rates = [f"{key[7:]} {value:.3g}" for key, value in found.items() if key.startswith("tflops_")]
    if rates:
        yield "matrix rate, TFLOP/s", ", ".join(rates)
    if "bandwidth_gbs" in found:
        yield "copy bandwidth", f"{found['bandwidth_gbs']:.0f} GB/s"
    if "launch_us" in found:
        yield "launch of a kernel", f"{found['launch_us']:.1f} µs"


def _tests(_name: str, found: dict[str, Any]) -> Iterator[Row]:
    if "tests" in found:
        failed = found["failures"] + found["errors"]
        passed = found["tests"] - failed - found["skipped"]
        yield "tests on the device", f"{passed} passed, {failed} failed, {found['skipped']} skipped"


def _drawing(name: str, found: dict[str, Any]) -> Iterator[Row]:
    for batch, row in found.get("batches", {}).items():
        took, count = row["seconds"], int(batch)
        sides = [f"{side} {count / seconds:.3g}" for side, seconds in took.items()]
        share = f"{row['floor_seconds'] / took['vqgen']:.0%} of what the machine allows"
        yield f"{name}, {found['codes']} codes, {batch} at once, images/s", f"{', '.join(sides)}; {share}"


def _package(_name: str, found: dict[str, Any]) -> Iterator[Row]:
    for precision, row in found.get("precisions", {}).items():
        how = "CUDA graphs" if row["graphs"] else "no graphs"
        how += f"; {'the same' if row['the_same_alone'] else 'OTHER'} images alone"
        agreement = f"{row['codes_as_on_cpu_fp32']:.1%} of codes as on a CPU in float32"
        yield f"model of the package, {precision}", f"{row['images_per_second']:.3g} images/s ({how}; {agreement})"
    if "cold_seconds" in found:
        yield f"{found['cold_images']} images from a cold start", f"{found['cold_seconds']:.1f} s"


def _training(name: str, found: dict[str, Any]) -> Iterator[Row]:
    for how in ("no-compile", "compile"):
        if how in found:
            row = found[how]
            mfu = f", {row['mfu']:.0%} of the matrix rate" if "mfu" in row else ""
            loss = f"loss {row['first_loss']:.3g} to {row['last_loss']:.3g}"
            memory = f"{row['peak_memory_gb']:.1f} GB"
            yield f"training of the {name}, --{how}", f"{row['per_second']:.4g} images/s{mfu}; {memory}; {loss}"


def _quantizer(_name: str, found: dict[str, Any]) -> Iterator[Row]:
    for row in found.get("sizes", []):
        theirs = f"vector-quantize-pytorch {row['their_milliseconds']:.2f} ms, {row['their_mib']:.1f} MiB"
        text = f"{row['milliseconds']:.2f} ms, {row['mib']:.1f} MiB; {theirs}"
        yield f"codebook, K {row['codes']}, d {row['dim']}", text


def _tokenizing(_name: str, found: dict[str, Any]) -> Iterator[Row]:
    if "per_second" in found:
        text = (
            f"{found['per_second']:.4g} images/s, {found['share']:.0%} of the bare encoder ({found['workers']} workers)"
        )
        yield f"vqgen-tokenize, {found['images']} images", text


def _processes(_name: str, found: dict[str, Any]) -> Iterator[Row]:
    for name in ("one", "ddp", "fsdp"):
        if name in found:
            yield f"prior, processes: {name}", f"{found[name]['per_second']:.4g} images/s"
