"""Models of other projects, tensor by tensor: taming-transformers, LlamaGen and diffusers' VQModel.

All three are the VQGAN of Esser et al. (2021) that `layers.py` builds, under other names. So a model's sizes are read
off its tensors, every tensor goes by its name to its place, and whatever has no place is refused by its name. Images
are in [-1, 1] in all of them. Files and the command line are in `convert.py`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from vqgen.errors import UsageError, UserError
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.autoencoder import Attention
from vqgen.tokenizer.networks.options import ModelConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import QuantizerConfig


@dataclass(frozen=True)
class Naming:
    """What another project calls its layers.

    Of a pair the first is the encoder's and the second the decoder's, with the `level` (0 is the finest), the same
    counted from the coarsest (`depth`) and the `block` within the level to be filled in.
    """

    project: str
    block: tuple[str, str]
    attention: tuple[str, str]
    resample: tuple[str, str]
    middle: tuple[str, str, str]
    norm_out: str
    inner: Mapping[str, tuple[str, ...]]
    """Part of one of our layers -> theirs; queries, keys and values are one here and three there."""
    linear: bool = False
    """Attention has linear layers, weights (C, C), where the others have 1x1 convolutions."""
    unit: bool = False
    """Latents and codes are compared on the unit sphere."""
    training: tuple[str, ...] = ()
    """How the names of tensors begin that only training needs."""

    def layers(self, side: int, model: ModelConfig) -> Iterator[str]:
        """Their names of all layers with weights, in our order; `side` is 0 for the encoder, 1 for the decoder."""
        part, last = ("encoder", "decoder")[side], len(model.multipliers) - 1
        middle = [f"{part}.{name}" for name in (self.middle if model.attention else self.middle[:1])]

        def named(templates: tuple[str, str], level: int, block: int = 0) -> str:
            return templates[side].format(level=level, depth=last - level, block=block)

        yield f"{part}.conv_in"
        yield from middle if side else ()
        for level in range(last, -1, -1) if side else range(last + 1):
            for block in range(model.blocks + side):
                yield named(self.block, level, block)
                if level in model.attention_levels:
                    yield named(self.attention, level, block)
            if level != (0 if side else last):
                yield named(self.resample, level)
        yield from () if side else middle
        yield f"{part}.{self.norm_out}"
        yield f"{part}.conv_out"


_CONVOLUTIONS = {"norm": ("norm",), "qkv": ("q", "k", "v"), "out": ("proj_out",), "shortcut": ("nin_shortcut",)}
_LINEAR = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}

TAMING = Naming(
    "taming",
    block=("encoder.down.{level}.block.{block}", "decoder.up.{level}.block.{block}"),
    attention=("encoder.down.{level}.attn.{block}", "decoder.up.{level}.attn.{block}"),
    resample=("encoder.down.{level}.downsample", "decoder.up.{level}.upsample"),
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm_out="norm_out",
    inner=_CONVOLUTIONS,
    training=("loss.",),
)
LLAMAGEN = Naming(
    "llamagen",
    block=("encoder.conv_blocks.{level}.res.{block}", "decoder.conv_blocks.{depth}.res.{block}"),
    attention=("encoder.conv_blocks.{level}.attn.{block}", "decoder.conv_blocks.{depth}.attn.{block}"),
    resample=("encoder.conv_blocks.{level}.downsample", "decoder.conv_blocks.{depth}.upsample"),
    middle=("mid.0", "mid.1", "mid.2"),
    norm_out="norm_out",
    inner=_CONVOLUTIONS,
    unit=True,
    training=("quantize.codebook_used",),
)
DIFFUSERS = Naming(
    "diffusers",
    block=("encoder.down_blocks.{level}.resnets.{block}", "decoder.up_blocks.{depth}.resnets.{block}"),
    attention=("encoder.down_blocks.{level}.attentions.{block}", "decoder.up_blocks.{depth}.attentions.{block}"),
    resample=("encoder.down_blocks.{level}.downsamplers.0", "decoder.up_blocks.{depth}.upsamplers.0"),
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    inner={**_LINEAR, "shortcut": ("conv_shortcut",)},
    linear=True,
)


def _places(tokenizer: Tokenizer, names: Naming) -> Iterator[tuple[str, list[str], bool]]:
    """Each of our tensors, the one or three of theirs that it holds, and whether these are weights (C, C)."""
    encoder = [(f"encoder.layers.{n}", layer) for n, layer in tokenizer.encoder.layers.named_children()]
    decoder = [(f"decoder.layers.{n}", layer) for n, layer in tokenizer.decoder.layers.named_children()]
    decoder.append(("decoder.last", tokenizer.decoder.last))
    for side, part in enumerate((encoder, decoder)):
        ours = [(name, layer) for name, layer in part if layer.state_dict()]
        for (name, layer), theirs in zip(ours, names.layers(side, tokenizer.config.model), strict=True):
            for tensor in layer.state_dict():
                head, _, kind = tensor.rpartition(".")
                linear = names.linear and isinstance(layer, Attention) and head != "norm" and kind == "weight"
                inner = names.inner.get(head, (head,))
                yield f"{name}.{tensor}", [".".join(filter(None, (theirs, i, kind))) for i in inner], linear
    for kind in ("weight", "bias"):
        yield f"quantizer.project_in.{kind}", [f"quant_conv.{kind}"], False
        yield f"quantizer.project_out.{kind}", [f"post_quant_conv.{kind}"], False
    gumbel = tokenizer.config.quantizer.quantizer == "gumbel"
    yield f"quantizer.codebook{'' if gumbel else '.codes'}", ["quantize.embedding.weight"], False


@dataclass(frozen=True)
class Foreign:
    """A model of another project.

    Attributes:
        where: file or folder, for errors.
        tensors: under the other project's names.
        groups: of the group norms, which no tensor's shape shows.
        attention: whether there is any between the blocks at the lowest resolution.
        gumbel: whether `quant_conv` gives a logit a code, and the largest chooses.
    """

    where: str
    names: Naming
    tensors: Mapping[str, Tensor]
    groups: int = 32
    dropout: float = 0.0
    attention: bool = True
    gumbel: bool = False

    def _length(self, name: str, axis: int) -> int:
        """The length of a tensor along an axis."""
        if name not in self.tensors:
            raise UserError(f"{self.where}: {name} is missing")
        shape = self.tensors[name].shape
        if axis >= len(shape):
            raise UserError(f"{self.where}: {name} is {_shape(shape)}, expected at least {axis + 1} dimensions")
        return shape[axis]

    def config(self, size: list[int]) -> TokenizerConfig:
        """The architecture that the tensors show, for images of `size`, height and width.

        Raises `UserError` naming the first tensor that is not as in any such model, `UsageError` for the size.
        """

        def first(template: tuple[str, str], part: str, level: int, block: int = 0) -> str:
            return f"{template[0].format(level=level, block=block)}.{part}.weight"

        names = self.names
        levels = max(1, next(n for n in count() if first(names.block, "conv1", n) not in self.tensors))
        blocks = max(1, next(n for n in count() if first(names.block, "conv1", 0, n) not in self.tensors))
        widths = [self._length(first(names.block, "conv1", level), 0) for level in range(levels)]
        width = math.gcd(*widths) or 1
        channels = self._length("encoder.conv_in.weight", 1)
        if channels not in (1, 3):
            raise UserError(f"{self.where}: encoder.conv_in.weight takes {channels} channels, expected 1 or 3")
        norm = names.inner["norm"][0]
        try:
            model = ModelConfig(
                width=width,
                multipliers=[w // width for w in widths],
                blocks=blocks,
                attention=self.attention,
                attention_levels=[n for n in range(levels) if first(names.attention, norm, n) in self.tensors],
                latent_dim=self._length("encoder.conv_out.weight", 0),
                groups=self.groups,
                dropout=self.dropout,
            )
            codebook, width = (self._length("quantize.embedding.weight", axis) for axis in (0, 1))
            if self.gumbel:
                quantizer = QuantizerConfig("gumbel", codebook, width)
            else:
                quantizer = QuantizerConfig(
                    "vq",
                    codebook,
                    width,
                    codebook="gradient",
                    l2_normalize=names.unit,
                    kmeans_start=False,
                    revive_after=0,
                )
        except UsageError as error:  # of options that nobody gave
            raise UserError(f"{self.where}: the weights' sizes do not fit together ({error})") from error
        return TokenizerConfig(size, channels, model, quantizer)

    def left_out(self) -> list[str]:
        """Names of tensors that only training needs."""
        return [name for name in self.tensors if name.startswith(self.names.training)]

    def tokenizer(self, size: list[int]) -> Tokenizer:
        """The same model as a tokenizer for images of `size`, height and width, in evaluation mode.

        Raises `UserError` naming the first tensor that has no place, is missing or has another shape.
        """
        config = self.config(size)
        with torch.device("meta"):  # sizes that do not fit together could ask for any amount of memory
            plan = Tokenizer(config)
        places = list(_places(plan, self.names))
        known = {name for _, theirs, _ in places for name in theirs}.union(self.left_out())
        for name in self.tensors:
            if name not in known:
                raise UserError(f"{self.where}: {name} has no place in a tokenizer of vqgen")
        shapes, state = plan.state_dict(), {}
        for ours, theirs, linear in places:
            whole = shapes[ours].shape
            part = torch.Size([whole[0] // len(theirs), *whole[1:]])
            tensors = [self._checked(name, part[:2] if linear else part) for name in theirs]
            state[ours] = torch.cat([tensor.float().reshape(part) for tensor in tensors])
        tokenizer = Tokenizer(config)
        own = tokenizer.state_dict()
        # What only learning needs stays as new.
        tokenizer.load_state_dict({**{name: own[name] for name in own.keys() - tokenizer.inference_state()}, **state})
        return tokenizer.eval()

    def _checked(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor of that name, seen to be there, of that shape and of floating-point numbers."""
        if name not in self.tensors:
            raise UserError(f"{self.where}: {name} is missing")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise UserError(f"{self.where}: {name} is {_shape(tensor.shape)}, expected {_shape(shape)}")
        if not tensor.is_floating_point():
            raise UserError(f"{self.where}: {name} holds {tensor.dtype}, expected floating-point numbers")
        return tensor


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a single number"


