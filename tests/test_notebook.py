"""washingdpodata.ipynb, run from top to bottom by a Jupyter kernel, with a tiny model as the reference and without the Hub."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.data.pair_files import load_pairs
from rwkv_dpo.data.pairs import cut_pair
from rwkv_dpo.data.tokenizer import VOCAB_SIZE
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape
from save_notebook import fingerprint

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "washingdpodata.ipynb"
COLAB = ROOT / "docs" / "lora_on_colab.ipynb"
DEMO = ROOT / "RWKV-v5" / "demo" / "preferences.jsonl"


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Small settings; the kernel inherits an empty Hub cache and no way to the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    shape = ModelShape(n_layer=1, n_embd=32, dim_att=32, dim_ffn=64, vocab_size=VOCAB_SIZE, head_size=16)
    save_weights(dict(random_model(shape, torch.float32).named_parameters()), tmp_path / "tiny.pth")
    return {
        "MODEL": str(tmp_path / "tiny.pth"),
        "OUT_DIR": str(tmp_path / "pairs"),
        "DPO_pair_number": 40,
        "CTX_LEN": 64,
        "VALID_RATIO": 0.25,
        "TEST_RATIO": 0.25,
        "DEVICE": "cpu",
    }


def run_notebook(settings, n_cells=None, folder=ROOT, path=NOTEBOOK):
    """What the first n_cells cells print, with these settings after those of the parameters cell."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = notebook.cells[:n_cells]
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    names = [line.split(" = ")[0] for line in parameters.source.splitlines()]
    assert set(settings) <= set(names)
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_without_the_hub_the_demo_preferences_become_three_scored_files(settings):
    told = run_notebook(settings)
    fallback = "HuggingFaceH4/ultrafeedback_binarized cannot be reached; the demo preferences RWKV-v5/demo/preferences.jsonl are used"
    assert told.startswith(fallback)
    folder = Path(settings["OUT_DIR"])
    report = json.loads((folder / "report.json").read_text())
    prompts = []
    assert set(report["files"]) == {"trainset.save", "validset.save", "testset.save"}
    for name, file in report["files"].items():
        pairs = load_pairs(folder / name, VOCAB_SIZE)
        assert pairs.is_scored
        assert len(pairs) > 0
        assert file == {"pairs": len(pairs), "sha256": file_sha256(folder / name)}
        assert pairs.header["reference_sha256"] == report["pairs"]["reference_sha256"] == file_sha256(settings["MODEL"])
        prompts.append({pairs.pair(i)[0].tobytes() for i in range(len(pairs))})
    assert not (prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2])
    counts = report["pairs"]["counts"]
    assert counts["read"] == 40
    assert counts["kept"] == sum(file["pairs"] for file in report["files"].values())
    assert (folder / "report.html").read_text().count("<details") == len(report["samples"]) + len(report["doubts"])


@pytest.mark.slow
def test_a_file_is_read_from_any_folder_of_the_repository(settings):
    told = run_notebook({**settings, "SOURCE": str(DEMO), "SPLIT": ""}, n_cells=5, folder=ROOT / "tests" / "data")
    assert told == "40 rows\n"


@pytest.mark.slow
def test_several_sources_are_mixed_in_their_shares(settings, tmp_path):
    rows = "".join(f"N\u00e9{i}?,Oui.,Non.\n" for i in range(30))
    (tmp_path / "other.csv").write_bytes(f"prompt,chosen,rejected\n{rows}".encode("cp1252"))
    sources = [f"{DEMO}:0.75", f"{tmp_path / 'other.csv'}:0.25"]
    told = run_notebook({**settings, "SOURCE": sources, "SPLIT": "", "ENCODING": "cp1252"}, n_cells=6)
    (line,) = (line.split() for line in told.splitlines() if "other.csv" in line)
    assert line[1:] == ["30", "30", "25.0%", "13"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MODEL": "none.pth"}, "MODEL none.pth: no such file"),
        ({"SOURCE": "none/rows.jsonl", "SPLIT": ""}, "none/rows.jsonl: cannot be read: No such file or directory"),
    ],
)
def test_a_mistyped_file_is_named_and_not_replaced(settings, changed, message):
    with pytest.raises(nbclient.exceptions.CellExecutionError) as error:
        run_notebook({**settings, **changed}, n_cells=5)
    assert (error.value.ename, error.value.evalue) == ("InputError", message)


