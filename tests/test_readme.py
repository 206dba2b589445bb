"""What the README shows is what there is: its own loss runs, its commands and links exist, each config builds."""

import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlstab_jax.cli import COMMANDS, load_config
from rlstab_jax.models import ModelConfig
from rlstab_jax.objectives import build as build_objective
from rlstab_jax.objectives import recipes
from rlstab_jax.training.engines import build
from rlstab_jax.training.validate import validate
from rlstab_jax.types import UserError
from tests.objectives.ragged import ragged

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_loss_of_ones_own(tmp_path: Path) -> None:
    """Under ten lines, usable as a config, with DPPO's gate: A > 0 and a probability that grew by 0.2 is stopped."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    body = code[code.index("def mine") : code.index("def config")].strip().splitlines()
    assert len(body) < 10
    (tmp_path / "mine.py").write_text(code)
    config = load_config(tmp_path / "mine.py")
    objective = build_objective(config.objective)
    scores, _ = ragged(0)
    n = scores.target.shape
    one = dataclasses.replace(
        scores, target=jnp.log(jnp.full(n, 0.7)), rollout=jnp.log(jnp.full(n, 0.5)), old=jnp.log(jnp.full(n, 0.5))
    )
    assert not objective.trust(one, jnp.ones(n))[scores.mask].any()
    assert np.asarray(objective.trust(one, -jnp.ones(n)))[scores.mask].all()
    assert build(config).objective.advantage.func is objective.advantage.func


def test_the_task_of_ones_own(tmp_path: Path) -> None:
    """It builds, its field is an option, and its reward is the one that is judged by."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ArithmeticConfig" in block)
    (tmp_path / "mine.py").write_text(code)
    task = build(load_config(tmp_path / "mine.py")).task
    prompt = task.split("train")[0]
    right = task.demonstration(prompt, 0)
    assert task.reward(prompt, "no") == pytest.approx(-0.02)
    assert task.reward(prompt, right) <= 1 - 0.01 * len(right)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs_build(path: Path) -> None:
    if "MODEL =" in path.read_text():  # an import, which whoever runs it makes first
        missing = "there is no such directory; give one that `rlstab import-hf` wrote|tokenizer.json is not there"
        with pytest.raises(UserError, match=missing):
            build(load_config(path))
        return
    engines = build(load_config(path))
    assert engines.config.model.vocab_size == engines.task.tokenizer.vocab_size
    assert path.name in README


def test_the_config_of_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card of Qwen3-30B-A3B's sizes in place of the import, all of its numbers fit together."""
    monkeypatch.chdir(tmp_path)
    Path("imports/qwen3").mkdir(parents=True)
    sizes = ModelConfig(151_936, 48, 2048, 32, 4, 128, 128, 8, 768, 6144, rope_theta=1e6)
    Path("imports/qwen3/model.json").write_text(json.dumps({"model": dataclasses.asdict(sizes)}))
    config = load_config(ROOT / "configs" / "qwen3.py")
    assert config.model == sizes
    validate(config)
    with pytest.raises(UserError, match=r"imports/qwen3/tokenizer\.json is not there"):
        build(config)


def test_links_and_names() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    used = set(re.findall(r"^(?:rlstab|on_all \".*/rlstab) ([\w-]+)", README, re.MULTILINE))
    assert used == set(COMMANDS)
    listed = re.search(r"Recipes that are there: (.*?);", README, re.DOTALL)[1]
    for name in re.findall(r"`(\w+)`", listed):
        assert callable(getattr(recipes, name))
