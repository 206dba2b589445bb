"""Run by test_huggingface.py with 4 virtual devices: equal parameters on several meshes, and the host's memory."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from rlstab_jax.models import ModelConfig
from rlstab_jax.models.hf_config import write_model_config
from rlstab_jax.models.huggingface import export_model, import_model, leaf_of, parameter_shapes, slots
from rlstab_jax.models.safetensors_io import Source, read_checkpoint, write_checkpoint
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import TRAINING, shardings
from rlstab_jax.types import UserError

MIB = 2**20
CONFIG = replace(tiny.MIXED, vocab_size=18)


def check_equal(mesh_config: MeshConfig, directory: Path, params: dict) -> None:
    """An import onto a mesh has the exported values, placed by the table; exported again, they make equal files."""
    mesh = make_mesh(mesh_config)
    _, placed, _ = import_model(directory, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, placed)
    wanted = shardings(mesh, logical_axes(params), TRAINING)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), placed, wanted))
    again = directory.with_name(f"from_{'_'.join(map(str, mesh.shape.values()))}")
    again.mkdir()
    [file] = export_model(CONFIG, placed, again, "float32")
    assert file.read_bytes() == (directory / file.name).read_bytes()
    print("equal on", dict(mesh.shape))


def status(key: str) -> float:
    """Resident memory of this process now (VmRSS) or at its highest (VmHWM), in MiB."""
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))


def check_memory(folder: Path) -> None:
    """The largest tensor has 64 MiB, the largest stack 128, its shard 64: the host holds a few pieces of 8 besides."""
    config = ModelConfig(
        vocab_size=32768, num_layers=4, embed_dim=512, num_experts=32, expert_dim=512, tie_embeddings=True
    )
    shapes = parameter_shapes(config)
    sources = []
    for name, slot in slots(config).items():
        shape = slot.shape(leaf_of(shapes, slot.leaf).shape)
        sources.append(Source(name, np.dtype(np.float32), shape, lambda shape=shape: np.ones(shape, np.float32)))
    folder.mkdir()
    write_checkpoint(folder, sources, 10**10)
    (folder / "config.json").write_text(json.dumps(write_model_config(config, "float32")))
    mesh = make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])
    import_model(folder, mesh)  # compiling costs memory too, once
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    _, params, _ = import_model(folder, mesh)
    beyond = status("VmHWM") - before
    shards = [shard.data.nbytes / MIB for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    beyond -= sum(shards)
    largest = max(tensor.size for tensor in read_checkpoint(folder).values()) / MIB
    assert sum(shards) > 512
    assert largest == max(shards) == 64
    assert -64 < beyond < 64, beyond
    print(f"memory beyond the parameters: {beyond:.0f} MiB")


with tempfile.TemporaryDirectory() as scratch:
    exported = Path(scratch) / "exported"
    exported.mkdir()
    parameters = tiny.parameters(CONFIG)
    export_model(CONFIG, parameters, exported, "float32")
    (exported / "config.json").write_text(json.dumps(write_model_config(CONFIG, "float32")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlstab_jax.models.huggingface.PIECE", 500)  # nearly all are put together on the devices
        check_equal(MeshConfig(data=1, fsdp=2, tensor=2), exported, parameters)
    check_equal(MeshConfig(data=2, expert=2), exported, parameters)
    with pytest.raises(UserError, match=r"size 18.* is not divisible by the mesh axis tensor of 4 devices"):
        import_model(exported, make_mesh(MeshConfig(tensor=4)))
    if Path("/proc/self/clear_refs").exists():
        check_memory(Path(scratch) / "large")
    else:
        print("memory is not measured here")
