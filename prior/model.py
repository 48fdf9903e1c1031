"""The prior: a vocabulary of codes, classes and one null token, and a transformers causal LM over it.

A sequence is `[condition][codes in raster order, depth innermost]`. The condition is a class id, or the null id, which
stands for "unconditional" and is the start token where there are no classes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from vqgen.artifact import copy_artifact, load_artifact, save_artifact
from vqgen.config import from_dict
from vqgen.errors import UserError
from vqgen.files import read_json, write_text
from vqgen.tokenizer.model import Tokenizer

from .options import PriorConfig
from .vocabulary import Vocabulary


def backbone_config(config: PriorConfig, vocabulary: Vocabulary) -> LlamaConfig | Qwen3Config | GPT2Config:
    """The transformers configuration of a prior of this size over this vocabulary."""
    positions = vocabulary.length + 1  # the condition and every code
    share = 4 if config.backbone == "gpt2" else 8 / 3
    hidden = config.hidden_dim or -(-int(config.dim * share) // 64) * 64
    # There is no end token: every sequence has the same length.
    common: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "bos_token_id": vocabulary.null,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if config.backbone == "gpt2":
        return GPT2Config(
            n_embd=config.dim,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=hidden,
            n_positions=positions,
            embd_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            attn_pdrop=0.0,
            **common,
        )
    shape: dict[str, Any] = {
        "hidden_size": config.dim,
        "intermediate_size": hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.dim // config.heads,
        "max_position_embeddings": positions,
        **common,
    }
    return LlamaConfig(**shape) if config.backbone == "llama" else Qwen3Config(**shape)


def _add_dropout(backbone: PreTrainedModel, dropout: float) -> None:
    """Dropout where GPT-2 has it, for backbones without any, as hooks: names and saved weights stay as they are."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], dropout, module.training), *output[1:])
        return F.dropout(output, dropout, module.training)

    if dropout and backbone.config.model_type != "gpt2":  # GPT-2 has its own
        backbone.get_input_embeddings().register_forward_hook(hook)
        for layer in backbone.model.layers:
            layer.self_attn.register_forward_hook(hook)
            layer.mlp.register_forward_hook(hook)


def _compare(path: Path, own: PreTrainedConfig) -> None:
    """Refuse a `config.json` that describes another network than `vqgen.json`: each reader would see another model."""
    try:
        stated = AutoConfig.for_model(**read_json(path)).to_dict()
    except UserError:
        raise
    except Exception as error:  # the library checks types by errors of its own
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no transformers configuration ({reason}); restore the file") from error
    for key, value in own.to_dict().items():
        # These name the writer, not the network.
        if key not in ("architectures", "dtype", "transformers_version") and stated.get(key) != value:
            raise UserError(f"{path} has {key} {stated.get(key)!r}, vqgen.json needs {value!r}; restore the file")


