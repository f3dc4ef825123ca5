"""Weight files: what they hold is read as the file says, or refused by name.

Reading a `.pt` file runs no code: tensors and a few plain types are read, every other class is
refused. Training arguments (`args`) are kept, because they say what the weights mean.
"""

import argparse
import hashlib
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.errors import FlowTurboError

WEIGHTS_KEYS = ("model", "ema")
ARGUMENTS_KEYS = ("args", "config", "cfg")
# Parts of names that wrappers add: DDP, torch.compile, activation checkpoints, FSDP.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
_UPDATES = "n_averaged"  # how many updates torch's AveragedModel has had: no weight
_STAND_INS = ("argparse", "collections", "numpy", "omegaconf", "pathlib", "typing")
_PLAIN_BUILTINS = {f"builtins.{kind.__name__}" for kind in (bool, dict, float, int, list, str)}
_ALLOWED = "tensors, argparse, pathlib, numpy scalars and omegaconf"


class CheckpointError(FlowTurboError):
    """A checkpoint cannot be read, or does not fit the architecture."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors by name, and what it says of itself.

    `metadata` is the text metadata of a safetensors file. `arguments` are the training arguments
    of a `.pt` file, flat: an argument that stands in several places with several values is left
    out.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def integer(self, name: str) -> int | None:
        """A whole number above 0 that the file states, None where it states none."""
        stated = self.arguments.get(name, self.metadata.get(name))
        if stated is None:
            return None
        try:
            value = int(stated)
            fits = value > 0 and value == float(stated) and not isinstance(stated, bool)
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise CheckpointError(f"{self.path}: {name} must be an integer above 0, got {stated!r}")
        return value

    def text(self, name: str) -> str:
        """A training argument that is text, "" where there is none."""
        stated = self.arguments.get(name)
        return stated if isinstance(stated, str) else ""


def load_checkpoint(
    path: str | Path, weights: str | None = None, *, usual: str = "model"
) -> Checkpoint:
    """Reads a `.pt` or `.safetensors` file.

    `weights` says which weights of a `.pt` with several, "model" or "ema"; without it they are the
    `usual` ones, if it has them. Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if weights not in (None, *WEIGHTS_KEYS):
        raise CheckpointError(f"weights must be model or ema, got {weights!r}")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return Checkpoint(path, without_wrappers(path, tensors), metadata)
    content = _load_pt(path)
    chosen = _choose(path, content, weights, usual)
    return Checkpoint(path, without_wrappers(path, chosen), arguments=_arguments(content))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors by name, and its text metadata; raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def read_pt(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` or `.bin` file that is one state dict; raises CheckpointError."""
    return dict(_state_dict(path, _load_pt(path)))


def _load_pt(path: Path) -> Any:
    in_zip = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_scalars()]):
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if in_zip else []
            stand_ins: list[Any] = [(_stand_in(path, name), name) for name in sorted(others)]
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=in_zip)
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes make it do
        raise CheckpointError(f"{path} is not a checkpoint of plain tensors: {_why(error)}") from (
            error
        )


class _StandIn:
    """Takes the place of an object that is no weight; its class is never imported, nothing runs."""

    def __new__(cls, *_arguments: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            vars(self).update({str(name): value for name, value in state.items()})


def _mapping(*_arguments: Any) -> OrderedDict[Any, Any]:
    """In place of collections.defaultdict, whose items the unpickler would refuse."""
    return OrderedDict()


def _stand_in(path: Path, name: str) -> Callable[..., Any]:
    if name == "collections.defaultdict":
        return _mapping
    if name in _PLAIN_BUILTINS or name.partition(".")[0] in _STAND_INS:
        return _StandIn
    raise CheckpointError(
        f"{path} has an object of the class {name}, which is refused: reading it could run code. "
        f"Allowed are {_ALLOWED}; save the weights alone, as torch.save(model.state_dict(), file)"
    )


def _numpy_scalars() -> list[Any]:
    """What a pickled numpy scalar is made of, under the names of numpy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdSU"}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [(np.dtype, "numpy.dtype"), *((scalar, f"{m}.scalar") for m in modules), *kinds]


def _why(error: Exception) -> str:
    """The reason of an unpickler's error, in a line."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it has an object of the class {found[1]}; allowed are {_ALLOWED}"
    if "Unsupported operand" in text:
        return "it was written with a pickle protocol above 2: save it with torch.save's default"
    return text.partition("\n")[0] or type(error).__name__


def _choose(path: Path, content: Any, weights: str | None, usual: str) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    nested = [key for key in WEIGHTS_KEYS if isinstance(content.get(key), Mapping)]
    if nested:
        key = weights or (usual if usual in nested else nested[0])
        if key not in nested:
            raise CheckpointError(f"{path} has no {key!r} weights, it has {', '.join(nested)}")
        content = content[key]
    elif weights == "ema":
        raise CheckpointError(f"{path} holds one set of weights and no 'ema'")
    return _state_dict(path, content)


def _state_dict(path: Path, content: Any) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        found = "it is empty" if content == {} else f"it is a {type(content).__name__}"
        raise CheckpointError(f"{path} is not a state dict: {found}")
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise CheckpointError(f"{path} is not a state dict: {key!r} is no named tensor")
    return content


def without_wrappers(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the network has them; raises CheckpointError where two become one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = re.sub(_WRAPPERS, "", name)
        if plain in found:
            raise CheckpointError(f"{path} has {plain!r} twice, the second time as {name!r}")
        if plain != _UPDATES:
            found[plain] = tensor
    return found


def _arguments(content: Any) -> dict[str, Any]:
    """The training arguments in a file's `content`, flat."""
    found: dict[str, Any] = {}
    conflicting = set()
    for key in ARGUMENTS_KEYS:
        for name, value in _flat(content.get(key)):
            if found.setdefault(name, value) != value:
                conflicting.add(name)
    return {name: value for name, value in found.items() if name not in conflicting}


def _flat(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the leaves of nested arguments."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, _StandIn):  # omegaconf's containers keep their nodes in `_content`
        value = vars(value).get("_content")
    for name, item in value.items() if isinstance(value, Mapping) else ():
        if isinstance(item, _StandIn) and "_val" in vars(item):  # and its nodes a value each
            item = vars(item)["_val"]
        if isinstance(item, Mapping | argparse.Namespace | _StandIn):
            yield from _flat(item)
        else:
            yield str(name), item.item() if isinstance(item, np.generic) else item


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Loads `tensors` of the file `path` into `module`, in float32: all of them, and no others.

    What the module holds afterwards is compared with the file. Raises CheckpointError naming the
    first tensor that is missing, unknown, of another shape, of a type that is no weight's, or not
    finite.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key, shape in expected.items():
        if key not in tensors:
            raise CheckpointError(f"{path} has no tensor {key!r} of shape {shape}")
        got = tuple(tensors[key].shape)
        if got != shape:
            raise CheckpointError(f"{path}: {key} must have shape {shape}, got {got}")
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise CheckpointError(f"{path} has an unknown tensor {unknown[0]!r}")
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: {key} must be floating-point, got {value.dtype}")
        if not value.float().isfinite().all():
            raise CheckpointError(f"{path}: {key} must be finite, it has NaN or infinity")
    module.load_state_dict({key: value.float() for key, value in tensors.items()})
    for key, value in module.state_dict().items():
        if not torch.equal(value, tensors[key].float()):
            raise CheckpointError(f"{path}: {key} is not in the network as the file has it")


def sha256(path: Path) -> str:
    """Digest of a file, or of the names and contents of a folder's files."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if path.is_dir():
            digest.update(file.name.encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
