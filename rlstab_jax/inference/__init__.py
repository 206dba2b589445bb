"""The inference engine mu: its own precision, a jitted sampler, log-probs and routes of what was really sampled."""

from rlstab_jax.inference.continuous import sample_continuously, sampler_for
from rlstab_jax.inference.matched import sample_matched, score_matched
from rlstab_jax.inference.partial import sample_on, with_room
from rlstab_jax.inference.quantize import prepare, with_noise
from rlstab_jax.inference.routes import import_routes
from rlstab_jax.inference.sampler import sample
from rlstab_jax.inference.sampling import Sampling, sample_keys
from rlstab_jax.inference.stop_strings import StopStrings, stop_strings

__all__ = [
    "Sampling",
    "StopStrings",
    "import_routes",
    "prepare",
    "sample",
    "sample_continuously",
    "sample_keys",
    "sample_matched",
    "sample_on",
    "sampler_for",
    "score_matched",
    "stop_strings",
    "with_noise",
    "with_room",
]
