"""Safetensors in and out: where each tensor lies, bit for bit, on any mesh, and bad files by name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from rlstab_jax.models import ModelConfig
from rlstab_jax.models.hf_config import write_model_config
from rlstab_jax.models.huggingface import export_model, import_model, parameter_shapes, slots
from rlstab_jax.models.safetensors_io import INDEX, SINGLE, Source, read_checkpoint, write_checkpoint
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.types import UserError
from tests.xla import virtual

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
CONFIG = tiny.MIXED
Tensors = dict[str, np.ndarray]


def write(directory: Path, tensors: Tensors, config: ModelConfig = CONFIG, shard_bytes: int = 10**9) -> Path:
    """A checkpoint with these tensors."""
    directory.mkdir(exist_ok=True)
    sources = [Source(name, x.dtype, x.shape, lambda x=x: x) for name, x in tensors.items()]
    write_checkpoint(directory, sources, shard_bytes)
    (directory / "config.json").write_text(json.dumps(write_model_config(config, "float32")))
    return directory


def draw(dtype: type = np.float32) -> Tensors:
    """Tensors by the names and shapes of a Qwen3-MoE checkpoint, written down by hand."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (17, 32), "model.norm.weight": (32,)}
    for layer in range(4):
        of = f"model.layers.{layer}"
        shapes[f"{of}.input_layernorm.weight"] = shapes[f"{of}.post_attention_layernorm.weight"] = (32,)
        shapes[f"{of}.self_attn.q_norm.weight"] = shapes[f"{of}.self_attn.k_norm.weight"] = (8,)
        shapes[f"{of}.self_attn.q_proj.weight"], shapes[f"{of}.self_attn.o_proj.weight"] = (32, 32), (32, 32)
        shapes[f"{of}.self_attn.k_proj.weight"] = shapes[f"{of}.self_attn.v_proj.weight"] = (16, 32)
        mlp = [(f"{of}.mlp", 40)] if layer % 2 else [(f"{of}.mlp.experts.{e}", 16) for e in range(8)]
        for name, width in mlp:
            shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, 32)
            shapes[f"{name}.down_proj.weight"] = (32, width)
        if not layer % 2:
            shapes[f"{of}.mlp.gate.weight"] = (8, 32)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def test_where_each_tensor_lies(tmp_path: Path) -> None:
    tensors = draw()
    config, params, dtype = import_model(write(tmp_path, tensors), MESH)
    assert (config, dtype) == (CONFIG, "float32")
    block = params["segment_0"]["block_0"]
    equal = np.testing.assert_array_equal
    equal(params["embedding"], tensors["model.embed_tokens.weight"])
    equal(params["final_norm"]["gain"], tensors["model.norm.weight"])
    equal(block["moe"]["gate"][1, 3], tensors["model.layers.2.mlp.experts.3.gate_proj.weight"].T)
    equal(block["moe"]["up"][0, 7], tensors["model.layers.0.mlp.experts.7.up_proj.weight"].T)
    equal(block["moe"]["down"][1, 0], tensors["model.layers.2.mlp.experts.0.down_proj.weight"].T)
    equal(block["moe"]["router"]["kernel"][1], tensors["model.layers.2.mlp.gate.weight"].T)
    equal(block["attention_norm"]["gain"][1], tensors["model.layers.2.input_layernorm.weight"])
    block = params["segment_0"]["block_1"]
    equal(block["mlp"]["down"]["kernel"][1], tensors["model.layers.3.mlp.down_proj.weight"].T)
    equal(block["mlp"]["up"]["kernel"][0], tensors["model.layers.1.mlp.up_proj.weight"].T)
    equal(block["mlp_norm"]["gain"][0], tensors["model.layers.1.post_attention_layernorm.weight"])
    for name in "qkvo":
        equal(block["attention"][name]["kernel"][1], tensors[f"model.layers.3.self_attn.{name}_proj.weight"].T)
    equal(block["attention"]["k_norm"]["gain"][0], tensors["model.layers.1.self_attn.k_norm.weight"])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(x.size for x in tensors.values())


@pytest.mark.parametrize("pieces", [300, 2**25])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_import_then_export_is_bit_identical(
    tmp_path: Path, dtype: type, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put together on the host, or a few rows at a time on the device. The format's own library agrees on the bits."""
    monkeypatch.setattr("rlstab_jax.models.huggingface.PIECE", pieces)
    tensors = draw(dtype)
    tensors["model.norm.weight"][:3] = [-0.0, np.inf, jnp.finfo(dtype).smallest_subnormal]
    config, params, kept = import_model(write(tmp_path / "in", tensors, shard_bytes=30_000), MESH)
    assert kept == np.dtype(dtype).name
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    (tmp_path / "out").mkdir()
    *files, index = export_model(config, params, tmp_path / "out", kept, shard_bytes=20_000)
    assert all(file.stat().st_size < 24_000 for file in files)
    found: Tensors = {}
    for file in files:
        found |= safetensors.numpy.load_file(file)
    assert found.keys() == tensors.keys() == json.loads(index.read_text())["weight_map"].keys()
    for name, values in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].tobytes() == values.tobytes(), name


def test_kept_in_bfloat16(tmp_path: Path) -> None:
    tensors = draw()
    _, params, _ = import_model(write(tmp_path, tensors), MESH, dtype="bfloat16")
    expected = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["embedding"], expected)


def test_a_file_of_the_formats_own_library(tmp_path: Path) -> None:
    tensors = draw(ml_dtypes.bfloat16)
    write(tmp_path, tensors)
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    _, params, dtype = import_model(tmp_path, MESH)
    assert dtype == "bfloat16"
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"].astype(np.float32))


