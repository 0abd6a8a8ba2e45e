import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "how_diffusion_models_work.ipynb"
MISSING = [name for name in ("nbclient", "ipykernel", "ipywidgets") if find_spec(name) is None]
LONGEST = 25  # lines of a cell; the imports have most


def test_the_notebook_has_short_cells_without_outputs_and_links_that_exist() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert max(len(cell["source"]) for cell in cells) <= LONGEST
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    text = "".join(line for cell in cells for line in cell["source"])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all((NOTEBOOK.parent / link).is_file() for link in links)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: pip install '.[notebook]'")
@pytest.mark.filterwarnings("ignore")  # of the client: those of the notebook are in its outputs
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a different one would hide the plots
    notebook = nbformat.read(NOTEBOOK, 4)
    paths = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=paths).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    words = "".join(output.get("text", "") for output in outputs)
    assert "warning" not in words.lower()
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 12
    assert sum('class="animation"' in data.get("text/html", "") for data in shown) == 2
    bars = [data for data in shown if "application/vnd.jupyter.widget-view+json" in data]
    assert len(bars) == 1
    (ratio,) = re.findall(r"DDIM is (\d+) times as fast", words)
    assert int(ratio) > 5  # 20 times as many calls of the network