def folded_gumbel(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A GumbelVQ of taming with one map from latents to logits, where it has two 1x1 convolutions in a row."""
    folded = {name: tensor for name, tensor in tensors.items() if not name.startswith(("quantize.", "quant_conv."))}
    try:
        first, second = tensors["quant_conv.weight"].double(), tensors["quantize.proj.weight"].double()
        folded["quant_conv.weight"] = torch.einsum("kexy,ecxy->kcxy", second, first)
        bias = second.flatten(1) @ tensors["quant_conv.bias"].double()
        folded["quant_conv.bias"] = bias + tensors["quantize.proj.bias"]
        folded["quantize.embedding.weight"] = tensors["quantize.embed.weight"]
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{where}: quantize.proj.weight does not fit to quant_conv.weight ({error})") from error
    rest = [n for n in tensors if n.startswith("quantize.") and n.split(".")[1] not in ("proj", "embed")]
    return {**folded, **{name: tensors[name] for name in rest}}


# ---- diffusers ----


def diffusers_config(config: TokenizerConfig) -> dict[str, Any]:
    """The keys of diffusers' `config.json` that say how a VQModel is built, for this architecture."""
    model, levels = config.model, range(len(config.model.multipliers))
    attention = ["Attn" if level in model.attention_levels else "" for level in levels]
    return {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attention)],
        "block_out_channels": model.channels,
        "layers_per_block": model.blocks,
        "act_fn": "silu",
        "latent_channels": model.latent_dim,
        "num_vq_embeddings": config.quantizer.codebook_size,
        "norm_num_groups": model.groups,
        "vq_embed_dim": config.quantizer.code_dim,
        "norm_type": "group",
        "mid_block_add_attention": model.attention,
    }


