"""Weight files: the content is read exactly, or refused by name.

Reading a `.pt` file runs no code and imports no class. A stand-in replaces each object that is
neither a tensor nor a plain value. A stand-in in the place of weights is refused; elsewhere it is
harmless. Training arguments are kept, because they say what the weights mean.
"""

import argparse
import contextlib
import hashlib
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.errors import FlowTurboError
from flowturbo.textfile import read_json

WEIGHTS_KEYS = ("model", "ema")
# Keys of the last weights: the first one in the file counts. Keys of averages have "ema" in them.
_LAST = ("model", "model_state_dict", "state_dict", "net", "network", "module")
_AVERAGE = re.compile(r"(^|_)ema\d*(_|$)")
ARGUMENTS_KEYS = (
    *("args", "config", "cfg", "hparams", "hyper_parameters", "options", "params"),
    *("model_args", "model_config", "model_kwargs", "opt_args", "train_args", "training_args"),
)
# Parts of tensor names that wrappers add: DDP, torch.compile, activation checkpoints, FSDP.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
_UPDATES = "n_averaged"  # the update counter of torch's AveragedModel, not a weight
# Prefixes of arguments of the network itself.
_OF_THE_NETWORK = ("", "model", "network", "net", "transport")
# Other networks, whose arguments have the same names.
_OF_OTHERS = (
    *("encoder", "decoder", "teacher", "vae", "probe", "first_stage", "classifier"),
    *("discriminator", "critic"),
    *("repa", "dino", "clip", "projector"),
)
# Groups of alternative names of arguments.
_ALIASES = {
    **dict.fromkeys(("n_classes", "nb_classes", "num_class", "class_num"), "num_classes"),
    **dict.fromkeys(("n_heads", "n_head", "num_attention_heads"), "num_heads"),
    **dict.fromkeys(("label_drop_prob", "label_dropout", "label_dropout_prob"), "cfg_prob"),
    **dict.fromkeys(("arch", "model_name"), "model"),
}
_UNSTATED = re.compile(r"None|\?\?\?|.*\$\{.*|")  # missing and computed values of omegaconf
# The first opcodes of pickle protocols 4 and 5, and the opcodes for bytes of protocol 3.
_LATER_PROTOCOL = re.compile(r"Unsupported operand (149|150|66|67)\b|Detected pickle protocol")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
# Common files that are not weights, by their first bytes.
_NO_WEIGHTS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file: run `git lfs pull`",
    b"<": "is a web page, not weights: download the file itself",
}

_STEM = "diffusion_pytorch_model"  # of diffusers' weight files
_FORMS = ("safetensors", "bin")


class CheckpointError(FlowTurboError):
    """A checkpoint cannot be read, or it does not fit the architecture."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file by name, and what the file says about them.

    `arguments` are the training arguments of a `.pt` file, or the text metadata of a safetensors
    file. They are plain values by dotted name, without their top-level key in the file.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[tuple[str, Any], ...] = ()

    def stated(self, name: str) -> list[Any]:
        """The different values that the file states for an argument, in order.

        Arguments at the top level or under the network's own name come first. Only if there are
        none, other arguments count, but never those of an encoder or a teacher.
        """
        own, others = [], []
        for path, value in self.arguments:
            place, _, last = path.replace("-", "_").rpartition(".")
            if _ALIASES.get(last, last) == name:
                if place in _OF_THE_NETWORK:
                    own.append(value)
                elif not any(other in place.lower() for other in _OF_OTHERS):
                    others.append(value)
        return list(dict.fromkeys(own or others))

    def integers(self, name: str) -> list[int]:
        """The different whole numbers above 0 that the file states for an argument.

        Raises CheckpointError if it states only other values.
        """
        found, others = [], []
        for stated in self.stated(name):
            try:
                fits = not isinstance(stated, bool) and float(stated) == int(float(stated)) > 0
            except (ValueError, OverflowError):
                fits = False
            if fits:
                found.append(int(float(stated)))
            else:
                others.append(stated)
        if others and not found:
            raise CheckpointError(
                f"{self.path}: {name} must be an integer above 0, got {others[0]!r}"
            )
        return list(dict.fromkeys(found))


def load_checkpoint(
    path: str | Path, weights: str | None = None, *, usual: str = "model"
) -> Checkpoint:
    """Reads a `.pt` or `.safetensors` file.

    `weights`, "model" or "ema", chooses between the weights of a `.pt` with both. The default is
    `usual`, if the file has these. Raises CheckpointError.
    """
    path = Path(path)
    if weights not in (None, *WEIGHTS_KEYS):
        raise CheckpointError(f"weights must be model or ema, got {weights!r}")
    _check_file(path)
    if _is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        if weights == "ema":
            raise CheckpointError(f"{path} holds one set of weights and no 'ema'")
        stated = tuple(_arguments(metadata))
        return Checkpoint(path, without_wrappers(path, tensors), metadata, stated)
    content = _load_pt(path)
    chosen = _choose(path, content, weights, usual)
    return Checkpoint(path, without_wrappers(path, chosen), arguments=tuple(_arguments(content)))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and its text metadata. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def read_pt(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` or `.bin` file that is one state dict; raises CheckpointError."""
    return dict(_state_dict(path, _load_pt(path)))


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the file with the weights")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    for mark, what in _NO_WEIGHTS.items():
        if start.startswith(mark):
            raise CheckpointError(f"{path} {what}")


