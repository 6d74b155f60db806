from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from support.checkpoints import Named, bits, open_manager, request

from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.fsio import Files

SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3, 4)]


def of_bytes(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    """A tensor of given bits, repeated as often as needed; booleans stay 0 or 1."""
    tensor = torch.empty(shape, dtype=dtype)
    view = tensor.reshape(-1).view(torch.uint8)
    view.copy_(
        torch.frombuffer(bytearray((data * (len(view) // len(data) + 1))[: len(view)] or b"\0"), dtype=torch.uint8)[
            : len(view)
        ]
    )
    return (
        tensor if dtype is not torch.bool else tensor.reshape(-1).view(torch.uint8).remainder(2).bool().reshape(shape)
    )


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    open_manager(folder).save(Named(tensors), request(1))
    return next((folder / "packs").iterdir())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {name: of_bytes(getattr(torch, name), shape, bytes(range(1, 250, 7))) for name in DTYPES}
    path = save(tmp_path, tensors)
    state = Named({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    open_manager(tmp_path).restore(state)
    loaded = CheckpointReader(tmp_path).load_tensors()
    others = load_file(path)
    for name, tensor in tensors.items():
        for found in (state.tensors[name], loaded[name], others[name]):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert bits(found) == bits(tensor)


def test_strided_shared_and_gradient_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(base.clone()),
        "shared": base,
        "view of it": base[1:],
        "conjugate-free": base.flip(0),
    }
    save(tmp_path, tensors)
    loaded = CheckpointReader(tmp_path).load_tensors()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@given(
    st.dictionaries(st.text(min_size=1, max_size=12), st.sampled_from(sorted(DTYPES)), min_size=1, max_size=6),
    st.binary(min_size=1, max_size=64),
    st.sampled_from(SHAPES),
)
@settings(max_examples=60, deadline=None)
def test_any_names_and_bits_are_plain_safetensors(
    tmp_path_factory: pytest.TempPathFactory, names: dict[str, str], data: bytes, shape: tuple[int, ...]
) -> None:
    """NaN payloads, signed zeros, denormals, infinities; names in any script."""
    tensors = {name: of_bytes(getattr(torch, dtype), shape, data) for name, dtype in names.items()}
    path = save(tmp_path_factory.mktemp("pack"), tensors)
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(tensors)
        assert all(bits(opened.get_tensor(name)) == bits(tensor) for name, tensor in tensors.items())


def test_data_is_aligned(tmp_path: Path) -> None:
    tensors = {f"{number}.{name}": torch.zeros(3, dtype=getattr(torch, name)) for number, name in enumerate(DTYPES)}
    save(tmp_path, tensors)
    entries = CheckpointReader(tmp_path).manifest().tensors.values()
    assert min(entry.chunks[0].start for entry in entries) % 64 == 0
    assert all(entry.chunks[0].start % DTYPES[entry.dtype].item_bytes == 0 for entry in entries)


def test_a_torn_pack_has_no_header(tmp_path: Path) -> None:
    """The length comes last, so that no other tool takes half a file for a whole one."""

    class TornError(Exception):
        pass

    class Tearing(Files):
        def create(self, path: Path) -> Any:
            handle = super().create(path)

            def tear(offset: int, data: Any) -> None:
                raise TornError

            handle.write_at = tear  # type: ignore[method-assign]
            return handle

        def unlink(self, path: Path) -> None:
            if path.exists():
                raise OSError
            super().unlink(path)

    with pytest.raises(TornError):
        open_manager(tmp_path, files=Tearing()).save(Named({"a": torch.ones(9)}), request(1))
    (path,) = (tmp_path / "packs").iterdir()
    assert path.read_bytes()[:8] == bytes(8)


def test_memory_of_a_restore_is_that_of_one_tensor(tmp_path: Path) -> None:
    """The state sees a mapping that reads on demand."""

    class Watching(Named):
        def load_state_dict(self, state: Any) -> None:
            one, two = state["a"], state["a"]
            assert one is not two
            assert len(state) == 3
            assert "b" in state
            assert sorted(state) == ["a", "b", "c"]

    state = Watching({name: torch.ones(4) for name in "abc"})
    save(tmp_path, state.tensors)
    open_manager(tmp_path).restore(state)
