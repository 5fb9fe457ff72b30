"""The notebooks run from their first to their last cell, on the smallest embedded data and for two steps."""

import glob
import os

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient", reason="the extra 'docs' is not installed")
pytest.importorskip("ipykernel", reason="the extra 'docs' is not installed")

NOTEBOOKS = sorted(glob.glob(os.path.join(ROOT, "docs", "notebooks", "*.ipynb")))
pytestmark = [pytest.mark.notebooks, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def environment(data_dir, tmp_path_factory):
    """Two steps on the tiny data set; the notebooks share their runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPVL_NOTEBOOK_STEPS", "2")
        patch.setenv("CAPVL_NOTEBOOK_DATA", "scenes/tiny")
        patch.setenv("CAPVL_NOTEBOOK_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("TFDS_DATA_DIR", data_dir)
        patch.setenv("PYTHONPATH", ROOT)
        yield


@pytest.mark.parametrize("path", NOTEBOOKS, ids=os.path.basename)
def test_notebook(path, environment):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": os.path.dirname(path)}})
    client.execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert pictures or "convert" in path
    assert "colab.research.google.com" in notebook.cells[0].source


def test_all_are_there():
    assert len(NOTEBOOKS) == 7
