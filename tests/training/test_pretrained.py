"""`rlstab import-hf` and `export-hf`, and runs that begin from what they made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from tokenizers import Tokenizer, models

from rlstab_jax.cli import main
from rlstab_jax.models import ModelConfig
from rlstab_jax.models.hf_config import write_model_config
from rlstab_jax.models.huggingface import export_model
from rlstab_jax.tasks.hf_tokenizer import HFTokenizer
from rlstab_jax.training import cold_start as cold_start_module
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.cold_start import cold_start
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import Engines, beginning, build
from rlstab_jax.training.pretrained import keep_card, load_parameters, model_config
from rlstab_jax.types import UserError
from tests.training.tiny_run import config as tiny_run

CONFIG = "tests/training/tiny_run.py"


@pytest.fixture(scope="module")
def run() -> RunConfig:
    config = tiny_run()
    return replace(config, model=build(config).config.model)


@pytest.fixture(scope="module")
def source(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of the tiny run's sizes, with a tokeniser of a few words."""
    directory = tmp_path_factory.mktemp("source")
    export_model(run.model, tiny.parameters(run.model), directory, "bfloat16", shard_bytes=5_000)
    config = write_model_config(run.model, "bfloat16") | {"eos_token_id": 1, "max_position_embeddings": 99}
    (directory / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "b": 2}, unk_token="a"))
    words.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    (directory / "notes.txt").write_text("stays where it is")
    return directory


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imports") / "model"
    assert main(["import-hf", str(source), str(out)]) == 0
    return out


def read(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )


def with_initial(run: RunConfig, initial: Path, **changes: object) -> Engines:
    return build(replace(run, initial=str(initial), **changes))