def _is_safetensors(path: Path) -> bool:
    """Decides by suffix and content: a header length, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return (
        path.suffix == ".safetensors"
        and not zipfile.is_zipfile(path)
        or (start[8:] == b"{" and length < path.stat().st_size)
    )


def _load_pt(path: Path) -> Any:
    _check_file(path)
    # Files from before torch 1.6 are not zip files and cannot be memory-mapped.
    mmap = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
    plain = [argparse.Namespace, *_numpy_scalars()]
    stand_ins: dict[str, Callable[..., Any]] = {}
    while True:
        allowed: list[Any] = [*plain, *((made, name) for name, made in stand_ins.items())]
        try:
            with torch.serialization.safe_globals(allowed), path.open("rb") as file:
                # torch.load maps only a path, and it trusts the suffix of a path.
                source = path if mmap else file
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # broken bytes can raise anything in the unpickler
            if not _add_stand_in(stand_ins, str(error)):
                reason = _why(error)
                raise CheckpointError(
                    f"{path} cannot be read without running its code: {reason}"
                ) from error


class _StandIn:
    """Takes the place of an object that is not a weight; `of` names the object's class."""

    of = ""

    def __new__(cls, *_arguments: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # For a class with slots the state is a pair; the second part has the slots' values.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                vars(self).update({str(name): value for name, value in part.items()})


def _add_stand_in(stand_ins: dict[str, Callable[..., Any]], error: str) -> bool:
    """Adds the stand-in that avoids an unpickler's `error`. Returns whether there is a new one."""
    if found := re.search(r"GLOBAL (\S+) was not an allowed", error):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"
        # The stand-in has the name of the class, so that the unpickler's errors show it.
        made: Callable[..., Any] = type(name, (_StandIn,), {"of": name, "__module__": "builtins"})
    elif found := re.search(r"Can only (\w+) .*got <class '(.+?)'>", error):
        # A subclass of dict or list: the unpickler can fill only the plain types.
        name = found[2]
        made = _AsList if found[1] in ("append", "extend") else _AsMapping
        if stand_ins.get(name) is made:
            return False
        stand_ins[name] = made
        return True
    else:
        return False
    return stand_ins.setdefault(name, made) is made


# Classes, because the unpickler makes some objects with __new__ and others with a call.
class _AsMapping:
    def __new__(cls, *_arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _AsList:
    def __new__(cls, *_arguments: Any) -> list[Any]:  # type: ignore[misc]
        return []


def _numpy_scalars() -> list[Any]:
    """The globals in a pickled numpy scalar, under the names of numpy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSUmMVO"}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [(np.dtype, "numpy.dtype"), *((scalar, f"{m}.scalar") for m in modules), *kinds]


def _why(error: Exception) -> str:
    """The reason of an unpickler's error, in one line."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it has an object of the class {found[1]}, which is refused"
    if re.search(_LATER_PROTOCOL, text):
        return "it was written with a pickle protocol above 2: save it with torch.save's default"
    reason = re.search(r"WeightsUnpickler error: (.+)", text)
    return (reason[1] if reason else text).partition("\n")[0] or type(error).__name__


def _choose(path: Path, content: Any, weights: str | None, usual: str) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {_kind(content)}, not named tensors")
    held = {str(name): value for name, value in content.items() if _holds_tensors(value)}
    last = [name for name in _LAST if isinstance(held.get(name), Mapping)]
    averages = ["ema"] if "ema" in held else [n for n in held if re.search(_AVERAGE, n)]
    if weights == "ema" and not averages:
        has = f"has {', '.join(last)}" if last else "holds one set of weights"
        raise CheckpointError(f"{path} {has} and no 'ema'")
    if weights == "model" and not last and averages:
        raise CheckpointError(f"{path} has no 'model' weights, it has {', '.join(averages)}")
    if averages and (weights or (usual if last else "ema")) == "ema":
        return _average(path, content, averages)
    return _state_dict(path, held[last[0]] if last else content)


def _average(path: Path, content: Mapping[Any, Any], names: list[str]) -> Mapping[str, Tensor]:
    remedy = "save one set of tensors by name, or take the last weights (--weights model)"
    if len(names) > 1:
        raise CheckpointError(f"{path} has several averages, {', '.join(names)}: {remedy}")
    value = content[names[0]]
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{path}: {names[0]!r} is {_kind(value)}, not named tensors: {remedy}"
        )
    return _state_dict(path, value)


def _holds_tensors(value: Any) -> bool:
    """Whether a container or a stand-in has a tensor anywhere in it."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            return item is not value
        if id(item) not in seen:  # containers can be cyclic
            seen.add(id(item))
            held = vars(item) if isinstance(item, _StandIn) else item
            if isinstance(held, Mapping):
                todo += held.values()
            elif isinstance(held, list | tuple):
                todo += held
    return False


def _state_dict(path: Path, content: Any) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        found = "it is empty" if content == {} else f"it is {_kind(content)}"
        raise CheckpointError(f"{path} is not a state dict: {found}")
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            found = ", ".join(map(str, list(content)[:5]))
            raise CheckpointError(
                f"{path} is not a state dict: {key!r} is {_kind(value)}, not a tensor. The file "
                f"has {found}; named tensors are needed, at the top level or under model or ema"
            )
    return content


def _kind(value: Any) -> str:
    return f"a {getattr(value, 'of', '') or type(value).__name__}"


def without_wrappers(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the name parts of wrappers. Raises CheckpointError if two names become equal."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = re.sub(_WRAPPERS, "", name)
        if plain in found:
            raise CheckpointError(f"{path} has {plain!r} twice, the second time as {name!r}")
        if plain != _UPDATES:
            found[plain] = tensor
    return found


def _arguments(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the training arguments in a file's `content`: dotted names and plain values."""
    for name, value in content.items():
        if name in ARGUMENTS_KEYS and (leaves := dict(_leaves(_read_object(value)))):
            for path, leaf in leaves.items():
                if isinstance(leaf, str) and (reference := re.fullmatch(_REFERENCE, leaf)):
                    leaf = leaves.get(reference[1], leaf)
                if _is_stated(leaf):
                    yield path, leaf
        elif _is_stated(value := _plain(value)):
            yield str(name), value


def _read_object(value: Any) -> Any:
    """The value of a JSON text; any other value unchanged."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _leaves(value: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    above = (*above, id(value))
    for name, item in _members(value).items():
        at = f"{path}.{name}" if path else str(name)
        yield at, _plain(item)
        if id(item) not in above:  # containers can be cyclic
            yield from _leaves(item, at, above)


def _members(value: Any) -> Mapping[Any, Any]:
    """The named entries of a container of arguments."""
    if isinstance(value, _StandIn):
        held = vars(value)
        # omegaconf keeps its nodes in _content, ml_collections in _fields.
        public = {name: item for name, item in held.items() if not name.startswith("_")}
        inner = (held[name] for name in ("_content", "_fields", "__dict__") if name in held)
        value = next(inner, public)
    elif isinstance(value, argparse.Namespace):
        value = vars(value)
    return value if isinstance(value, Mapping) else {}


def _plain(value: Any) -> Any:
    """A number or text as a plain value; None for anything else."""
    if isinstance(value, _StandIn):
        value = vars(value).get("_val")  # the value of an omegaconf node
    if isinstance(value, np.generic) or type(value) is Tensor and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, bool | int | float | str) else None


def _is_stated(value: Any) -> bool:
    if isinstance(value, str):
        return not re.fullmatch(_UNSTATED, value)
    return isinstance(value, bool | int | float)


def refuse_unknown_fields(
    path: Path, config: Mapping[str, Any], known: Container[str], cls: str
) -> None:
    """Raises CheckpointError for a field of the file `path` that the class `cls` would ignore.

    Names with _ at the start belong to diffusers; a field without a value says nothing.
    """
    for name, value in config.items():
        if not name.startswith("_") and name not in known and value is not None:
            raise CheckpointError(
                f"{path}: {name} is {value!r}, but this {cls} does not know that field and would "
                "ignore it"
            )


def read_folder(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A diffusers folder: the file with the weights, or the index of their shards, and the tensors.

    Raises CheckpointError.
    """
    path = _weights_file(folder)
    if path.suffix != ".json":
        return path, _read_file(path)
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{path} must have a weight_map of tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{path} names {name}, which is not in {folder}")
        held, stated = _read_file(folder / name), {k for k, file in files.items() if file == name}
        for tensor in sorted(held.keys() ^ stated):
            where = "is not in it" if tensor in stated else "is in it"
            raise CheckpointError(f"{path} does not fit {name}: {tensor} {where}")
        tensors |= held
    return path, tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    return read_pt(path) if path.suffix == ".bin" else read_safetensors(path)[0]


def _weights_file(folder: Path) -> Path:
    plain = [f"{_STEM}.{form}{index}" for form in _FORMS for index in ("", ".index.json")]
    for name in plain:
        if (folder / name).is_file():
            return folder / name
    # A variant, such as diffusers' fp16, in one file or in shards.
    names = sorted(path.name for path in folder.iterdir())
    for form in _FORMS:
        pattern = rf"{_STEM}\.(\w+\.{form}|{form}\.index\.\w+\.json)"
        found = [name for name in names if re.fullmatch(pattern, name)]
        if len(found) > 1:
            raise CheckpointError(
                f"{folder} has several sets of weights, keep one: {', '.join(found)}"
            )
        if found:
            return folder / found[0]
    raise CheckpointError(f"{folder} has no weights: {', '.join(plain)} or a variant is needed")


def load_exactly(
    module: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, assign: bool = False
) -> None:
    """Loads `tensors` of the file `path` into `module` in float32: all of them, and no others.

    With `assign` the tensors become those of the module, which may be on the meta device.

    Compares the loaded module with the file. Raises CheckpointError, which names the first tensor
    that is missing, unknown, of another shape, of a type that weights do not have, or not finite.
    """
    own = module.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
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
        if (kind := _no_weight(value)) is not None:
            raise CheckpointError(f"{path}: {key} must be a plain tensor, got {kind}")
        if not own[key].is_floating_point():  # a counter
            continue
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: {key} must be floating-point, got {value.dtype}")
        if not value.float().isfinite().all():
            raise CheckpointError(f"{path}: {key} must be finite, it has NaN or infinity")
    wanted = {
        key: of.float() if own[key].is_floating_point() else of for key, of in tensors.items()
    }
    module.load_state_dict(wanted, assign=assign)
    for key, value in module.state_dict().items():
        if not torch.equal(value, wanted[key]):
            raise CheckpointError(f"{path}: {key} differs between the network and the file")


def _no_weight(value: Tensor) -> str | None:
    """The kind of a tensor that has no readable values of its own; None for a plain tensor."""
    if type(value) not in (Tensor, nn.Parameter):
        return type(value).__name__
    if value.is_meta:
        return "a meta tensor, which has no values"
    return None if value.layout is torch.strided else str(value.layout)


def sha256(path: Path) -> str:
    """Digest of a file, or of the names and contents of a folder's files."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
