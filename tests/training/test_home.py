"""A run in a bucket goes on wherever it is begun again, and leaves what a run in a directory leaves."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlstab_jax.cli import main
from rlstab_jax.training import home
from rlstab_jax.training.home import home_of
from rlstab_jax.training.run import train
from rlstab_jax.types import UserError
from tests.training import tiny_run
from tests.training.bucket import Bucket, bucket

OUT = "gs://bucket/runs/first"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    import gcsfs

    with bucket() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(home, "COPIES", tmp_path / "copies")
        gcsfs.GCSFileSystem.clear_instance_cache()
        home.epath.backend.fsspec_backend._get_filesystem.cache_clear()
        yield server


def config(gradient_steps: int) -> tiny_run.RunConfig:
    default = tiny_run.config()
    evaluation = dataclasses.replace(default.evaluation, every=0)
    return dataclasses.replace(
        default, gradient_steps=gradient_steps, checkpoint_every=2, keep_checkpoints=1, evaluation=evaluation
    )


def steps_of(lines: bytes) -> list[dict]:
    rows = [json.loads(line) for line in lines.splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]


def test_a_run_in_a_bucket(stand_in: Bucket, tmp_path: Path) -> None:
    said: list[str] = []
    train(config(4), OUT, say=said.append)
    copy = tmp_path / "copies" / "bucket%2Fruns" / "first"
    assert f"logs are written to {copy}, and copied to {OUT} with each checkpoint" in said
    shutil.rmtree(tmp_path / "copies")  # another machine
    said.clear()
    train(config(8), OUT, say=said.append)
    assert "resuming after global step 2" in said
    train(config(8), tmp_path / "local", say=said.append)

    stored = {name.removeprefix("runs/first/"): content for name, (content, _) in stand_in.objects.items()}
    assert steps_of(stored["metrics.jsonl"]) == steps_of((tmp_path / "local" / "metrics.jsonl").read_bytes())
    assert stored["samples.jsonl"] == (tmp_path / "local" / "samples.jsonl").read_bytes()
    assert stored["report.png"].startswith(b"\x89PNG")
    assert json.loads(stored["manifest.json"])["config"]["gradient_steps"] == 8
    assert sum(name.startswith("events.out.tfevents.") for name in stored) == 2
    # One checkpoint is kept, and committed; the local directory holds none.
    kept = {name.split("/")[1] for name in stored if name.startswith("checkpoints/")}
    assert kept == {"4"}
    assert "checkpoints/4/commit_success.txt" in stored
    assert not (copy / "checkpoints").exists()

    with pytest.raises(UserError, match=f"{OUT} holds a run already"):
        train(config(8), OUT, fresh=True)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(stand_in: Bucket, tmp_path: Path) -> None:
    """What lies in the local directory is only a copy: of what the bucket does not hold, nothing is left."""
    where = home_of(OUT)
    where.path.mkdir(parents=True)
    (where.path / "metrics.jsonl").write_bytes(b'{"progress/global_steps": 7}\n')
    where.fetch()
    assert not where.path.exists()
    assert not where.begun
    stand_in.put("runs/first/manifest.json", b"{}")
    stand_in.put("runs/first/profile/deep/trace", b"\r\n\x00")
    stand_in.put("runs/first/checkpoints/1/header/metadata", b"{}")
    stand_in.put("runs/first/second/manifest.json", b"another run's")
    stand_in.put("runs/first/owner.txt", b"")
    assert where.begun
    where.fetch()
    found = {str(file.relative_to(where.path)) for file in where.path.rglob("*") if file.is_file()}
    assert found == {"manifest.json", "profile/deep/trace"}
    assert (where.path / "profile/deep/trace").read_bytes() == b"\r\n\x00"


def test_no_copy_is_inside_anothers(stand_in: Bucket) -> None:
    outer, inner = home_of("gs://bucket/runs"), home_of(OUT)
    assert not inner.path.is_relative_to(outer.path)
    assert inner.path != home_of("gs://bucket/runs-first").path


def test_of_two_that_work_on_a_run_the_later_one_goes_on(stand_in: Bucket, tmp_path: Path) -> None:
    taken: list[dict] = []

    def take_over(_: object) -> None:
        if not taken:
            home_of(OUT).own()
            taken.append(dict(stand_in.objects))

    with pytest.raises(UserError, match=rf"{OUT}: process \d+ on .* has taken over this run"):
        train(config(8), OUT, watch=take_over)
    assert stand_in.objects == taken[0]  # nothing was written after it
    assert train(config(8), OUT) is None


def test_a_bucket_that_does_not_answer(stand_in: Bucket, tmp_path: Path) -> None:
    stand_in.forbidden = True
    with pytest.raises(UserError, match=rf"{OUT} cannot be read \(.*credentials"):
        train(config(2), OUT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train tests/training/tiny_run.py --out gs://bucket", "expected a path in a bucket, such as gs://my-bucket/"),
        ("train tests/training/tiny_run.py --out=gs://bucket", "expected a path in a bucket, such as gs://my-bucket/"),
        ("train tests/training/tiny_run.py --out s3://bucket/run", "--out s3://bucket/run: expected a directory, or"),
        ("train tests/training/tiny_run.py --initial gs://bucket/import", "only train --out takes a bucket"),
        ("eval gs://bucket/run --data x.jsonl", "with gcloud storage cp -r gs://bucket/run ."),
        ("export-hf --checkpoint=gs://bucket/run out", "with gcloud storage cp -r gs://bucket/run ."),
    ],
)
def test_refused_in_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