def to_diffusers(tokenizer: Tokenizer, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and the tensors of a diffusers VQModel that gives the same codes and images.

    The nearest of codes of unit length is the same for a latent of any length, so a codebook that is compared on the
    unit sphere is written as it lies there. Raises `UserError` naming, after `where`, what a VQModel cannot hold.
    """
    config = tokenizer.config
    if config.quantizer.quantizer not in ("vq", "simvq"):
        kind = config.quantizer.quantizer
        raise UserError(f"{where}: --quantizer is {kind}; diffusers' VQModel has one codebook and takes vq or simvq")
    if config.model.patch > 1:
        raise UserError(f"{where}: --patch is {config.model.patch}; diffusers' VQModel folds no pixels into channels")
    height, width = config.image_size
    keys = {"_class_name": "VQModel", **diffusers_config(config)}
    # With lookup_from_codebook `decode(codes, force_not_quantize=True, shape=...)` takes codes.
    keys |= {"sample_size": height if height == width else [height, width], "lookup_from_codebook": True}
    table = tokenizer.quantizer.lookup(torch.arange(tokenizer.codebook_size))
    state = {**tokenizer.state_dict(), "quantizer.codebook.codes": table}
    tensors: dict[str, Tensor] = {}
    for ours, theirs, linear in _places(tokenizer, DIFFUSERS):
        for name, part in zip(theirs, state[ours].detach().chunk(len(theirs))):
            tensors[name] = part.flatten(1) if linear else part
    if not config.model.attention:  # its middle has two blocks all the same: one that adds nothing
        for name, tensor in list(tensors.items()):
            if ".mid_block.resnets.0." in name:
                tensors[name.replace("resnets.0", "resnets.1")] = torch.zeros_like(tensor)
    return keys, tensors


def without_attention(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """A VQModel of `mid_block_add_attention: false`, made such that our middle holds it; and whether with attention.

    A second block that adds nothing, as `to_diffusers` writes it, is left out; otherwise an attention is put in that
    adds nothing.
    """
    second = [name for name in tensors if ".mid_block.resnets.1." in name]
    if second and not any(tensors[name].any() for name in second):
        return {name: tensor for name, tensor in tensors.items() if name not in second}, False
    filled = dict(tensors)
    for side in ("encoder", "decoder"):
        width = tensors.get(f"{side}.mid_block.resnets.0.norm1.weight", torch.zeros(1)).numel()
        for part in (name for parts in _LINEAR.values() for name in parts):
            shape = (width,) if part == "group_norm" else (width, width)
            filled[f"{side}.{DIFFUSERS.middle[1]}.{part}.weight"] = torch.zeros(()).expand(shape)
            filled[f"{side}.{DIFFUSERS.middle[1]}.{part}.bias"] = torch.zeros(()).expand(width)
    return filled, True
