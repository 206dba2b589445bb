"""Pictures of a run, and the page that compares runs, from what they left on disk."""

from rlstab_jax.report.figure import draw_run

__all__ = ["draw_run"]