def test_import_then_export(
    source: Path, imported: Path, run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replace(model_config(imported), mlp_dim=run.model.mlp_dim) == run.model  # no layer has that width
    assert json.loads((imported / "model.json").read_text())["source"]["from"] == str(source)
    assert not (imported / "notes.txt").exists()
    assert HFTokenizer(imported).chat([{"content": "a b"}]) == "a b"
    assert main(["export-hf", str(imported), str(tmp_path / "out"), "--shard-bytes", "9000"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert same_bits(read(source), read(tmp_path / "out"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((source / name).read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert main(["export-hf", str(imported), str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    assert {values.dtype for values in read(tmp_path / "wide").values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_kept_in_bfloat16_begins_the_same_run(source: Path, imported: Path, run: RunConfig, tmp_path: Path) -> None:
    assert main(["import-hf", str(source), str(tmp_path / "narrow"), "--dtype", "bfloat16"]) == 0
    of = with_initial(run, tmp_path / "narrow")
    template = of.placed_like(lambda: tiny.parameters(run.model))
    kept = load_parameters(tmp_path / "narrow", template, cast=False)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(ml_dtypes.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, beginning(of, 0), beginning(with_initial(run, imported), 0))


def test_a_run_begins_from_imported_parameters(imported: Path, run: RunConfig, tmp_path: Path) -> None:
    said: list[str] = []
    started = cold_start(with_initial(run, imported), tmp_path, said.append)
    assert started is not None
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tiny.parameters(run.model))
    jax.tree.map(np.testing.assert_array_equal, started.params, expected)
    assert said == [f"beginning from the parameters in {imported}"]
    long = with_initial(run, imported, rollout=replace(run.rollout, response_length=100))
    beginning(long, 0, said.append)
    assert said[-1].endswith("tokens, but the model was made for 99 (max_position_embeddings)")
    unnamed = with_initial(run, imported, model=replace(run.model, vocab_size=0, mlp_dim=7))
    assert unnamed.config.model.vocab_size == run.model.vocab_size  # no layer is dense, so that width is nobody's


def test_cold_starts_of_other_beginnings_are_kept_apart(run: RunConfig) -> None:
    of = build(run)
    names = {cold_start_module._fingerprint(of, initial) for initial in (None, {"embedding": 1}, {"embedding": 2})}
    assert len(names) == 3


def test_train_and_export(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The user's way: import, train, export. The export holds the trained parameters and the source's tokeniser."""
    out = tmp_path / "run"
    arguments = ["--initial", str(imported), "--steps", "2", "--evaluation.every", "0", "--out", str(out)]
    assert main(["train", CONFIG, *arguments]) == 0
    assert f"beginning from the parameters in {imported}" in capsys.readouterr().out
    assert main(["export-hf", str(out), str(tmp_path / "trained"), "--newest"]) == 0
    trained = read(tmp_path / "trained")
    template = build(tiny_run()).placed_like(lambda: tiny.parameters(model_config(out)))
    _, params = load_parameters(out, template)
    np.testing.assert_array_equal(trained["model.embed_tokens.weight"], params["embedding"])
    before = load_parameters(imported, template)[1]["embedding"]
    assert 0 < np.abs(params["embedding"] - before).max() < 0.1
    assert HFTokenizer(tmp_path / "trained").stop_ids == (1,)
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["max_position_embeddings"] == 99
    # What was exported can be imported again, and a run can begin from a run.
    assert main(["import-hf", str(tmp_path / "trained"), str(tmp_path / "again")]) == 0
    jax.tree.map(np.testing.assert_array_equal, load_parameters(tmp_path / "again", template)[1], params)
    jax.tree.map(np.testing.assert_array_equal, beginning(with_initial(tiny_run(), out), 0), params)
    arguments[1] = str(out)
    assert main(["train", CONFIG, *arguments, "--fresh"]) == 2  # which would move aside what it begins from
    assert "run is --out itself: give the run that begins from there another --out" in capsys.readouterr().err
    assert out.exists()


def test_the_tokeniser_that_a_run_trained_with_is_exported(imported: Path, tmp_path: Path) -> None:
    """Not that of the parameters which it began from; with what stopped its responses."""
    other = tmp_path / "other"
    other.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "b": 2, "!": 3}, unk_token="a")).save(str(other / "tokenizer.json"))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    for name, initial in (("imported", str(imported)), ("random", "")):
        keep_card(tmp_path / name, initial, HFTokenizer(other, ["!"]))
        kept = HFTokenizer(tmp_path / name / "initial")
        assert kept.stop_ids == (3, 1)
        assert kept.vocab_size == 4
        assert (tmp_path / name / "initial" / "model.json").exists() == bool(initial)
    # What an attempt with another beginning left is replaced, until the run has begun.
    keep_card(tmp_path / "imported", "", HFTokenizer(other))
    assert HFTokenizer(tmp_path / "imported" / "initial").stop_ids == (1,)
    assert not (tmp_path / "imported" / "initial" / "model.json").exists()
    (tmp_path / "imported" / "metrics.jsonl").touch()
    keep_card(tmp_path / "imported", str(imported), HFTokenizer(other))
    assert not (tmp_path / "imported" / "initial" / "model.json").exists()


def test_parameters_of_another_model(imported: Path, run: RunConfig) -> None:
    other = replace(run.model, num_layers=3, rope_theta=1e6)
    with pytest.raises(UserError) as raised:
        with_initial(run, imported, model=other)
    assert str(raised.value).splitlines() == [
        f"model.num_layers = 3, but the parameters in {imported} have 2",
        f"model.rope_theta = 1000000.0, but the parameters in {imported} have 10000.0",
    ]
    for other, found in (("checkpoints", r"it has no model\.json"), ("nowhere", "there is no such directory")):
        with pytest.raises(UserError, match=f"{found}; give one that `rlstab import-hf` wrote, or a run's"):
            with_initial(run, imported / other)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses."""
    assert main([*map(str, arguments)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_what_import_refuses(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(source, copy)
    assert "is there already" in refused(capsys, "import-hf", copy, source)
    assert "and could not be fetched from the hub" in refused(capsys, "import-hf", "nobody/nothing", out)
    assert "is no directory, and no id on the hub" in refused(capsys, "import-hf", tmp_path / "absent", out)
    tokens = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokens.replace('"b":2', '"b":5000').replace('"b": 2', '"b": 5000'))
    assert "tokenizer.json has ids up to 5000, but vocab_size" in refused(capsys, "import-hf", copy, out)
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json is not there: add it, or import with --no-tok" in refused(capsys, "import-hf", copy, out)
    shard = sorted(copy.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard}: tensor" in refused(capsys, "import-hf", copy, out, "--no-tokenizer")
    (copy / "config.json").unlink()
    assert "config.json cannot be read" in refused(capsys, "import-hf", copy, out, "--no-tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_from_the_hub_the_config_is_judged_first(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, list[str]]] = []
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)

    def fetch(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert main(["import-hf", "some/model", str(tmp_path / "out"), "--revision", "v1"]) == 0
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    assert card["source"] == {"from": "some/model", "revision": "v1", "dtype": "bfloat16"}
    assert asked[0] == ("some/model", "v1", ["config.json"])
    assert {"model*.safetensors", "model.safetensors.index.json", "tokenizer.json"} <= set(asked[1][2])
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"clip_qkv": 8}))
    line = refused(capsys, "import-hf", "some/model", tmp_path / "other")
    assert "some/model/config.json: clip_qkv = 8 is not supported" in line
    assert len(asked) == 3


def test_what_export_refuses(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is there already" in refused(capsys, "export-hf", imported, imported)
    line = refused(capsys, "export-hf", tmp_path, tmp_path / "out")
    assert "it has no model.json; give one that `rlstab import-hf` wrote" in line
    odd = ModelConfig(vocab_size=9, num_experts=0, qk_norm="none")
    manifest = {"config": {"model": {**vars(odd), "dense_layers": []}}, "resolved": {"vocab_size": 9}}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps(manifest))
    assert "so it cannot be exported" in refused(capsys, "export-hf", tmp_path / "odd", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_a_failed_export_leaves_nothing(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("rlstab_jax.models.safetensors_io._write_file", full)
    assert main(["export-hf", str(imported), str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_tokeniser(source: Path, run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "tokenizer.json").unlink()
    assert main(["import-hf", str(copy), str(tmp_path / "bare"), "--no-tokenizer"]) == 0
    assert main(["export-hf", str(tmp_path / "bare"), str(tmp_path / "out")]) == 0
    assert "without a tokeniser, since" in capsys.readouterr().out
    assert same_bits(read(source), read(tmp_path / "out"))


def test_the_newest_checkpoint_or_the_best(run: RunConfig, tmp_path: Path) -> None:
    params = jax.tree.map(jnp.asarray, tiny.parameters(run.model))
    with Checkpoints(tmp_path) as checkpoints:
        for step, metric in ((1, 0.9), (2, 0.1)):
            checkpoints.save(step, {"params": jax.tree.map(lambda x, s=step: x + s, params)}, {}, metric)
    best, _ = load_parameters(tmp_path, params)
    newest, found = load_parameters(tmp_path, params, best=False)
    assert (best, newest) == (1, 2)
    np.testing.assert_array_equal(found["embedding"], params["embedding"] + 2)
