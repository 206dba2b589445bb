"""What the README shows is what there is: its own loss runs, its commands and links exist, each config builds."""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlstab_jax.cli import COMMANDS, load_config
from rlstab_jax.objectives import build as build_objective
from rlstab_jax.objectives import recipes
from rlstab_jax.training.engines import build
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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs_build(path: Path) -> None:
    engines = build(load_config(path))
    assert engines.config.model.vocab_size == engines.task.tokenizer.vocab_size
    assert load_config(path).__class__.__name__ == "RunConfig"
    assert path.name in README


def test_links_and_names() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for command in re.findall(r"(?:bin/)?rlstab (\w+) configs", README):
        assert command in COMMANDS
    listed = re.search(r"Recipes that are there: (.*?);", README, re.DOTALL)[1]
    for name in re.findall(r"`(\w+)`", listed):
        assert callable(getattr(recipes, name))
