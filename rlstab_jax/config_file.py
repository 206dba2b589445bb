"""Config files: Python with a function ``config()``."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from rlstab_jax.types import UserError, one_line


def load_config(path: Path) -> Any:
    """The `RunConfig` that a config file's ``config()`` returns. Raises UserError that names the file."""
    from rlstab_jax.own_code import place
    from rlstab_jax.training.config import RunConfig

    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a config such as configs/quickstart.py")
    spec = importlib.util.spec_from_file_location(f"rlstab_config.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: a config is a Python file, such as configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    # Behind all else, or configs/math.py would hide Python's own math.
    sys.path += [folder for folder in (str(path.absolute().parent), str(Path.cwd())) if folder not in sys.path]
    sys.modules[spec.name] = module  # where --help looks up the docs of dataclasses that the file defines
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: the config does not run{place(error)}: {one_line(error)}") from error
    if not callable(getattr(module, "config", None)):
        raise UserError(f"{path}: expected a function config() that returns a RunConfig")
    try:
        config = module.config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: config() failed{place(error)}: {one_line(error)}") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: config() returned {type(config).__name__}, expected a RunConfig")
    return config
