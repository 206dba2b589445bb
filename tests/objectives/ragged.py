"""Random ragged batches for the tests of objectives, and the plain NumPy view of them."""

import jax
import jax.numpy as jnp
import numpy as np

from rlstab_jax.objectives import Objective, advantages_of, coefficients, surrogate
from rlstab_jax.types import Scores

ROWS, LENGTH = 6, 5


def ragged(seed: int, spread: float = 0.4) -> tuple[Scores, np.ndarray]:
    """Scores of 3 groups of unequal size (1, 2 and 3 rows) in float64, and rewards. NaN outside the mask."""
    random = np.random.default_rng(seed)
    mask = np.arange(LENGTH)[None] < random.integers(1, LENGTH + 1, ROWS)[:, None]
    rollout = np.where(mask, -random.uniform(0.05, 3.0, mask.shape), np.nan)
    old = np.minimum(rollout + spread * random.normal(size=mask.shape), -1e-3)
    target = np.minimum(old + spread * random.normal(size=mask.shape), -1e-3)
    reference = np.where(mask, -random.uniform(0.05, 3.0, mask.shape), np.nan)
    routers = np.where(mask[..., None], -random.uniform(0.1, 2.0, (2, *mask.shape, 4)), np.nan)
    rows = random.permutation(ROWS)
    scores = Scores(
        target=target,
        old=old,
        rollout=rollout,
        mask=mask,
        groups=np.array([0, 1, 1, 4, 4, 4])[rows],
        reference=reference,
        entropy=np.where(mask, random.uniform(0.0, 2.0, mask.shape), np.nan),
        router_old=routers[0],
        router_target=routers[0] + 0.1 * routers[1],
    )
    return scores, random.choice([0.0, 1.0, 0.5], ROWS)


@jax.jit
def loss_and_gradient(objective: Objective, scores: Scores, rewards: jax.Array):
    """(loss, parts) and the gradient with respect to log pi_theta, the whole path from rewards on."""
    advantage, c = advantages_of(objective, scores, rewards), coefficients(objective, scores)

    def loss(target: jax.Array):
        return surrogate(objective, scores.replace(target=target), advantage, c)

    return jax.value_and_grad(loss, has_aux=True)(scores.target)


def gradient(objective: Objective, scores: Scores, rewards: np.ndarray) -> np.ndarray:
    """The gradient of the loss with respect to log pi_theta, in float64."""
    with jax.enable_x64(True):
        return np.asarray(loss_and_gradient(objective, jax.tree.map(jnp.asarray, scores), jnp.asarray(rewards))[1])
