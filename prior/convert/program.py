"""vqgen-convert: models of other projects to a model folder, and a tokenizer to a diffusers VQModel."""

import sys
from collections.abc import Sequence

from vqgen.config import command
from vqgen.files.output_folder import new_folder
from vqgen.tokenizer.convert.options import ConvertConfig


def run(config: ConvertConfig) -> None:
    """Convert a tokenizer of taming, LlamaGen or diffusers, or a prior of taming; or a tokenizer to diffusers."""
    from vqgen.tokenizer.convert.read import load, read_input
    from vqgen.tokenizer.convert.write import save

    from .taming import holds_prior, load_prior, save_prior

    output = config.output
    with new_folder(output):
        tensors = read_input(config)
        if tensors is not None and holds_prior(tensors):
            prior, tokenizer, left_out = load_prior(config, tensors)
            save_prior(prior, tokenizer, output)
            classes = prior.conditioning.classes.count
            told = f"of {classes} classes, always given: there is no guidance" if classes else "without a condition"
            kind, what = "taming", f", and a prior {told}"
            weights = sum(tensor.numel() for tensor in prior.backbone.state_dict().values())
        else:
            tokenizer, kind, left_out = load(config, tensors)
            save(tokenizer, config.to, output, str(config.input))
            what, weights = "", 0
    weights += sum(tensor.numel() for tensor in tokenizer.inference_state().values())
    if left_out:
        groups = sorted({name.partition(".")[0] + "." if name.startswith("loss.") else name for name in left_out})
        plural = "s" * (len(left_out) > 1)
        print(f"left out {len(left_out)} tensor{plural} used only in training: {', '.join(groups)}")
    (height, width), (rows, columns) = tokenizer.config.image_size, tokenizer.grid
    print(
        f"{output}: from {kind} to {config.to}, {weights / 1e6:.1f} million parameters, "
        f"images of {height}x{width} as {rows}x{columns} codes of {tokenizer.codebook_size}{what}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-convert", ConvertConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