@pytest.mark.slow
def test_pair_files_that_other_settings_made_are_kept(settings):
    folder = Path(settings["OUT_DIR"])
    folder.mkdir()
    (folder / "trainset.save").write_text("of another day")
    settings = {**settings, "SOURCE": str(DEMO), "SPLIT": ""}
    with pytest.raises(nbclient.exceptions.CellExecutionError) as error:
        run_notebook(settings, n_cells=6)
    assert "pairs holds pair files that these settings don't make (trainset.save): --overwrite 1 replaces them" in error.value.evalue
    assert "warning" not in run_notebook({**settings, "OVERWRITE": True}, n_cells=6)
    assert (folder / "trainset.save").read_text() == "of another day"  # until the last cells


@pytest.mark.slow
def test_as_it_ships_it_trains_a_tiny_model_and_ends_with_a_command_that_train_py_takes(tmp_path, settings):
    told = run_notebook({**settings, "MODEL": ""})
    model = f"{settings['OUT_DIR']}/tiny-model/rwkv-final.pth"
    assert told.startswith(f"MODEL is empty: {model} is a tiny RWKV-7")
    script, *flags = shlex.split(told.splitlines()[-1])
    assert script == "./RWKV-v5/train.py"
    assert flags[flags.index("--load_model") + 1] == model
    flags += [*shlex.split("--accelerator cpu --precision fp32 --epoch_steps 2 --epoch_count 1 --proj_dir"), str(tmp_path / "lora")]
    done = subprocess.run([sys.executable, ROOT / "RWKV-v5/train.py", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lora" / "adapter-final").is_dir()


@pytest.mark.slow
def test_the_notebook_for_colab_prepares_tunes_and_answers(settings, tmp_path, monkeypatch):
    """On this CPU, in a folder of a checkout: what it installs there, and a GPU, are out of reach."""
    (tmp_path / "RWKV-v5").symlink_to(ROOT / "RWKV-v5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = {"MODEL": settings["MODEL"], "SOURCE": str(DEMO), "SPLIT": "", "PAIRS": 60, "CTX_LEN": 64}
    told = run_notebook({**small, "EXTRA": "--epoch_steps 4 --epoch_count 1"}, folder=tmp_path, path=COLAB)
    assert "trainset.save" in told
    assert "--recipe lora: " in told
    assert told.partition("--out lora/merged.pth\n")[2].strip()  # the answers
    assert (tmp_path / "lora" / "adapter-final").is_dir()


def test_truncation_makes_the_peak_at_half_of_ctx_len_that_it_explains():
    """By pairs of all lengths up to three contexts."""
    rng, ctx_len = np.random.default_rng(0), 64
    rows = [[rng.integers(1, 9, n) for n in rng.integers(1, 3 * ctx_len, 3)] for _ in range(2000)]
    prompts = np.array([len(cut_pair(*row, ctx_len)[0]) for row in rows if len(row[0]) + max(map(len, row[1:])) > ctx_len])
    at_half = np.mean(prompts == ctx_len // 2)
    assert at_half > 0.4
    assert prompts[prompts != ctx_len // 2].size == 0 or np.bincount(prompts[prompts != ctx_len // 2]).max() < at_half * len(prompts) / 10


def test_it_is_committed_small_with_the_outputs_of_its_cells():
    """python tests/save_notebook.py makes them."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 200_000
    assert len(notebook.cells) <= 16
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert notebook.metadata["sources_sha256"] == fingerprint(notebook)
    kinds = [output.output_type for cell in code for output in cell.outputs]
    assert "error" not in kinds
    assert kinds.count("display_data") == 3  # lengths, the report, log-probabilities
    # Nothing of the machine that ran it.
    assert not re.search(r"/(root|home|tmp|work|usr)/|site-packages|Warning", json.dumps([cell.outputs for cell in code]))
