"""The prior: a transformers causal LM over sequences of a prefix (see `conditioning.py`) and codes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from vqgen.artifact import copy_artifact, load_artifact, refuse_others, save_artifact
from vqgen.config import from_dict
from vqgen.errors import UserError
from vqgen.files import DESCRIPTION, read_json, read_record, write_text
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.shipped import find_model

from .backbone import fused
from .backbone.config import backbone_config as backbone_config  # part of this module's interface
from .backbone.config import compare, plain_config
from .backbone.network import network_of
from .backbone.stored import StoredBackbone
from .conditioning import Conditioning
from .options import PriorConfig
from .orders import ORDERS
from .vocabulary import Vocabulary

if TYPE_CHECKING:  # takes seconds
    from transformers import PreTrainedModel


_Side = Annotated[int, Interval(ge=1, le=2**16)]
_SIZES = {"backbone": "--backbone", "dim": "--dim", "layers": "--layers", "heads": "--heads", "hidden": "--hidden-dim"}
"""Fields of `PriorConfig` that two networks share where the weights of one are to mean the same in the other."""


@dataclass(frozen=True)
class _Description:
    """What every prior's `vqgen.json` holds beside the keys of its conditioning."""

    prior: dict[str, Any]
    codebook_size: Annotated[int, Interval(ge=1, le=2**24)]
    depth: Annotated[int, Interval(ge=1, le=256)]
    grid: tuple[_Side, _Side]
    image_shape: tuple[_Side, _Side, _Side]
    tokenizer_fingerprint: str


