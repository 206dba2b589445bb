"""Models that come from elsewhere: a Hugging Face checkpoint imported once, from which runs begin, and the way back.

An imported directory has the layout of a run where it matters: ``checkpoints/0`` holds the parameters, so that whatever
reads a run's checkpoint reads an imported one. Beside it lie ``model.json``, the card (sizes, where it came from, in
which dtype), and the files of the source that travel along unread: ``config.json`` and the tokeniser's. A run that
begins from an imported directory keeps the card and these files in ``initial/``.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from rlstab_jax.models import ModelConfig
from rlstab_jax.models.hf_config import read_json, read_model_config, write_model_config
from rlstab_jax.models.huggingface import SHARD_BYTES, DType, export_model, import_model, parameter_shapes
from rlstab_jax.models.safetensors_io import INDEX
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import TRAINING, check_divides, shardings
from rlstab_jax.rundir import begun, plain, read_manifest
from rlstab_jax.tasks import Tokenizer
from rlstab_jax.tasks.hf_tokenizer import HFTokenizer
from rlstab_jax.training.checkpoint import Checkpoints, parameters
from rlstab_jax.training.config import RunConfig
from rlstab_jax.types import UserError, one_line

CARD = "model.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
CARRIED = ("config.json", "generation_config.json", *TOKENIZER)
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """A Hugging Face checkpoint becomes a directory from which runs begin."""

    source: tyro.conf.Positional[str]
    """A local directory, or a hub id such as Qwen/Qwen3-30B-A3B-Base."""
    out: tyro.conf.Positional[Path]
    """The directory to write; it must not be there."""
    dtype: DType = "float32"
    """Of the parameters as they are kept; a run trains in float32 in any case."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: bool = True
    """--no-tokenizer permits a checkpoint without tokenizer.json."""
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)
    """How the devices that hold the parameters in between are split."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """A run or an imported directory becomes a Hugging Face checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """The directory of a run, or one that import-hf wrote."""
    out: tyro.conf.Positional[Path]
    """The directory to write; it must not be there."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the tensors; auto is the source's for an imported directory, float32 for a run."""
    newest: bool = False
    """A run's newest checkpoint, not its best."""
    shard_bytes: int = SHARD_BYTES
    """Largest file, in bytes; a larger tensor has one of its own."""
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)
    """How the devices that hold the parameters in between are split."""


def import_checkpoint(options: ImportOptions, say: Say = print, begin: Callable[[], None] = lambda: None) -> None:
    """Writes ``options.out``. Raises UserError, before anything is written, for whatever is wrong with the source."""
    _check_free(options.out)
    directory = _fetched(options.source, options.revision, say)
    config = read_json(directory / "config.json")
    sizes = read_model_config(config, directory / "config.json")
    if options.tokenizer:
        _check_tokenizer(directory, sizes)
    mesh = make_mesh(options.mesh)
    model, params, source_dtype = import_model(directory, mesh, dtype=options.dtype, begin=begin)
    source = {"from": options.source, "revision": options.revision, "dtype": source_dtype}
    card = {"model": model, "dtype": options.dtype, "source": source}
    with _aside(options.out) as aside:
        with Checkpoints(aside / "checkpoints", notify=say) as checkpoints:
            checkpoints.save(0, {"params": params}, {})
        (aside / CARD).write_text(json.dumps(plain(card), indent=2) + "\n")
        _carry(directory, aside)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f"{options.out}: {config['architectures'][0]}, {count:,} parameters, {source_dtype} kept as {options.dtype}")


