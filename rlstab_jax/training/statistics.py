"""Statistics of n samples a prompt: pass@k, majority votes, and how far they would move with other prompts.

Each takes one prompt; `bootstrap` takes their values.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def pass_at_k(right: int, samples: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the probability that k of n samples, of which c are right, hold a right one. Unbiased
    for any k <= n (2107.03374, Eq. 1).

    >>> pass_at_k(right=1, samples=4, k=2)
    0.5
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"{right} right of {samples}, k = {k}: expected 0 <= right <= samples and 1 <= k <= samples")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; None does not vote. Where answers are tied, the share of these that
    are right: what a draw among them would give on average.

    >>> majority(["7", "8", "7", None], [True, False, True, False])
    1.0
    """
    votes: dict[str, list[bool]] = {}
    for answer, is_right in zip(answers, right, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(is_right)
    most = max(map(len, votes.values()), default=0)
    winners = [float(np.mean(verdicts)) for verdicts in votes.values() if len(verdicts) == most]
    return float(np.mean(winners)) if winners else 0.0


def bootstrap(
    values: Float[np.ndarray, "prompts"], draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """The mean over prompts with a percentile interval: of the means of ``draws`` resamples of the prompts."""
    rng, count = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(count, size=count)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def ladder(samples: int) -> list[int]:
    """The k of pass@k: powers of two up to n, and n itself.

    >>> ladder(12)
    [1, 2, 4, 8, 12]
    """
    return sorted({2**i for i in range(samples.bit_length())} | {samples})