def _check_description(about: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for values in `vqgen.json` that would be taken for others, or fail much later."""
    names, grid, shape = about["class_names"], about["grid"], about["image_shape"]
    numbers = [about["codebook_size"], about["depth"], about["classes"], *grid, *shape]
    if not all(type(number) is int for number in numbers) or (len(grid), len(shape)) != (2, 3):
        raise ValueError("codebook_size, depth, grid, classes and image_shape have to be whole numbers")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("class_names have to be a list of names")
    if names and len(names) != about["classes"]:
        raise ValueError(f"{len(names)} class_names for {about['classes']} classes")
    if not isinstance(about["tokenizer_fingerprint"], str) or not isinstance(about["label_dropout"], (int, float)):
        raise ValueError("tokenizer_fingerprint has to be text, and label_dropout a number")


class Prior(nn.Module):
    """An autoregressive model of code sequences; it returns logits and nothing else.

    Args:
        image_shape: channels, height and width of the images behind the codes (for bits per dimension).
        class_names: one a class, or None where the model is unconditional.
        tokenizer_fingerprint: of the tokenizer that made the codes.
        label_dropout: share of the training sequences without their class; at 0 guidance has nothing to go by.
    """

    def __init__(
        self,
        config: PriorConfig,
        vocabulary: Vocabulary,
        image_shape: tuple[int, int, int],
        class_names: list[str] | None,
        tokenizer_fingerprint: str,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.config, self.vocabulary, self.image_shape = config, vocabulary, image_shape
        self.class_names, self.tokenizer_fingerprint = class_names, tokenizer_fingerprint
        self.label_dropout = label_dropout
        self.backbone: PreTrainedModel = AutoModelForCausalLM.from_config(
            backbone_config(config, vocabulary), attn_implementation="sdpa", dtype=torch.float32
        )
        _add_dropout(self.backbone, config.dropout)
        self.fingerprint: str | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 (B, T) -> logits (B, T, vocabulary.size); position t sees tokens 0..t."""
        return self.backbone(input_ids=tokens, use_cache=False).logits

    def checkpoint_gradients(self) -> None:
        """From now on keep no activations within a layer, but compute them again in the backward pass."""
        old = self.backbone.gradient_checkpointing_enable  # its name before transformers 5.21
        getattr(self.backbone, "activation_checkpointing_enable", old)({"use_reentrant": False})

    def flops_per_token(self) -> float:
        """Floating-point operations of the forward pass for one token of a whole sequence: two a weight of every
        matrix, and the products of attention with all positions."""
        looked_up = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        weights = sum(p.numel() for p in self.backbone.parameters() if p.ndim > 1 and id(p) not in looked_up)
        return 2 * weights + 4 * self.config.layers * self.config.dim * self.vocabulary.length

    def load_tokenizer(self, folder: Path) -> Tokenizer:
        """The tokenizer in `folder`. Raises `UserError` where it is not the one whose codes this prior learned."""
        tokenizer = Tokenizer.load(folder)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{folder} has fingerprint {str(tokenizer.fingerprint)[:12]}, but this prior was trained on codes of "
                f"{self.tokenizer_fingerprint[:12]}; put or name the tokenizer that made the codes"
            )
        return tokenizer

    def save(self, folder: Path, tokenizer_folder: Path) -> str:
        """Write a model folder with a copy of the tokenizer inside, and return the fingerprint.

        `config.json` and `model.safetensors` are what `AutoModelForCausalLM.from_pretrained` reads.
        """
        folder = Path(folder)
        self.load_tokenizer(tokenizer_folder)
        copy_artifact(tokenizer_folder, folder / "tokenizer")
        settings = self.backbone.config.to_diff_dict() | {"architectures": [type(self.backbone).__name__]}
        settings["dtype"] = str(self.backbone.dtype).removeprefix("torch.")
        write_text(folder / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
        description = {
            "prior": vars(self.config),
            "codebook_size": self.vocabulary.codebook_size,
            "depth": self.vocabulary.depth,
            "grid": list(self.vocabulary.grid),
            "classes": self.vocabulary.classes,
            "class_names": self.class_names,
            "image_shape": list(self.image_shape),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "label_dropout": self.label_dropout,
        }
        self.fingerprint = save_artifact(folder, "prior", description, self.backbone.state_dict())
        return self.fingerprint

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Prior":
        """Read a model folder, in evaluation mode. Raises `UserError` where anything does not fit."""
        folder = Path(folder)
        artifact = load_artifact(folder, "prior")
        about = artifact.description
        try:
            _check_description(about)
            vocabulary = Vocabulary(about["codebook_size"], about["depth"], tuple(about["grid"]), about["classes"])
            prior = cls(
                from_dict(PriorConfig, about["prior"], str(folder / "vqgen.json")),
                vocabulary,
                tuple(about["image_shape"]),
                about["class_names"],
                about["tokenizer_fingerprint"],
                about["label_dropout"],
            )
        except (KeyError, TypeError, ValueError) as error:
            path = folder / "vqgen.json"
            raise UserError(f"{path} does not describe a prior ({error!r}); restore the file") from error
        _compare(folder / "config.json", prior.backbone.config)
        try:
            prior.backbone.load_state_dict(artifact.tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: weights and vqgen.json do not fit: {reason}") from error
        prior.fingerprint = artifact.fingerprint
        return prior.eval().to(device)
