"""The notebooks of colab/: committed without outputs, opened by a badge, and each runs from top to bottom."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

pytestmark = pytest.mark.optimised

ROOT = Path(__file__).parent.parent
REPOSITORY = "rlstab/rlstab_jax"  # what badges open, and what the first cell installs from
NAMES = ("first_order", "routing_replay", "compose_a_loss", "train_a_moe", "diagnose")
BADGE = "https://colab.research.google.com/github/{}/blob/main/colab/{}.ipynb"


def read(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def sources(notebook: NotebookNode, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_these_are_the_notebooks() -> None:
    assert {path.stem for path in (ROOT / "colab").iterdir() if path.suffix == ".ipynb"} == set(NAMES)
    readme = (ROOT / "README.md").read_text()
    for name in NAMES:
        assert BADGE.format(REPOSITORY, name) in readme
        assert f"(colab/{name}.ipynb)" in readme


@pytest.mark.parametrize("name", NAMES)
def test_reviewable(name: str) -> None:
    """No outputs, no numbers of execution, no metadata of an editor."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_badge_links_and_installation(name: str) -> None:
    notebook = read(name)
    markdown, code = "\n".join(sources(notebook, "markdown")), sources(notebook, "code")
    assert BADGE.format(REPOSITORY, name) in sources(notebook, "markdown")[0]
    assert code[0] == sources(read(NAMES[0]), "code")[0]  # one installation for all
    assert f"https://github.com/{REPOSITORY}\n" in code[0]
    assert set(re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)", markdown + code[0])) == {REPOSITORY}
    for path in re.findall(rf"github\.com/{REPOSITORY}/blob/main/([^)\s]+)", markdown):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", markdown):
        assert (ROOT / "colab" / target).exists(), target


@pytest.mark.parametrize("start", ["a clone's colab/", "beside a clone", "in a clone"])
def test_the_first_cell_goes_to_the_root(start: str, tmp_path: Path) -> None:
    """From wherever a kernel starts: Colab puts a restarted one beside the clone."""
    (tmp_path / "rlstab_jax").symlink_to(ROOT)
    place = {"a clone's colab/": ROOT / "colab", "beside a clone": tmp_path, "in a clone": ROOT}[start]
    first = sources(read(NAMES[0]), "code")[0]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(first), nbformat.v4.new_code_cell("print(os.path.realpath('.'))")]
    )
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    assert notebook.cells[1].outputs[0].text.strip() == str(ROOT.resolve())
    assert notebook.cells[0].outputs == []  # nothing is installed twice


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a clone, with the smaller numbers of its parameter cell. Programs that notebooks share compile once, into
    the folder of the session."""
    monkeypatch.setenv("RLSTAB_FAST", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of the time
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    notebook = read(name)
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "colab")}}
    ).execute()  # raises on the first error of a cell
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "Traceback" not in said
    assert "Warning" not in said