def test_names_cover_the_parameters_of_every_architecture() -> None:
    """Each entry of each stack is named once: the sizes of the tensors add up to those of the parameters."""
    base = {"vocab_size": 9, "num_layers": 3, "num_experts": 4}
    for changes in ({}, {"qk_norm": "none"}, {"qk_norm": "projection"}, {"num_experts": 0}, {"dense_layers": (0,)}):
        config = ModelConfig(**(base | changes))
        shapes, sizes = parameter_shapes(config), []
        for slot in slots(config).values():
            leaf = shapes
            for key in slot.leaf:
                leaf = leaf[key]
            assert all(i < n for i, n in zip(slot.index, leaf.shape, strict=False))
            sizes.append(np.prod(slot.shape(leaf.shape)))
        assert sum(sizes) == sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        assert len({(slot.leaf, slot.index) for slot in slots(config).values()}) == len(sizes)


def test_a_tied_head_that_was_saved_all_the_same(tmp_path: Path) -> None:
    tensors = draw()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    _, params, _ = import_model(write(tmp_path, tensors), MESH)
    assert "lm_head" not in params
    tensors["lm_head.weight"][3, 3] += 1
    with pytest.raises(UserError, match=r"model\.safetensors: tensor lm_head\.weight differs from model\.embed_tokens"):
        import_model(write(tmp_path, tensors), MESH)


def renamed(tensors: Tensors, name: str, to: str) -> None:
    tensors[to] = tensors.pop(name)


def stack(tensors: Tensors, layer: int, width: int) -> None:
    of = f"model.layers.{layer}.mlp.experts"
    for name in [name for name in tensors if name.startswith(of)]:
        del tensors[name]
    tensors[f"{of}.gate_up_proj"] = np.zeros((8, width, 32), np.float32)
    tensors[f"{of}.down_proj"] = np.zeros((8, 32, 16), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"), r"experts\.5\.up_proj\.weight is missing:"),
        (lambda t: [t.pop(name) for name in list(t) if ".3." in name], r"layers\.0\S+ is missing \(and \d+ more\)"),
        (lambda t: t.update({"model.shared.weight": np.zeros(3, np.float32)}), r"model\.shared\.weight has no place"),
        (
            lambda t: renamed(t, "model.norm.weight", "norm.weight"),
            r"tensor model\.norm\.weight is missing: config\.json asks for it",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((40, 31), np.float32)}),
            r"model\.safetensors: tensor \S+\.1\.mlp\.up_proj\.weight has the shape \[40, 31\], .* \[40, 32\]",
        ),
        (lambda t: stack(t, 2, 31), r"2\.mlp\.experts\.gate_up_proj has the shape \[8, 31, 32\], .* \[8, 32, 32\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    tensors = draw()
    change(tensors)
    with pytest.raises(UserError, match=message) as raised:
        import_model(write(tmp_path, tensors), MESH)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_damaged(tmp_path: Path) -> None:
    file = write(tmp_path, draw()) / SINGLE
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")

    def with_header(**changes: object) -> bytes:
        header = json.loads(whole[8 : 8 + length])
        header["model.norm.weight"] |= changes
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    for damaged, message in (
        (whole[:-1], r"tensor \S+ ends at byte \d+, but the file at \d+: it is truncated"),
        (whole[: length // 2], "is no safetensors file, or truncated in its header"),
        (b"", "is no safetensors file"),
        (b"\xff" * 64, "is no safetensors file"),
        (whole[:8] + b"[" + whole[9:], "its header is no JSON"),
        (with_header(dtype="F8_E4M3"), r"model\.norm\.weight has the dtype F8_E4M3, expected one of F32, F16, BF16"),
        (with_header(shape=[31]), r"model\.norm\.weight of F32\[31\] has 128 bytes, expected 124"),
        (with_header(shape=[-32]), r"model\.norm\.weight has a malformed entry"),
        (with_header(data_offsets=None), r"model\.norm\.weight has a malformed entry"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=message) as raised:
            read_checkpoint(tmp_path)
        assert str(file) in str(raised.value)
    file.unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json is there"):
        read_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    tensor = read_checkpoint(write(tmp_path, draw()))["model.norm.weight"]
    os.truncate(tensor.file, tensor.start + 100)
    with pytest.raises(UserError, match=r"the file ends within model\.norm\.weight"):
        tensor.read()


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, draw(), shard_bytes=30_000)
    index = json.loads((tmp_path / INDEX).read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    for weight_map, message in (
        (index["weight_map"] | {"x": "model-00000.safetensors"}, r"model-00000\.safetensors, .* is not there"),
        (index["weight_map"] | {"x": "../model.safetensors"}, r"\.\./model\.safetensors, .* is not there"),
        (index["weight_map"] | {"extra": first}, "tensor extra is not in it, but in the index"),
        (index["weight_map"] | {"model.embed_tokens.weight": last}, r"embed_tokens\.weight is in it, but not so"),
        (["model.norm.weight"], "expected the names of files by tensor under weight_map"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path)


def test_on_meshes_and_in_little_memory() -> None:
    """In a process of its own, with 4 virtual devices: the number of devices is fixed when JAX starts."""
    root = Path(__file__).parents[2]
    environment = os.environ | virtual(4) | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed goes back at once, and is not counted
    script = Path(__file__).with_name("import_on_meshes.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal on") == 2
    assert "memory beyond" in done.stdout or not Path("/proc/self/clear_refs").exists()
