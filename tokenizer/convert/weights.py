"""Tensors of other projects' models: taming-transformers, LlamaGen and diffusers' VQModel.

All three are the VQGAN of Esser et al. (2021) of `networks/autoencoder.py` with other names of tensors. Sizes are taken
from the tensors' shapes, tensors are matched by name, and any tensor without a counterpart is an error. Images are in
[-1, 1] in all of them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from vqgen.errors import UsageError, UserError
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.autoencoder import Attention
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import GumbelConfig, QuantizerConfig, SimVQConfig, VQConfig


@dataclass(frozen=True)
class Naming:
    """Names of layers in another project.

    Pairs are templates for encoder and decoder, to be filled in with the `level` (0 is the finest), the level counted
    from the coarsest (`depth`) and the `block` within the level.
    """

    project: str
    block: tuple[str, str]
    attention: tuple[str, str]
    resample: tuple[str, str]
    middle: tuple[str, str, str]
    norm_out: str
    inner: Mapping[str, tuple[str, ...]]
    """Part of a layer here -> parts there; queries, keys and values are one layer here and three there."""
    linear: bool = False
    """Whether attention has linear layers, weights (C, C), instead of 1x1 convolutions."""
    training: tuple[str, ...] = ()
    """Prefixes of tensors that only training needs."""

    def layers(self, side: int, model: VQGANConfig) -> Iterator[str]:
        """Yield names of layers with weights in order of computation; `side` is 0 for encoder and 1 for decoder."""
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


def vqgan_of(config: TokenizerConfig, where: str = "") -> VQGANConfig:
    """Return the network's options where it is that of VQGAN, the only one that other projects have."""
    if not isinstance(config.model, VQGANConfig):
        raise UserError(f"{where}: --network is {config.model.kind}; diffusers' VQModel is vqgan")
    return config.model


def code_dim_of(config: TokenizerConfig) -> int:
    """Return the dimension of the codes of a converted tokenizer."""
    assert isinstance(config.quantizer, VQConfig | SimVQConfig | GumbelConfig)
    return config.quantizer.code_dim


def _tensor_names(tokenizer: Tokenizer, names: Naming) -> Iterator[tuple[str, list[str], bool]]:
    """Yield each tensor here, the one or three there that it contains, and whether these are linear weights (C, C)."""
    model = vqgan_of(tokenizer.config)
    for side, part in enumerate(("encoder", "decoder")):
        ours = getattr(tokenizer, part).named_layers()
        for (name, layer), theirs in zip(ours, names.layers(side, model), strict=True):
            for tensor in layer.state_dict():
                head, _, kind = tensor.rpartition(".")
                linear = names.linear and isinstance(layer, Attention) and head != "norm" and kind == "weight"
                inner = names.inner.get(head, (head,))
                yield f"{part}.{name}.{tensor}", [".".join(filter(None, (theirs, i, kind))) for i in inner], linear
    for kind in ("weight", "bias"):
        yield f"quantizer.project_in.{kind}", [f"quant_conv.{kind}"], False
        yield f"quantizer.project_out.{kind}", [f"post_quant_conv.{kind}"], False
    gumbel = isinstance(tokenizer.config.quantizer, GumbelConfig)
    yield f"quantizer.codebook{'' if gumbel else '.codes'}", ["quantize.embedding.weight"], False