def export_checkpoint(options: ExportOptions, say: Say = print, begin: Callable[[], None] = lambda: None) -> None:
    """Writes ``options.out``: config.json, safetensors and the tokeniser's files, which transformers loads.

    Raises UserError where there is no checkpoint, or none of a supported architecture.
    """
    _check_free(options.out)
    directory = options.checkpoint
    model = model_config(directory)
    imported = (directory / CARD).exists()
    origin = directory if imported else directory / "initial"
    dtype: Any = options.dtype
    if dtype == "auto":
        dtype = read_json(directory / CARD)["source"]["dtype"] if imported else "float32"
    base = read_json(origin / "config.json") if (origin / "config.json").exists() else None
    config = write_model_config(model, dtype, base)
    mesh = make_mesh(options.mesh)
    shapes = parameter_shapes(model)
    names = logical_axes(shapes)
    check_divides(mesh, shapes, names, TRAINING)
    template = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(mesh, names, TRAINING),
    )
    begin()
    step, params = load_parameters(directory, template, best=not options.newest, cast=False, say=say)
    with _aside(options.out) as aside:
        _carry(origin, aside)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        export_model(model, params, aside, dtype, options.shard_bytes)
    if not (options.out / "tokenizer.json").exists():
        say(f"{options.out}: without a tokeniser, since {directory} came with none")
    what = "the imported parameters" if imported else f"step {step}"
    say(f"{options.out}: {config['architectures'][0]}, {what} of {directory}, {dtype}")


def model_config(directory: Path) -> ModelConfig:
    """The sizes of the model in an imported directory, or of a run. Raises UserError where there is neither.

    A config file may use it: ``RunConfig(initial=path, model=model_config(Path(path)))``.
    """
    if (directory / CARD).exists():
        model = read_json(directory / CARD)["model"]
    elif (directory / "manifest.json").exists():
        manifest = read_manifest(directory)
        model = {**manifest["config"]["model"], "vocab_size": manifest["resolved"]["vocab_size"]}
    else:
        found = f"it has no {CARD}" if directory.is_dir() else "there is no such directory"
        raise UserError(f"{directory}: {found}; give one that `rlstab import-hf` wrote, or a run's")
    sizes: Any = {**model, "dense_layers": tuple(model.get("dense_layers", ()))}
    try:
        return ModelConfig(**sizes)
    except TypeError as error:
        raise UserError(f"{directory}: its model is of another version of this program ({error})") from error


def longest(directory: Path) -> float:
    """Tokens that the imported model in ``directory``, or what a run there began from, was made for; else inf."""
    files = (directory / "config.json", directory / "initial" / "config.json")
    found = next((read_json(file) for file in files if file.exists()), {})
    return found.get("max_position_embeddings") or math.inf


def matched(model: ModelConfig, initial: Path) -> ModelConfig:
    """``model`` with the vocabulary of the parameters in ``initial`` where its own is 0.

    Raises UserError, with a line for each field in which they differ; a width that no layer has is not compared.
    """
    there = model_config(initial)
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=there.vocab_size)
    unused = {"mlp_dim"} if all(there.kinds) else set()
    if not there.num_experts:
        unused |= {"experts_per_token", "expert_dim", "renormalise_gates", "dense_layers"}
    lines = [
        f"model.{field.name} = {getattr(model, field.name)!r}, but the parameters in {initial} have "
        f"{getattr(there, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in unused and getattr(model, field.name) != getattr(there, field.name)
    ]
    if lines:
        raise UserError("\n".join(lines))
    return model


def without_initial(config: RunConfig, run: Path) -> RunConfig:
    """The config of what is done with a run's own parameters: those that it began from need not be there any more, and
    no devices are set aside for batches."""
    together = dataclasses.replace(config.rollout, devices=0, mesh=MeshConfig())
    config = dataclasses.replace(config, rollout=together)
    if not config.initial or not (run / "manifest.json").exists():
        return config
    return dataclasses.replace(config, model=matched(config.model, run), initial="")


