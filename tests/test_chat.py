"""chat.py as a user has it: at a terminal, in a pipe, and with prompts in files."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import chat
from rwkv_dpo.data.tokenizer import VOCAB_SIZE, WorldTokenizer
from rwkv_dpo.evaluation.dialogue import Dialogue
from rwkv_dpo.evaluation.generate import Sampling, generate
from rwkv_dpo.model.checkpoint import load_model, save_weights
from rwkv_dpo.model.shape import ModelShape

SCRIPT = Path(__file__).resolve().parents[1] / "RWKV-v5" / "chat.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tiny.pth"
    shape = ModelShape(n_layer=2, n_embd=32, dim_att=32, dim_ffn=64, vocab_size=VOCAB_SIZE, head_size=16)
    save_weights(dict(random_model(shape, torch.float32).named_parameters()), path)
    return path


def flags(checkpoint, *more):
    own = ("--load_model", checkpoint, "--device", "cpu", "--wkv_backend", "reference", "--temperature", 0, "--max_tokens", 6)
    return list(map(str, [*own, *more]))


def greedy(checkpoint, prompt):
    model = load_model(checkpoint, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="reference")
    return generate(model, WorldTokenizer(), prompt, 6, 0, 1, 0)


def test_a_pipe_is_a_dialogue_with_commands(checkpoint, tmp_path, capsys, monkeypatch):
    save = f"/save {tmp_path / 'said.jsonl'}"
    typed = ["Hello", "", "/undo", "/undo", "/system Be kind.", "Hello", save, "/save", "/what", "/quit", "Hello"]
    monkeypatch.setattr("sys.stdin", (line + "\n" for line in typed))
    monkeypatch.setattr(chat, "lines", lambda: (line.rstrip() for line in sys.stdin if line.strip()))
    chat.main(flags(checkpoint))
    told = capsys.readouterr()
    plain, kind = greedy(checkpoint, "User: Hello\n\nAssistant:"), greedy(checkpoint, "System: Be kind.\n\nUser: Hello\n\nAssistant:")
    assert told.out == "\n".join([plain, "", "nothing to undo", "", kind, save.replace("/save", "saved"), ""])
    assert told.err.splitlines() == [
        "/save FILE.jsonl: name a file", "/what: commands are /reset, /system TEXT, /undo, /retry, /save FILE.jsonl and /quit"
    ]  # fmt: skip
    assert json.loads((tmp_path / "said.jsonl").read_text())["messages"] == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": kind}
    ]  # fmt: skip


def test_a_line_that_is_no_text_is_a_line_of_fault_and_the_chat_goes_on(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(chat, "lines", lambda: iter(["Hi \ud800", "Hello"]))
    chat.main(flags(checkpoint))
    told = capsys.readouterr()
    assert told.out == greedy(checkpoint, "User: Hello\n\nAssistant:") + "\n"
    assert "lone surrogate" in told.err


def test_a_prompt_is_written_out_as_training_has_it(checkpoint, tmp_path, capsys):
    """A blank line ends a turn, so that a prompt has none; system message and spaces likewise."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Hello\n\n\nthere"}))
    chat.main(flags(checkpoint, "--prompts", tmp_path / "p.jsonl", "--system", " Be kind. "))
    assert capsys.readouterr().out == greedy(checkpoint, "System: Be kind.\n\nUser: Hello\nthere\n\nAssistant:") + "\n"


def test_prompts_of_a_file_are_answered_into_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("Hello\n\nWhy?\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": " Why? ", "id": 3}\n')
    for name in ("p.txt", "p.jsonl"):
        chat.main(flags(checkpoint, "--prompts", tmp_path / name, "--out", tmp_path / "out.jsonl", "--n", 2))
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == ["Hello", "Why?"]
        assert [row["answers"] for row in rows] == [[greedy(checkpoint, f"User: {text}\n\nAssistant:")] * 2 for text in ("Hello", "Why?")]
    chat.main(flags(checkpoint, "--prompt", "Hello"))
    assert capsys.readouterr().out == greedy(checkpoint, "User: Hello\n\nAssistant:") + "\n"


def test_faults_are_named(checkpoint, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Né?".encode("cp1252"))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"\n')
    small = tmp_path / "small.pth"
    save_weights(dict(random_model(ModelShape(2, 32, 32, 64, 61, head_size=16), torch.float32).named_parameters()), small)
    for more, words in (
        (("--prompts", tmp_path / "latin.txt"), "latin.txt: not UTF-8: .* at byte 1"),
        (("--prompts", tmp_path / "empty.txt"), "empty.txt: holds no prompt"),
        (("--prompts", tmp_path / "none.txt"), "none.txt: cannot be read: No such file"),
        (("--prompts", tmp_path / "rows.jsonl"), "rows.jsonl: line 2: has no text in a field 'prompt'"),
        (("--prompts", tmp_path / "torn.jsonl"), "torn.jsonl: line 1: not JSON"),
        (("--prompt", "a", "--prompts", "b"), "--prompt and --prompts: only one of them"),
        (("--out", "b"), "--out needs --prompt or --prompts"),
        (("--top_p", 2), "--top_p 2.0: 0 to 1 is accepted"),
        (("--load_model", small), "small.pth: text becomes tokens of the World tokenizer, 65536 of them; it has a vocabulary of 61"),
    ):
        with pytest.raises(InputError, match=words):
            chat.main(flags(checkpoint, *more))


@pytest.mark.slow
def test_at_a_terminal_lines_are_edited_and_answers_follow(checkpoint):
    """A real terminal: the second line is typed with a fault that backspace takes away."""
    pytest.importorskip("prompt_toolkit")
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen([sys.executable, SCRIPT, *flags(checkpoint)], stdin=there, stdout=there, stderr=there, env=environment)
    os.close(there)
    seen = ""

    def until(text):
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end, seen
            if not select.select([here], [], [], 1)[0]:
                continue
            try:
                seen += os.read(here, 4096).decode("utf-8", "replace")
            except OSError:
                break
        assert text in seen, seen

    until("User:")
    os.write(here, b"Hellx\x7fo\r")
    shown = re.split(r"\s", greedy(checkpoint, "User: Hello\n\nAssistant:"))[0]
    until(shown)
    os.write(here, b"\x04")
    assert process.wait(60) == 0
    os.close(here)


def test_a_dialogue_says_what_it_would_in_one_piece(checkpoint):
    model = load_model(checkpoint, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="reference")
    dialogue = Dialogue(model, WorldTokenizer(), Sampling(seed := 1.0), 12, int(seed))
    pieces = list(dialogue.say("Hi"))
    assert "".join(pieces) == dialogue.messages[-1]["content"]