@dataclass(frozen=True)
class Foreign:
    """A model of another project.

    Attributes:
        where: file or folder, for errors.
        tensors: by the other project's names.
        groups: groups of the group norms, which no shape shows.
        attention: whether there is attention between the blocks at the lowest resolution.
        gumbel: whether `quant_conv` computes one logit for each code.
        unit: whether latents and codes are compared on the unit sphere.
    """

    where: str
    names: Naming
    tensors: Mapping[str, Tensor]
    groups: int = 32
    dropout: float = 0.0
    attention: bool = True
    gumbel: bool = False
    unit: bool = False

    def _size(self, name: str, axis: int) -> int:
        """Return the size of a tensor along an axis."""
        if name not in self.tensors:
            raise UserError(f"{self.where}: {name} is missing")
        shape = self.tensors[name].shape
        if axis >= len(shape):
            raise UserError(f"{self.where}: {name} is {_shape(shape)}, expected at least {axis + 1} dimensions")
        return shape[axis]

    def config(self, size: list[int]) -> TokenizerConfig:
        """Derive the architecture from the tensors' shapes, for images of `size`, height and width.

        Raises `UserError` naming the first tensor that is impossible, `UsageError` for the size.
        """

        def first(template: tuple[str, str], part: str, level: int, block: int = 0) -> str:
            return f"{template[0].format(level=level, block=block)}.{part}.weight"

        names = self.names
        levels = max(1, next(n for n in count() if first(names.block, "conv1", n) not in self.tensors))
        blocks = max(1, next(n for n in count() if first(names.block, "conv1", 0, n) not in self.tensors))
        widths = [self._size(first(names.block, "conv1", level), 0) for level in range(levels)]
        width = math.gcd(*widths) or 1
        channels = self._size("encoder.conv_in.weight", 1)
        if channels not in (1, 3):
            raise UserError(f"{self.where}: encoder.conv_in.weight takes {channels} channels, expected 1 or 3")
        norm = names.inner["norm"][0]
        try:
            model = VQGANConfig(
                width=width,
                multipliers=[w // width for w in widths],
                blocks=blocks,
                attention=self.attention,
                attention_levels=[n for n in range(levels) if first(names.attention, norm, n) in self.tensors],
                latent_dim=self._size("encoder.conv_out.weight", 0),
                groups=self.groups,
                dropout=self.dropout,
            )
            codebook, width = (self._size("quantize.embedding.weight", axis) for axis in (0, 1))
            quantizer: QuantizerConfig = GumbelConfig(codebook, width)
            if not self.gumbel:
                plain: dict[str, Any] = {"codebook": "gradient", "kmeans_start": False, "revive_after": 0}
                quantizer = VQConfig(codebook, width, l2_normalize=self.unit, **plain)
        except UsageError as error:  # about options that the user did not give
            raise UserError(f"{self.where}: the weights' sizes do not fit together ({error})") from error
        self._check_widths(widths, self._size(first(names.block, "conv1", 0), 1))
        return TokenizerConfig(size, channels, model, quantizer)

    def _check_widths(self, widths: list[int], taken: int) -> None:
        """Raise `UserError` for multipliers that no network here has; the encoder's first block has `taken` inputs."""
        if taken != widths[0] and taken == self._size("encoder.conv_in.weight", 0):
            text = f"the first channel multiplier is not 1 (the first level has {widths[0]} channels of {taken})"
            raise UserError(f"{self.where}: {text}, which is not supported")
        template = self.names.block[1] + ".conv1.weight"
        found = (template.format(level=n, depth=n, block=0) for n in count())
        decoder = [self._size(name, 0) for name in takewhile(self.tensors.__contains__, found)]
        if "{depth}" in template:
            decoder.reverse()
        if decoder and decoder != widths:  # without any, the first missing tensor is named
            text = f"the channel multipliers are unequal (channels {widths} in the encoder, {decoder} in the decoder)"
            raise UserError(f"{self.where}: {text}, which is not supported")

    def left_out(self) -> list[str]:
        """Return the names of tensors that only training needs."""
        return [name for name in self.tensors if name.startswith(self.names.training)]

    def tokenizer(self, size: list[int]) -> Tokenizer:
        """Build the tokenizer for images of `size`, height and width, in evaluation mode.

        Raises `UserError` naming the first tensor that is unknown, is missing or has another shape.
        """
        config = self.config(size)
        with torch.device("meta"):  # wrong sizes could allocate any amount of memory
            plan = Tokenizer(config)
        places = list(_tensor_names(plan, self.names))
        known = {name for _, theirs, _ in places for name in theirs}.union(self.left_out())
        for name in self.tensors:
            if name not in known:
                raise UserError(f"{self.where}: {name} does not exist in a tokenizer of vqgen")
        shapes, state = plan.state_dict(), {}
        for ours, theirs, linear in places:
            shape = shapes[ours].shape
            part = torch.Size([shape[0] // len(theirs), *shape[1:]])
            tensors = [self._checked(name, part[:2] if linear else part) for name in theirs]
            state[ours] = torch.cat([tensor.float().reshape(part) for tensor in tensors])
        tokenizer = Tokenizer(config)
        own = tokenizer.state_dict()
        # Tensors that only training needs keep their initial values.
        tokenizer.load_state_dict({**{name: own[name] for name in own.keys() - tokenizer.inference_state()}, **state})
        return tokenizer.eval()

    def _checked(self, name: str, shape: torch.Size) -> Tensor:
        """Return the tensor of that name after checking its presence, shape and data type."""
        if name not in self.tensors:
            raise UserError(f"{self.where}: {name} is missing")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise UserError(f"{self.where}: {name} is {_shape(tensor.shape)}, expected {_shape(shape)}")
        if not tensor.is_floating_point():
            raise UserError(f"{self.where}: {name} has type {tensor.dtype}, expected floating-point numbers")
        return tensor


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a single number"


def folded_gumbel(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Merge the two consecutive 1x1 convolutions before the logits of taming's GumbelVQ into one."""
    folded = {name: tensor for name, tensor in tensors.items() if not name.startswith(("quantize.", "quant_conv."))}
    try:
        first, second = tensors["quant_conv.weight"].double(), tensors["quantize.proj.weight"].double()
        folded["quant_conv.weight"] = torch.einsum("kexy,ecxy->kcxy", second, first)
        bias = second.flatten(1) @ tensors["quant_conv.bias"].double()
        folded["quant_conv.bias"] = bias + tensors["quantize.proj.bias"]
        folded["quantize.embedding.weight"] = tensors["quantize.embed.weight"]
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{where}: quantize.proj.weight does not match quant_conv.weight ({error})") from error
    rest = [n for n in tensors if n.startswith("quantize.") and n.split(".")[1] not in ("proj", "embed")]
    return {**folded, **{name: tensors[name] for name in rest}}


# ---- diffusers ----


def diffusers_config(config: TokenizerConfig) -> dict[str, Any]:
    """Return the keys of diffusers' `config.json` that describe this architecture."""
    model = vqgan_of(config)
    levels = range(len(model.multipliers))
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
        "vq_embed_dim": code_dim_of(config),
        "norm_type": "group",
        "mid_block_add_attention": model.attention,
    }


def to_diffusers(tokenizer: Tokenizer, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `config.json` and the tensors of a diffusers VQModel with the same codes and images.

    The nearest of codes of unit length is the same for a latent of any length, so a codebook that compares directions
    is written normalized. Raises `UserError` naming, after `where`, what a VQModel does not support.
    """
    config, model = tokenizer.config, vqgan_of(tokenizer.config, where)
    if not isinstance(config.quantizer, VQConfig | SimVQConfig):
        kind = config.quantizer.kind
        raise UserError(f"{where}: --quantizer is {kind}; diffusers' VQModel has one codebook and supports vq or simvq")
    if model.patch > 1:
        raise UserError(f"{where}: --patch is {model.patch}; diffusers' VQModel does not fold pixels into channels")
    height, width = config.image_size
    keys = {"_class_name": "VQModel", **diffusers_config(config)}
    # With lookup_from_codebook, `decode(codes, force_not_quantize=True, shape=...)` accepts codes.
    keys |= {"sample_size": height if height == width else [height, width], "lookup_from_codebook": True}
    table = tokenizer.quantizer.lookup(torch.arange(tokenizer.codebook_size))
    state = {**tokenizer.state_dict(), "quantizer.codebook.codes": table}
    tensors: dict[str, Tensor] = {}
    for ours, theirs, linear in _tensor_names(tokenizer, DIFFUSERS):
        for name, part in zip(theirs, state[ours].detach().chunk(len(theirs))):
            tensors[name] = part.flatten(1) if linear else part
    if not model.attention:  # a VQModel always has two middle blocks: the second adds nothing
        for name, tensor in list(tensors.items()):
            if ".mid_block.resnets.0." in name:
                tensors[name.replace("resnets.0", "resnets.1")] = torch.zeros_like(tensor)
    return keys, tensors


def without_attention(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Adapt a VQModel of `mid_block_add_attention: false`; return its tensors and whether they have attention.

    A second middle block of zeros, as `to_diffusers` writes it, is removed; otherwise an attention of zeros is added.
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
