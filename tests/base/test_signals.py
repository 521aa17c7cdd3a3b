"""Real signals to every script: one line, 128 + the signal's number, and nothing half-written."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from lives import hang, wait_for_hang
from rwkv_dpo.base import signals
from rwkv_dpo.data.pair_files import save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.tokenizer import VOCAB_SIZE
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape

SCRIPTS = Path(__file__).resolve().parents[2] / "RWKV-v5"
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    shape = ModelShape(n_layer=1, n_embd=16, dim_att=16, dim_ffn=32, vocab_size=VOCAB_SIZE, head_size=8)
    save_weights(random_model(shape, torch.float32).state_dict(), folder / "model.pth")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} and many more"}) + "\n" for i in range(30_000)))
    (folder / "pairs.json").write_text(json.dumps([{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(40)]))
    save_pairs(folder / "test.save", pack_pairs([([i + 1], [2], [3]) for i in range(40)], np.zeros((40, 2))))
    return folder


# The script and its flags, where it hangs, what its last line says, and what it may leave.
CASES = {
    "texts on their way": ("make_data.py", "{inputs}/text.jsonl --out {out}/corpus",
                           ("rwkv_dpo.data.spool:Spool.extend", 2), "nothing was written", []),
    "a corpus half written": ("make_data.py", "{inputs}/text.jsonl --out {out}/corpus",
                              ("rwkv_dpo.data.spool:Spool.__getitem__", 3), "nothing was written", []),
    "scoring": ("prepare_pairs.py", "--source {inputs}/pairs.json --load_model {inputs}/model.pth --out_dir {out} --batch_tokens 16 "
                "--device cpu --wkv_backend reference --templates chat",
                ("rwkv_dpo.evaluation.reference:score_batch", 3), "the same command continues where it was", ["reference.journal"]),
    "evaluating": ("evaluate.py", "--load_model {inputs}/model.pth --pairs {inputs}/test.save --out {out}/report.json --batch_tokens 16 "
                   "--device cpu --wkv_backend reference",
                   ("rwkv_dpo.evaluation.scoring:score_batch", 3), "nothing was written", []),
    "a checkpoint half written": ("export.py", "--load_model {inputs}/model.pth --out {out}/model.pth --wkv_backend reference",
                                  ("rwkv_dpo.files.hashed:HashedFile.write", 5), "nothing was written", []),
}  # fmt: skip


@pytest.mark.parametrize("number", STATUS, ids=NAMES.get)
@pytest.mark.parametrize("case", CASES)
def test_a_script_ends_in_a_line_and_leaves_nothing_half_written(inputs, tmp_path, lives, case, number):
    script, flags, place, says, leaves = CASES[case]
    out, log = tmp_path / "out", tmp_path / "log.txt"
    out.mkdir()
    arguments = flags.format(inputs=inputs, out=out).split()
    process = lives.start_script(SCRIPTS / script, arguments, log, functools.partial(hang, *place))
    wait_for_hang([process], log)
    os.killpg(process.pid, number)
    assert lives.end([process], log) == [STATUS[number]], log.read_text()
    told = log.read_text().split("HANGING\n")[1].strip()
    # A progress bar is drawn once more, on lines of its own.
    assert [line for line in told.splitlines() if "%|" not in line] == [f"{script}: stopped by {NAMES[number]}: {says}"]
    assert [path.name for path in out.iterdir()] == leaves


@pytest.mark.parametrize("number", STATUS, ids=NAMES.get)
@pytest.mark.parametrize("script", ["train.py", "export.py", "evaluate.py", "prepare_pairs.py"])
def test_a_signal_while_torch_is_imported_is_a_line_too(inputs, tmp_path, script, number):
    (tmp_path / "torch.py").write_text("import time\nprint('HANGING', flush=True)\ntime.sleep(600)\n")
    flags = {
        "train.py": "--accelerator cpu --dpo_general_corpus_ratio 0", "export.py": "--load_model base.pth --out other.pth",
        "evaluate.py": "--load_model base.pth",
        "prepare_pairs.py": f"--source {inputs}/pairs.json --load_model {inputs}/model.pth --out_dir {tmp_path / 'out'}",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / script), *flags[script].split()], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert any("HANGING" in line for line in process.stdout)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STATUS[number]
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"{script}: stopped by {NAMES[number]}: ")


def impatient(place: str, patience: float) -> None:
    from rwkv_dpo.base import signals

    signals.PATIENCE_S = patience
    hang(place, in_c=True)


def start_stuck(inputs, lives, log, patience):
    arguments = f"--load_model {inputs}/model.pth --pairs {inputs}/test.save --device cpu --wkv_backend reference".split()
    prepare = functools.partial(impatient, "rwkv_dpo.evaluation.scoring:score_batch", patience)
    process = lives.start_script(SCRIPTS / "evaluate.py", arguments, log, prepare)
    wait_for_hang([process], log)
    return process


def test_a_script_that_is_stuck_outside_of_python_ends_all_the_same(inputs, tmp_path, lives):
    log = tmp_path / "log.txt"
    process = start_stuck(inputs, lives, log, patience=0.2)
    os.kill(process.pid, signal.SIGTERM)
    assert lives.end([process], log) == [143]
    assert log.read_text().endswith("evaluate.py: stopped by SIGTERM: nothing was written\n")


def test_a_second_ctrl_c_stops_at_once_and_a_repeated_one_is_the_first(inputs, tmp_path, lives):
    """torchrun passes on a Ctrl-C that the terminal had sent to its processes."""
    log = tmp_path / "log.txt"
    process = start_stuck(inputs, lives, log, patience=600)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.1)
    assert process.is_alive()
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    assert lives.end([process], log) == [130]
    assert log.read_text().endswith("stopped at once\n")


SPEAKS_SLOWLY = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from rwkv_dpo.base.script import run_script
class Slow:
    def write(self, text):
        print("SPEAKING", flush=True)
        time.sleep(2)
        os.write(2, text.encode())
    def flush(self):
        pass
def main():
    sys.stderr = Slow()
    print("HANGING", flush=True)
    time.sleep(600)
run_script(main)
"""


def test_a_signal_that_comes_again_at_the_last_word_is_no_traceback():
    """Two processes of a run pass SIGTERM on to each other, and on a busy machine more than SAME_WITHIN_S goes by between."""
    command = [sys.executable, "-c", SPEAKS_SLOWLY, str(SCRIPTS / "src")]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for said in ("HANGING\n", "SPEAKING\n"):
        assert process.stdout.readline() == said
        process.send_signal(signal.SIGTERM)
        time.sleep(signals.SAME_WITHIN_S + 0.1)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "-c: stopped by SIGTERM: nothing was written\n")


def test_a_caller_gets_its_own_handlers_back():
    mine = [signal.signal(number, lambda *_: None) for number in signals.SIGNALS]
    kept = [signal.getsignal(number) for number in signals.SIGNALS]
    seen: list[int] = []
    restore = signals.on_signals(seen.append)
    os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    restore()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == kept
    assert signal.set_wakeup_fd(-1) == -1
    for number, handler in zip(signals.SIGNALS, mine, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("n", [1, 100_000])
def test_a_reader_that_leaves_early_is_no_fault(n):
    """rwkv-dpo evaluate ... | head: whether the pipe breaks at a print or at the end."""
    code = f"import time; from rwkv_dpo.base.script import run_script; run_script(lambda: (time.sleep(0.5), print('a row\\n' * {n})))"
    reading, writing = os.pipe()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "RWKV-v5" / "src")}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    os.close(reading)
    assert run.communicate()[1] == ""
    assert run.returncode == 128 + signal.SIGPIPE