def read_conditioning(folder: Path) -> tuple[PriorConfig, Conditioning]:
    """Read what a prior's model folder says of its backbone and sequences; no weights are read. Raises `UserError`."""
    path = folder / DESCRIPTION
    about = read_json(path)
    if (kind := about.get("kind")) != "prior":
        raise UserError(f"{path} describes a {kind}, where a prior is needed")
    try:
        known = read_record(path, _Description)
        if (order := known.prior.get("order", "raster")) not in ORDERS:
            text = f"has the order {order!r}, this installation knows {', '.join(ORDERS)}"
            raise UserError(f"{path} {text}; use the version of vqgen that wrote it")
        config = from_dict(PriorConfig, known.prior, str(path))
        vocabulary = Vocabulary(known.codebook_size, known.depth, known.grid, config.order)
        conditioning = Conditioning.from_description(vocabulary, about)
        conditioning.read_files(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a prior ({error!r}); restore the file") from error
    return config, conditioning


class Prior(nn.Module):
    """An autoregressive model of code sequences; it returns logits and nothing else.

    Args:
        image_shape: channels, height and width of the images behind the codes (for bits per dimension).
        tokenizer_fingerprint: of the tokenizer that made the codes.
        stored: hold the parameters of a Llama or Qwen3 alone, and build the network when it is first called.
    """

    def __init__(
        self,
        config: PriorConfig,
        conditioning: Conditioning,
        image_shape: tuple[int, ...],
        tokenizer_fingerprint: str,
        stored: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.conditioning, self.vocabulary = config, conditioning, conditioning.vocabulary
        self.image_shape, self.tokenizer_fingerprint = image_shape, tokenizer_fingerprint
        plain = plain_config(config, conditioning) if stored else None
        # Only `Generator` has a prior with a `StoredBackbone`, until it is called.
        self.backbone: PreTrainedModel = StoredBackbone(plain) if plain else network_of(config, conditioning)  # type: ignore[assignment]
        self.fingerprint: str | None = None
        self.fused = False  # train by `fused.logits`

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 (B, T) -> logits (B, T, V); position t sees tokens 0..t.

        V is conditioning.size, or vocabulary.size where the backbone predicts codes alone (mingpt).
        """
        if isinstance(self.backbone, StoredBackbone):
            with torch.inference_mode(False):
                network = network_of(self.config, self.conditioning).train(self.training)
                network.to(self.backbone.device)  # type: ignore[arg-type]
                for name, parameter in self.backbone.named_parameters():
                    network.get_parameter(name).data = parameter.data
            self.backbone = network
        if self.training and self.fused:
            return fused.logits(self.backbone, tokens, self.config.dropout)
        logits = self.backbone(input_ids=tokens, use_cache=False).logits
        return logits[..., : self.vocabulary.size] if self.config.backbone == "mingpt" else logits

    def start_from(self, folder: Path) -> list[str]:
        """Copy the weights of another prior; token ids that it lacks keep their own. Returns lines for the user, where
        its classes have other names. Raises `UserError`."""
        other = Prior.load(folder)
        if other.tokenizer_fingerprint != self.tokenizer_fingerprint:
            theirs, ours = other.tokenizer_fingerprint[:12], self.tokenizer_fingerprint[:12]
            raise UserError(f"--init: {folder} is of tokenizer {theirs}, the codes are of {ours}; use its codes")
        for name, option in _SIZES.items():
            theirs, ours = getattr(other.config, name), getattr(self.config, name)
            if theirs != ours:
                raise UserError(f"--init: {folder} has {option} {theirs}, this run has {ours}; give {option} {theirs}")
        own = self.backbone.state_dict()
        for name, value in other.backbone.state_dict().items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")):
                for ours, theirs in self.conditioning.common_ids(other.conditioning):
                    own[name][ours] = value[theirs]
            elif name.endswith("wpe.weight"):  # those of the codes in sequences with every part that is not omissible
                first = self.conditioning.plain.length - other.conditioning.plain.length
                ours, theirs = own[name][max(first, 0) :], value[max(-first, 0) :]
                count = min(len(ours), len(theirs))
                ours[:count] = theirs[:count]
            else:
                own[name].copy_(value)
        here, there = (each.classes.names or [] for each in (self.conditioning, other.conditioning))
        if not here or not there or here == there:
            return []
        known = len(set(here) & set(there))
        return [f"--init: {known} of {len(here)} classes have names that {folder} knows; the others start new"]

    def checkpoint_gradients(self) -> None:
        """Enable gradient checkpointing: activations within a layer are computed again in the backward pass."""
        old = self.backbone.gradient_checkpointing_enable  # its name before transformers 5.21
        getattr(self.backbone, "activation_checkpointing_enable", old)({"use_reentrant": False})

    def flops_per_token(self) -> float:
        """Floating-point operations of the forward pass per token of a full sequence: two for each matrix weight, and
        the products of attention with all positions."""
        embeddings = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        weights = sum(p.numel() for p in self.backbone.parameters() if p.ndim > 1 and id(p) not in embeddings)
        positions = self.conditioning.plain.length + self.vocabulary.length - 1
        return 2 * weights + 4 * self.config.layers * self.config.dim * positions

    def load_tokenizer(self, folder: Path) -> Tokenizer:
        """Load the tokenizer in `folder`. Raises `UserError` where it is not the one whose codes this prior learned."""
        tokenizer = Tokenizer.load(folder)
        found, wanted = str(tokenizer.fingerprint), self.tokenizer_fingerprint
        if found != wanted:
            text = (
                f"has fingerprint {found[:12]}, this prior needs {wanted[:12]}; give the tokenizer that made the codes"
            )
            raise UserError(f"{folder} {text}")
        return tokenizer

    def save(self, folder: Path, tokenizer_folder: Path) -> str:
        """Write a model folder, which transformers reads too, with a copy of the tokenizer; return the fingerprint."""
        folder = Path(folder)
        self.load_tokenizer(tokenizer_folder)
        copy_artifact(tokenizer_folder, folder / "tokenizer")
        self.write_config(folder / "config.json")
        self.conditioning.write_files(folder)
        self.fingerprint = save_artifact(folder, "prior", self.description, self.backbone.state_dict())
        return self.fingerprint

    @property
    def description(self) -> dict[str, Any]:
        """What `vqgen.json` holds besides kind, version and fingerprint."""
        # Priors in raster order keep the description of version 0.1.
        options = {name: value for name, value in vars(self.config).items() if (name, value) != ("order", "raster")}
        return {
            "prior": options,
            "codebook_size": self.vocabulary.codebook_size,
            "depth": self.vocabulary.depth,
            "grid": list(self.vocabulary.grid),
            "image_shape": list(self.image_shape),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            **self.conditioning.describe(),
        }

    def write_config(self, path: Path) -> None:
        """Write the configuration of the backbone, as transformers reads it."""
        settings = self.backbone.config.to_diff_dict() | {"architectures": [type(self.backbone).__name__]}
        settings["dtype"] = str(self.backbone.dtype).removeprefix("torch.")
        write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def generation_config(self) -> dict[str, Any]:
        """Contents of transformers' `generation_config.json`: as many tokens as an image has, from all ids."""
        length = self.vocabulary.length
        found = {"bos_token_id": self.conditioning.null, "do_sample": True, "top_k": 0}
        return found | {"max_new_tokens": length, "min_new_tokens": length}

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", stored: bool = False) -> "Prior":
        """Read a model folder, or that of a model of the package by its name, in evaluation mode; `stored` as for
        `Prior`. Raises `UserError` where anything does not fit."""
        folder = find_model(Path(folder))
        artifact, path = load_artifact(folder, "prior"), folder / DESCRIPTION
        about, known = artifact.description, read_record(path, _Description)
        config, conditioning = read_conditioning(folder)
        shape, mark = known.image_shape, known.tokenizer_fingerprint
        try:
            with torch.device("meta"):
                prior = cls(config, conditioning, shape, mark, stored)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not describe a prior ({error!r}); restore the file") from error
        if unknown := sorted(set(about) - set(prior.description)):
            text = f"has {', '.join(map(repr, unknown))}, which this installation does not know"
            raise UserError(f"{path} {text}; use the version of vqgen that wrote it")
        compare(folder / "config.json", config, conditioning)
        refuse_others(artifact.tensors, prior.backbone.state_dict(), folder)
        prior = cls(config, conditioning, shape, mark, stored)
        prior.backbone.load_state_dict(artifact.tensors)
        prior.fingerprint = artifact.fingerprint
        return prior.eval().to(device)