def load_parameters(
    directory: Path, template: Any, *, best: bool = True, cast: bool = True, say: Say = print
) -> tuple[int, dict]:
    """The parameters of a run, of an imported directory or of a cold start, with the step of the checkpoint.

    Args:
      directory: of any of these, or the ``checkpoints`` in it. Nothing is changed there.
      template: shapes, dtypes and places of the parameters.
      best: a run's best checkpoint, or else its newest.
      cast: into the template's dtypes; if not, the result has those in which an imported directory keeps it.

    Raises:
      UserError: there is none, or one of another model.
    """
    path = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    if not path.is_dir() or not any(child.name.isdecimal() for child in path.iterdir()):
        raise UserError(
            f"{directory} holds no checkpoint: give the directory of a run, its checkpoints, one that import-hf wrote, "
            "or a cold start's (runs/cold_start/...)"
        )
    if (path.parent / "manifest.json").exists():
        step, train = parameters(path, {"params": template}, field="train", best=best, notify=say)
        return step, train["params"]
    if not (path.parent / CARD).exists():
        return parameters(path, template, best=best, notify=say)
    kept = jnp.dtype(read_json(path.parent / CARD)["dtype"])
    stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kept, sharding=leaf.sharding), template)
    step, params = parameters(path, stored, notify=say)
    return step, jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), params, template) if cast else params


def keep_card(run: Path, initial: str, tokenizer: Tokenizer) -> None:
    """Leaves in ``run / "initial"`` what must travel along with a run's parameters: the card and the files of those
    that it began from, if any, and the tokeniser that it trains with, if that comes from files.

    A run that has not begun may have been tried with others: what is there then is replaced.
    """
    target = run / "initial"
    if not begun(run):
        shutil.rmtree(target, ignore_errors=True)
    files = tokenizer if isinstance(tokenizer, HFTokenizer) else None
    if target.exists() or not (initial or files):
        return
    with _aside(target) as aside:
        if initial:
            origin = Path(initial) if (Path(initial) / CARD).exists() else Path(initial) / "initial"
            _carry(origin, aside, (CARD, *CARRIED))
        if files:
            for name in TOKENIZER:
                (aside / name).unlink(missing_ok=True)
            _carry(files.directory, aside, TOKENIZER)
            _name_stops(aside / "generation_config.json", files.stop_ids)


def _name_stops(file: Path, stop_ids: tuple[int, ...]) -> None:
    """Other programs shall end responses where the run did."""
    generation = read_json(file) if file.exists() else {}
    file.write_text(json.dumps({**generation, "eos_token_id": list(stop_ids)}, indent=2) + "\n")


def _carry(source: Path, target: Path, names: Sequence[str] = CARRIED) -> None:
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _check_free(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} is there already: give another directory, or remove it")


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A directory that gets the name ``out`` when all is in it, and is removed if that fails."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # of a process of that number which was killed
    aside.mkdir()
    try:
        yield aside
        os.rename(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _check_tokenizer(directory: Path, model: ModelConfig) -> None:
    if not (directory / "tokenizer.json").exists():
        raise UserError(f"{directory}: tokenizer.json is not there: add it, or import with --no-tokenizer")
    size = HFTokenizer(directory).vocab_size
    if size > model.vocab_size:
        raise UserError(
            f"{directory}: tokenizer.json has ids up to {size - 1}, but vocab_size = {model.vocab_size} in config.json"
        )


def _fetched(source: str, revision: str | None, say: Say) -> Path:
    """The directory of a checkpoint; one from the hub is downloaded, its config.json first and judged before the rest.

    Raises UserError, one line, for what is no directory and cannot be fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise UserError(f"{source} is no directory, and no id on the hub such as Qwen/Qwen3-30B-A3B-Base")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{source} is no directory, and the hub needs: pip install 'rlstab_jax[hf]'") from error
    fetch = partial(huggingface_hub.snapshot_download, source, revision=revision)
    try:
        directory = Path(fetch(allow_patterns=["config.json"]))
        read_model_config(read_json(directory / "config.json"), Path(source) / "config.json")
        say(f"fetching {source}")
        return Path(fetch(allow_patterns=["model*.safetensors", INDEX, *CARRIED]))
    except UserError:
        raise
    except Exception as error:  # of the hub's own kinds, of the network or of the disk: any of them with a long story
        raise UserError(
            f"{source} is no directory here, and could not be fetched from the hub ({one_line(error)}): check the id "
            "and the network, or give a local directory"
        ) from error
