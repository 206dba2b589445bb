"""The picture of a run: what each panel shows, and that no metrics of a run can stop it."""

import math
import struct
import subprocess
import sys

import numpy as np
import pytest

from rlstab_jax.metrics import describe
from rlstab_jax.report import draw_run
from rlstab_jax.report.curves import charts, running_mean
from rlstab_jax.report.figure import draw_chart, draw_runs
from rlstab_jax.report.panels import ENTROPY, PANELS, X
from rlstab_jax.types import UserError


def metrics_of(steps: int) -> dict[str, np.ndarray]:
    """Plausible curves: all metrics of the picture, evaluation at every tenth step."""
    rng = np.random.default_rng(0)
    names = [name for panel in PANELS for name in panel.series]
    metrics = {name: np.exp(0.2 * rng.standard_normal(steps)) for name in names}
    for name in names:
        if name.startswith("eval/"):
            metrics[name][np.arange(steps) % 10 != 0] = math.nan
    return {X: 8.0 * np.arange(1, steps + 1), **metrics}


def axes_of(title: str, metrics: dict[str, np.ndarray]):
    from matplotlib.figure import Figure

    (panel,) = [panel for panel in PANELS if panel.title == title]
    (chart,) = charts(panel, {"a run": [metrics]})
    ax = Figure().subplots()
    draw_chart(ax, chart, chart.panel)
    return ax


def test_every_series_is_a_defined_metric():
    assert all(describe(name) for panel in PANELS for name in panel.series)


@pytest.mark.parametrize("steps", [1, 120])
def test_the_picture_is_1200_pixels_wide(tmp_path, steps):
    draw_run(metrics_of(steps), tmp_path / "report.png", "a run")
    header = (tmp_path / "report.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) == (1200, 1500)
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_several_groups_fill_a_grid_with_their_curves(tmp_path):
    draw_runs({"live": [metrics_of(30), metrics_of(20)], "r3": [metrics_of(5)]}, tmp_path / "r.png", "two groups")
    header = (tmp_path / "r.png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:24])
    assert width == 1650
    assert height > 6 * 300  # 17 metrics in three columns


def test_metrics_of_nothing_and_of_something_else(tmp_path):
    draw_run({}, tmp_path / "empty.png", "nothing yet")
    assert (tmp_path / "empty.png").stat().st_size > 1000
    with pytest.raises(UserError, match=X):
        draw_run({"reward/mean": np.zeros(3)}, tmp_path / "other.png", "no x axis")


def test_sparse_series_show_their_points_where_they_were_measured():
    metrics = metrics_of(30)
    ax = axes_of("Reward and held-out accuracy", metrics)
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["held-out, inference engine"].get_xdata().tolist() == [8, 88, 168]
    np.testing.assert_array_equal(
        lines["held-out, inference engine"].get_ydata(), metrics["eval/accuracy_rollout"][::10]
    )


def test_missing_metrics_leave_a_note_and_zeros_are_named():
    metrics = metrics_of(5)
    metrics["staleness/k3"][:] = 0.0
    metrics["discrepancy_live/k3"][:] = math.nan
    metrics["discrepancy/k3"][2] = math.inf
    del metrics["policy/entropy"]
    gaps = axes_of("The two gaps", metrics)
    labels = [text.get_text() for text in gaps.get_legend().get_texts()]
    assert len(labels) == 2
    assert labels[1].endswith("(0 throughout)")
    assert gaps.get_yscale() == "log"
    assert not charts(ENTROPY, {"a run": [metrics]})


def test_rounding_errors_do_not_stretch_a_logarithmic_axis():
    metrics = metrics_of(5)
    metrics["discrepancy/k3"][0] = 1e-16
    assert axes_of("The two gaps", metrics).get_ylim()[0] > 1e-8


def test_running_mean_by_hand():
    values = np.arange(80.0) ** 2
    smooth = running_mean(values, 2)  # two points on either side of each
    np.testing.assert_allclose(
        smooth[[0, 1, 10, 79]], [5 / 3, 14 / 4, (64 + 81 + 100 + 121 + 144) / 5, (77**2 + 78**2 + 79**2) / 3]
    )
    np.testing.assert_allclose(running_mean(np.full(50, 3.0), 4), 3.0)


def test_importing_the_package_imports_no_matplotlib():
    code = "import sys, rlstab_jax.report; sys.exit(any(name.startswith('matplotlib') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_drawing_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys, numpy as np; from rlstab_jax.report import draw_run;"
        f"draw_run({{{X!r}: np.arange(3.0)}}, sys.argv[1], 't'); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "r.png"], check=False).returncode == 0
