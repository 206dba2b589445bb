"""Pictures of a run, from what it left on disk."""

from rlstab_jax.report.figure import draw_run

__all__ = ["draw_run"]
