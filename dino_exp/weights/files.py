"""Files of weights that a stranger may have written: read as data, never run, in memory bounded by their size.

Read are safetensors, and what `torch.save` writes since torch 1.6, of which only tensors, containers and plain values
are taken (`weights_only=True`). Torch is imported when a file is read, not to find its digest.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.errors import RefusedError, UsageError
from dino_exp.fsio import DamagedFileError, parse_json
from dino_exp.weights.architecture import ARCHITECTURE, FACTS
from dino_exp.weights.names import WRAPPERS, ModelTensors, is_hub, split_model

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE_BYTES = 16 << 30
DIGEST_SCHEME = "sha256:"
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_TORCH_ZIP = b"PK\x03\x04"
_MOST_NAMED = 3
_MOST = 1 << 31


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One model out of a file. `digest` is `sha256:` and that of the file's bytes, all of which were read for it.

    `part` is what the file, or the program that wrote it, calls the model (`teacher`); None where it has no name.
    `metadata` is that of a safetensors file.
    """

    path: Path
    digest: str
    part: str | None
    is_hub: bool
    model: ModelTensors
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """In a few words: which model, and whose names its tensors have."""
        return f"{self.part or 'model'}{' (HuggingFace names)' if self.is_hub else ''}"


def file_digest(path: Path) -> str:
    """`sha256:` and the digest of a file's bytes. Raises UsageError where there is no such file, OSError."""
    check_is_file(path)
    with path.open("rb") as file:
        return DIGEST_SCHEME + hashlib.file_digest(file, "sha256").hexdigest()


def check_is_file(path: Path) -> None:
    """Raise UsageError for a folder, a pipe, a missing file, or one larger than any weights."""
    if path.is_dir():
        raise UsageError(f"{path}: a folder, expected a file of weights, such as {path / 'model.safetensors'}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file, expected weights (.safetensors or .pth)")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes, expected weights of at most {MAX_FILE_BYTES}")


def read_weight_file(path: Path, part: str | None = None) -> WeightFile:
    """The model in a file; of one that holds several, `part`, or else the teacher before the student.

    Raises UsageError where there is no such file or part, RefusedError for a pickle that names anything but tensors,
    containers and plain values, or for another format, DamagedFileError for one that cannot be read, OSError.
    """
    check_is_file(path)
    data = path.read_bytes()
    digest = DIGEST_SCHEME + hashlib.sha256(data).hexdigest()
    metadata: dict[str, str] = {}
    if data.startswith(_TORCH_ZIP):
        loaded = _load_torch(data, path)
        name, found = _choose(loaded, part, path)
        metadata = _said_in(loaded)
    elif len(data) > 8 and data[8:9] == b"{":
        found, metadata = _load_safetensors(data, path)
        name = metadata.get("part")
        if part is not None and name is not None and part != name:
            raise UsageError(f"{path}: holds the {name[:40]}, asked for was the {part}")
    else:
        raise RefusedError(
            f"{path}: neither safetensors nor a file of torch.save since torch 1.6, and nothing else is read. If you "
            "trust it, load it with the program that it belongs to, and save its state_dict() with safetensors"
        )
    tensors = _checked(found, len(data), path)
    return WeightFile(
        path=path,
        digest=digest,
        part=name,
        is_hub=is_hub(tensors),
        model=split_model(tensors),
        metadata=metadata,
    )


def _said_in(loaded: Mapping[Any, Any]) -> dict[str, str]:
    """The architecture that an export of ours says, as in a safetensors file; nothing of what is not plain."""
    facts = loaded.get(FACTS)
    said = facts.get(ARCHITECTURE) if isinstance(facts, Mapping) else None
    if not isinstance(said, Mapping) or not all(
        isinstance(name, str) and type(value) in (int, float) and abs(value) < _MOST for name, value in said.items()
    ):
        return {}
    return {ARCHITECTURE: json.dumps(dict(said), sort_keys=True)}


def _load_safetensors(data: bytes, path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
    except Exception as problem:
        raise DamagedFileError(f"{path}: not safetensors ({_short(problem)})") from problem
    num = int.from_bytes(data[:8], "little")  # the library has checked that the header is there, and its size
    assert num <= _MAX_HEADER_BYTES
    header = parse_json(data[8 : 8 + num], str(path), max_depth=8)
    return tensors, dict(header.get("__metadata__") or {})


class _Ignored:
    """Stands for a value of the training that wrote a file, and that nothing here reads: its arguments, numpy scalars.

    Official checkpoints hold both. So their classes are never called.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_IGNORED = (
    "argparse.Namespace", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "numpy.dtypes.Float64DType", "numpy.dtypes.Float32DType", "numpy.dtypes.Int64DType",
)  # fmt: skip


def _load_torch(data: bytes, path: Path) -> Any:
    """What `torch.save` wrote. The archive must be as large as what is in it: a packed one could unfold to anything."""
    import torch

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as problem:
        raise DamagedFileError(f"{path}: not a whole file of torch.save ({_short(problem)})") from problem
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > len(data)
    ):
        raise RefusedError(f"{path}: its content is compressed, which torch.save never does")
    with torch.serialization.safe_globals([(_Ignored, name) for name in _IGNORED]):
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as problem:
            named = _unsafe_names(data)
            if not named:
                raise DamagedFileError(f"{path}: torch cannot read it ({_short(problem)})") from problem
            more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
            raise RefusedError(
                f"{path}: its pickle names {', '.join(named[:_MOST_NAMED])}{more}, which unpickling would call; only "
                "tensors are read. If you trust it, save its tensors alone, with safetensors"
            ) from problem


def _unsafe_names(data: bytes) -> list[str]:
    """What a pickle names that is not allowed; none where it is damaged in some other way."""
    import torch

    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # noqa: BLE001 (the caller tells of the damage, and raises)
        return []
    return sorted(name[:80] for name in named)


def _choose(loaded: Any, part: str | None, path: Path) -> tuple[str | None, Any]:
    """The model in what a training program saved, and the key that it is under."""
    if not isinstance(loaded, Mapping):
        raise RefusedError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    there = [name for name in WRAPPERS if isinstance(loaded.get(name), Mapping)]
    wanted = part if part is not None and there else next(iter(there), None)
    if wanted is None:
        return None, loaded
    if wanted not in there:
        raise UsageError(f"{path}: holds no {wanted}; it holds {', '.join(there)}")
    return wanted, loaded[wanted]


def _checked(found: Mapping[Any, Any], num_bytes: int, path: Path) -> dict[str, Tensor]:
    """Its tensors; raises DamagedFileError for one that is not plainly there, such as a view larger than the file."""
    import torch

    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise RefusedError(f"{path}: holds no tensors; expected those of a vision transformer by name")
    for name, tensor in tensors.items():
        whole = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
        plain = whole and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain or tensor.numel() * tensor.element_size() > num_bytes:
            raise DamagedFileError(f"{path}: {str(name)[:80]!r} is not a plain tensor of this file")
    return {str(name): tensor.detach() for name, tensor in tensors.items()}


def _short(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return (text if len(text) <= 160 else text[:160] + "...") or type(problem).__name__
