"""Weights that no model can use, wherever they are read: NaN, infinity, tensors larger than their file."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.models import make_prior
from torch import Tensor

from vqgen.artifact import DESCRIPTION, WEIGHTS, fingerprint, read_tensors, refuse_non_finite, write_tensors
from vqgen.errors import UserError
from vqgen.evaluation.extractors import extractor_for
from vqgen.files import read_json, write_json
from vqgen.prior.model import Prior
from vqgen.tokenizer.convert.read import read_checkpoint
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.model import Tokenizer

NAN, INFINITY = float("nan"), float("inf")


def broken(value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    whole = torch.zeros(3, 4)
    whole[1, 2] = value
    return {"fine": torch.ones(2), "count": torch.ones(2, dtype=torch.long), "hurt": whole.to(dtype)}


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_the_first_tensor_with_nan_or_infinity_is_named(value: float, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"file\.pt: hurt"):
        refuse_non_finite(broken(value, dtype), "file.pt")
    refuse_non_finite(broken(1.0, dtype), "file.pt")


def test_types_of_8_bits_and_empty_tensors() -> None:
    refuse_non_finite({"eight": torch.ones(3).to(torch.float8_e4m3fn), "empty": torch.zeros(0)}, "file.pt")
    with pytest.raises(UserError, match="eight"):
        refuse_non_finite({"eight": torch.full((3,), NAN).to(torch.float8_e4m3fn)}, "file.pt")


def hurt(folder: Path, value: float = NAN) -> str:
    """Put a value into a model folder's weights, with a fingerprint that fits; return the tensor's name."""
    tensors = read_tensors(folder / WEIGHTS)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].flatten()[-1] = value
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / DESCRIPTION, read_json(folder / DESCRIPTION) | {"fingerprint": fingerprint(tensors)})
    return name


def test_a_model_folder_with_nan_is_refused(tmp_path: Path) -> None:
    model = make_prior(tmp_path / "model")
    for folder, load in (model, Prior.load), (model / "tokenizer", Tokenizer.load):
        name = hurt(folder)
        with pytest.raises(UserError) as refused:
            load(folder)
        assert name in str(refused.value) and str(folder / WEIGHTS) in str(refused.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_converted_weights_with_nan_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_tensors(path, broken(NAN)) if path.suffix == ".safetensors" else torch.save(broken(NAN), path)
    with pytest.raises(UserError, match=rf"{name}: hurt"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(2**40), torch.eye(3).to_sparse()],
    ids=["expanded", "sparse"],
)
def test_a_checkpoint_has_plain_tensors_only(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"fine": torch.ones(2), "odd": tensor}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: odd"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: odd"):
        extractor_for("inception", str(tmp_path / "a.pt"), torch.device("cpu"))


def test_numbers_of_4_bits_are_no_plain_tensor(tmp_path: Path) -> None:
    """Safetensors has them, and torch a type without any arithmetic."""
    header = b'{"odd":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"a\.safetensors: odd .*plain tensor"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_checkpoint_that_unpacks_to_more_than_it_has_is_refused(tmp_path: Path) -> None:
    torch.save({"zeros": torch.zeros(2**20)}, tmp_path / "plain.pt")
    assert read_checkpoint(tmp_path / "plain.pt")["zeros"].shape == (2**20,)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "a.pt", "w") as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 2**16
    with pytest.raises(UserError, match=r"a\.pt"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt"):
        extractor_for("inception", str(tmp_path / "a.pt"), torch.device("cpu"))


def test_networks_of_metrics_refuse_nan(tmp_path: Path) -> None:
    from torchvision.models.vgg import cfgs, make_layers

    weights = {f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()}
    weights["features.28.bias"][7] = INFINITY
    path = tmp_path / "vgg16.safetensors"
    write_tensors(path, weights)
    with pytest.raises(UserError, match=r"vgg16\.safetensors.*features\.28\.bias"):
        PerceptualDistance("vgg", str(path))
    for network in ("inception", "fd-vgg16"):
        with pytest.raises(UserError, match=r"vgg16\.safetensors.*features\.28\.bias"):
            extractor_for(network, str(path), torch.device("cpu"))  # type: ignore[arg-type]


def test_weights_are_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    with pytest.raises(UserError, match="fifo"):
        read_tensors(tmp_path / "fifo.safetensors")
    with pytest.raises(UserError, match="fifo"):
        read_checkpoint(tmp_path / "fifo.safetensors")
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(UserError, match="fifo"):
        read_checkpoint(tmp_path / "fifo.pt")
