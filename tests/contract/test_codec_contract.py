"""What every way of storing must do, whatever the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import COMPANIONS, KINDS, Kind, Named, bits, flip, open_manager, pack_of, quick_files, request

from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.storage import CODECS, Storage
from dino_exp.errors import CorruptCheckpointError

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def of_bits(dtype: str, shape: tuple[int, ...], seed: int, special: bool) -> torch.Tensor:
    """Any bits, or numbers as in a training; with `special` NaN payloads, both zeros, denormals and infinities."""
    rng, num = np.random.default_rng(seed), int(np.prod(shape))
    item = DTYPES[dtype].item_bytes
    if dtype == "bool":
        data = rng.integers(0, 2, num, dtype=np.uint8)
    elif special or dtype != "float32":
        data = rng.integers(0, 256, num * item, dtype=np.uint8)
    else:
        data = rng.normal(0, 0.02, num).astype("<f4").view(np.uint8)
    if special and dtype == "float32" and num >= 8:
        odd = [0x7FC00001, 0xFF800001, 0x80000000, 0, 1, 0x807FFFFF, 0x7F800000, 0xFF800000]
        data.view("<u4")[:8] = odd
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    tensor.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(data.view(np.uint8)))
    return tensor


@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    special=st.booleans(),
    change=st.sampled_from(["none", "small", "other"]),
)
@QUICK
def test_every_bit_comes_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: tuple[int, ...], seed: int, special: bool, change: str
) -> None:
    """Two checkpoints of a tensor and its companion, so that there is something to build on; all digests agree."""
    first = of_bits(dtype, shape, seed, special)
    near = first if change == "none" else of_bits(dtype, shape, seed + 1, special)
    if change == "small" and dtype in ("float32", "float64"):
        near = first * (1 + 1e-3)
    states = [{"student.w": first, "teacher.w": near}, {"student.w": near, "teacher.w": first}]
    digests = set()
    for codec in CODECS:
        folder = tmp_path_factory.mktemp("codec") / "c"
        manager = open_manager(
            folder, storage=Storage(codec=codec, companions=COMPANIONS), files=quick_files(), require_finite=False
        )
        for step, state in enumerate(states, start=1):
            manager.save(Named(state), request(step))
        reader = CheckpointReader(folder)
        for step, state in enumerate(states, start=1):
            loaded = reader.load_tensors(step)
            assert {name: bits(tensor) for name, tensor in loaded.items()} == {
                name: bits(tensor) for name, tensor in state.items()
            }
            assert all((loaded[name].dtype, loaded[name].shape) == (state[name].dtype, shape) for name in state)
        assert reader.verify()["ok"]
        digests.add(reader.rows()[-1]["state_digest"])
    assert len(digests) == 1


@every_kind
def test_strided_shared_and_gradient_tensors(kind: Kind, tmp_path: Path) -> None:
    base = torch.randn(40, 60)
    state = {
        "student.t": base.t(),
        "teacher.t": base.t().clone(),
        "student.strided": base[::2, 1::3],
        "expanded": torch.ones(1).expand(500),
        "parameter": torch.nn.Parameter(base.clone()),
        "shared": base,
        "view of it": base[1:],
        "scalar": torch.tensor(3.5),
    }
    manager = open_manager(tmp_path, storage=kind.storage)
    for step in (1, 2):
        manager.save(Named(state), request(step))
    loaded = CheckpointReader(tmp_path).load_tensors(2)
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {
        name: bits(tensor.detach()) for name, tensor in state.items()
    }


@every_kind
def test_a_changed_bit_anywhere_in_a_tensor_is_noticed(kind: Kind, tmp_path: Path) -> None:
    kind.save_steps(tmp_path, [1, 2])
    path = pack_of(tmp_path, 2)
    whole = path.read_bytes()
    chunks = [chunk for entry in CheckpointReader(tmp_path).manifest(2).tensors.values() for chunk in entry.chunks]
    own = [chunk for chunk in chunks if chunk.pack == path.name and chunk.stored_bytes]
    assert len(own) >= 3
    for chunk in own:
        for place in (0, chunk.stored_bytes // 2, chunk.stored_bytes - 1):
            flip(path, chunk.start + place)
            with pytest.raises(CorruptCheckpointError):
                CheckpointReader(tmp_path).load_tensors(2)
            path.write_bytes(whole)


@every_kind
def test_blocks_of_a_large_tensor_encoded_by_threads_are_the_same_bytes(kind: Kind, tmp_path: Path) -> None:
    """Several blocks, the last one short."""
    large = torch.randn(700_001, generator=torch.Generator().manual_seed(2))
    packs = []
    for threads in (0, 3):
        folder = tmp_path / str(threads)
        storage = Storage(codec=kind.storage.codec, companions=COMPANIONS, threads=threads)
        manager = open_manager(folder, storage=storage)
        for step in (1, 2):
            state = {"student.w": large * step, "teacher.w": large + step * 1e-3, "v": (large * large) * (0.99**step)}
            manager.save(Named(state), request(step))
            loaded = CheckpointReader(folder).load_tensors(step)
            assert all(bits(loaded[name]) == bits(tensor) for name, tensor in state.items())
        packs.append([path.read_bytes() for path in sorted((folder / "packs").iterdir())])
    assert packs[0] == packs[1]
