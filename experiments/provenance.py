"""Where numbers come from: the code's commit and the processor."""

import contextlib
import platform
import subprocess
import sys
from pathlib import Path


def commit() -> str:
    """Of this checkout, with "+" if the code is not the commit's; "" where it is none."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "HEAD", "--quiet", "--", "rlstab_jax", "experiments", ":!*/results/*"])
        return head.stdout.strip() + "+" * changed.returncode
    return ""


def processor() -> str:
    """Its name and, where Linux says them, family and model: kinds that compute in another order share a name."""
    if sys.platform != "linux":
        return platform.processor()
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    told: dict[str, str] = {}
    for name, _, value in lines:
        told.setdefault(name.strip(), value.strip())
    if "cpu family" in told and "model" in told:
        return f"{told.get('model name', '')} (family {told['cpu family']}, model {told['model']})"
    return told.get("model name", platform.processor())
