"""blindtest.py as a user has it: from checkpoints, adapters and files of answers to votes, a result and pairs."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.blind import browser
from rwkv_dpo.blind.cards import read_cards, read_questions
from rwkv_dpo.blind.server import TOKEN_HEADER
from rwkv_dpo.commands import blindtest, chat, evaluate, prepare_pairs
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.tokenizer import VOCAB_SIZE, WorldTokenizer
from rwkv_dpo.evaluation import answering
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.tuning.settings import TuningSettings
from rwkv_dpo.tuning.tuning import begin_tuning

SCRIPT = Path(__file__).resolve().parents[1] / "RWKV-v5" / "blindtest.py"
SHAPE = ModelShape(n_layer=1, n_embd=16, dim_att=16, dim_ffn=32, vocab_size=VOCAB_SIZE, head_size=8)
QUESTIONS = [f"Question {i}?" for i in range(20)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """base.pth, tuned.pth, a LoRA adapter on base.pth, questions, unscored pairs."""
    folder = tmp_path_factory.mktemp("blindtest")
    for i, name in enumerate(("base", "tuned")):
        save_weights(random_model(SHAPE, torch.float32, seed=i).state_dict(), folder / f"{name}.pth")
    model = random_model(SHAPE, torch.float32)
    tuning = begin_tuning(model, TuningSettings(peft="lora", lora_r=4), frozenset())
    trained = {name: torch.full_like(value, 0.3) for name, value in model.named_parameters() if value.requires_grad}
    tuning.save(trained, folder, "final")
    (folder / "q.txt").write_text("\n".join(QUESTIONS))
    save_pairs(folder / "test.save", pack_pairs([([i + 1, 5], [2, i + 3], [3]) for i in range(9)], np.full((9, 2), -11.0)))
    return folder


@pytest.fixture
def answers(tmp_path):
    """Two files as chat.py writes them."""
    paths = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for name, path in zip(("one", "other"), paths, strict=True):
        rows = [{"prompt": prompt, "answers": [f"{name} on {prompt}"]} for prompt in QUESTIONS]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


SAMPLING = ("--device", "cpu", "--wkv_backend", "reference", "--max_tokens", 5, "--seed", 3)


def run(monkeypatch, *given, typed=("e",)):
    """The script, with lines typed at its terminal."""
    monkeypatch.setattr("sys.stdin", iter(f"{line}\n" for line in typed))
    blindtest.main(list(map(str, (*given, "--terminal", 1))))


def test_two_checkpoints_answer_as_chat_has_them_do(inputs, tmp_path, monkeypatch, capsys):
    given = ("--load_model", inputs / "base.pth", inputs / "tuned.pth", "--folder", tmp_path / "f", "--questions", inputs / "q.txt")
    run(monkeypatch, *given, *SAMPLING, "--system", "Be kind.", typed=("1", "2", "0", "u", "q"))
    cards = read_cards(tmp_path / "f")
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"answers.jsonl", "blindtest.json", "votes.jsonl"}
    for i, name in enumerate(("base", "tuned")):
        out = tmp_path / f"{name}.jsonl"
        chat.main(list(map(str, ("--load_model", inputs / f"{name}.pth", "--prompts", inputs / "q.txt", "--out", out,
                                 "--system", "Be kind.", *SAMPLING))))  # fmt: skip
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert {row["prompt"]: row["answers"] for row in rows} == {card.question.prompt: [card.answers[i]] for card in cards}
    assert capsys.readouterr().out.endswith("2 votes are kept; the same command continues where it was\n")

    # The same command continues, and no model is loaded for it.
    monkeypatch.setattr(answering, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    run(monkeypatch, *given, *SAMPLING, "--system", "Be kind.", typed=("b", "e"))
    result = json.loads((tmp_path / "f" / "result.json").read_text())
    assert result["judged"] == 3
    wins = [0, 0]
    for card, side in zip(cards, (0, 1, 1), strict=False):
        wins[card.sides[side]] += 1
    assert result["wins"] == wins
    assert result["models"] == [f"{inputs.name}/base.pth", f"{inputs.name}/tuned.pth"]
    told = capsys.readouterr().out
    run(monkeypatch, *given, *SAMPLING, "--system", "Be kind.", "--export", tmp_path / "pairs.jsonl", typed=())
    again = capsys.readouterr().out
    assert told.endswith(again.removesuffix(f"{tmp_path / 'pairs.jsonl'}: 3 pairs\n"))
    assert [json.loads(line)["system"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()] == ["Be kind."] * 3


def test_an_interrupted_run_draws_only_what_is_missing_and_ends_with_the_same_answers(inputs, tmp_path, monkeypatch):
    given = ("--load_model", inputs / "base.pth", inputs / "tuned.pth", "--questions", inputs / "q.txt", *SAMPLING, "--folder")
    run(monkeypatch, *given, tmp_path / "whole")
    drawn, draw = [], answering.answers

    def counted(model, tokenizer, prompts, *more):
        if len(drawn) == 3:
            drawn.append(0)
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return draw(model, tokenizer, prompts, *more)

    monkeypatch.setattr(answering, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *given, tmp_path / "f")
    assert not (tmp_path / "f" / "answers.jsonl").exists()
    run(monkeypatch, *given, tmp_path / "f")
    # Of each model 16 and 4: the fourth batch was lost, and drawn again.
    assert drawn == [16, 4, 16, 0, 4]
    assert read_cards(tmp_path / "f") == read_cards(tmp_path / "whole")


def test_an_adapter_is_judged_against_its_base_and_pairs_stand_beside(inputs, tmp_path, monkeypatch, capsys):
    given = ("--load_model", inputs / "base.pth", "--peft_load", inputs / "adapter-final", "--any_base", 1)
    own = (*given, *SAMPLING, "--auto", inputs / "test.save", "--folder", tmp_path / "f", "--max_tokens", 2)
    run(monkeypatch, *own)
    told = capsys.readouterr().out
    assert len(read_cards(tmp_path / "f")) == len(read_questions(None))
    assert any(card.is_asked for card in read_cards(tmp_path / "f"))
    result = json.loads((tmp_path / "f" / "result.json").read_text())
    assert result["models"][1].endswith("/adapter-final")
    evaluate.main(list(map(str, (*given, "--pairs", inputs / "test.save", "--device", "cpu", "--wkv_backend", "reference",
                                 "--out", tmp_path / "r.json"))))  # fmt: skip
    reports = json.loads((tmp_path / "r.json").read_text())
    for name in ("logps/accuracies", "logps/margins", "rewards/accuracies", "rewards/margins"):
        assert [report[name] for report in result["held_out"]] == [report[name] for report in reports]
    assert reports[0]["logps/margins"] != reports[1]["logps/margins"]
    assert f"{reports[1]['logps/margins']:+.2f}" in told
    # Kept: computed for other pairs alone.
    monkeypatch.setattr(answering, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    run(monkeypatch, *own)
    save_pairs(tmp_path / "other.save", load_pairs(inputs / "test.save").select([0, 1]))
    with pytest.raises(pytest.fail.Exception):
        run(monkeypatch, *own, "--auto", tmp_path / "other.save")


def test_votes_become_pairs_by_prepare_pairs(inputs, answers, tmp_path, monkeypatch, capsys):
    typed = ("1", "2", "0") * 6 + ("1", "2", "e")
    run(monkeypatch, "--answers", *answers, "--folder", tmp_path / "f", "--export", tmp_path / "p.jsonl", typed=typed)
    cards = read_cards(tmp_path / "f")
    better = {(card.question.prompt, card.side("A" if key == "1" else "B")) for card, key in zip(cards, typed, strict=False) if key != "0"}
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert {(row["prompt"], row["chosen"]) for row in rows} == better
    prepare_pairs.main(list(map(str, ("--source", tmp_path / "p.jsonl", "--load_model", inputs / "base.pth", "--out_dir", tmp_path / "o",
                                      "--templates", "chat", "--valid_ratio", 0, "--test_ratio", 0, "--device", "cpu"))))  # fmt: skip
    pairs, tokenizer = load_pairs(tmp_path / "o" / "trainset.save"), WorldTokenizer()
    texts = [[tokenizer.decode(part) for part in pairs.pair(i)] for i in range(len(pairs))]
    assert {(prompt.removeprefix("User: ").removesuffix("\n\nAssistant:"), chosen.strip()) for prompt, chosen, _ in texts} == better
    assert len(texts) == 14


def started(folder, answers, *more):
    """The script, its address."""
    command = [sys.executable, SCRIPT, "--answers", *answers, "--folder", folder, "--open_browser", "0", *more]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, process.stdout.readline().split(" ")[0]


async def vote(address, choices, process=None, kill_after=None):
    """Votes until the choices or the process end: the numbers of those that were acknowledged, and the last view."""
    done, view = [], None
    async with aiohttp.ClientSession() as session:
        async with session.get(address) as answer:
            token = (await answer.text()).split('name="token" content="')[1].split('"')[0]
        given = {"headers": {TOKEN_HEADER: token}}
        async with session.get(f"{address}api/view", **given) as answer:
            view = await answer.json()
        for choice in choices:
            if len(done) == kill_after:
                # The vote is under way when the kill comes: before, in, or after its line.
                asyncio.get_running_loop().call_later(random.Random(0).uniform(0, 0.002), process.kill)
            try:
                async with session.post(f"{address}api/vote", json={"number": view["number"], "choice": choice}, **given) as answer:
                    number, view = view["number"], await answer.json()
                    done.append(number)
            except aiohttp.ClientError:
                return done, None
        if view["phase"] == "judged":
            async with session.post(f"{address}api/end", json={}, **given) as answer:
                view = await answer.json()
    return done, view


@pytest.mark.slow
def test_a_kill_loses_no_vote_and_the_same_command_goes_on(answers, tmp_path):
    acknowledged: list[int] = []
    for kill_after in (3, 5):
        process, address = started(tmp_path / "f", answers, "--port", 0)
        done, _ = asyncio.run(vote(address, "A" * 20, process, kill_after))
        assert process.wait(60) == -signal.SIGKILL
        process.communicate()
        acknowledged += done
        path = tmp_path / "f" / "votes.jsonl"
        written = [json.loads(line)["question"] for line in path.read_bytes().split(b"\n")[:-1]]
        # Another may have been written, whose answer was lost.
        assert len(acknowledged) <= len(written)
        assert written == list(range(1, len(written) + 1))
        acknowledged = written
        with open(path, "ab") as file:
            file.write(b'{"question": 19, "cho')
    process, address = started(tmp_path / "f", answers, "--port", 0)
    done, view = asyncio.run(vote(address, "B" * (20 - len(acknowledged))))
    assert done == list(range(len(acknowledged) + 1, 21))
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert view["result"]["lines"][0] == "20 of 20 questions judged."
    assert "20 of 20 questions judged." in told
    assert json.loads((tmp_path / "f" / "result.json").read_text())["judged"] == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_voting_in_a_line_that_says_what_is_kept(answers, tmp_path, number):
    process, address = started(tmp_path / "f", answers, "--port", 0)
    done, _ = asyncio.run(vote(address, "A="))
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert told == (f"blindtest.py: stopped by {by}: answers and votes so far are kept; the same command continues where it was\n")
    assert done == [1, 2]
    assert len((tmp_path / "f" / "votes.jsonl").read_text().splitlines()) == 2


def test_a_pipe_votes_without_a_browser_or_pytorch(answers, tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError('PyTorch was imported')\n")
    command = [sys.executable, SCRIPT, "--answers", *answers, "--folder", tmp_path / "f", "--terminal", "1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    typed = b"1\n\xff\n2\ne\n"
    done = subprocess.run(list(map(str, command)), input=typed, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"2 of 20 questions judged." in done.stdout
    assert done.stderr == b""


def test_without_a_browser_it_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.delenv("BROWSER", raising=False)

    class Gone:
        def open(self, address):
            return False

    def none(using=None):
        raise browser.webbrowser.Error("could not locate runnable browser")

    for get in (none, Gone, lambda: browser.webbrowser.GenericBrowser("true")):
        monkeypatch.setattr(browser.webbrowser, "get", get)
        browser.open_browser("http://127.0.0.1:1/")
        assert capsys.readouterr().out == "no browser opens here; open the address yourself, or vote with --terminal 1\n"
    # One that the user names is taken, whatever it is.
    monkeypatch.setenv("BROWSER", "true")
    browser.open_browser("http://127.0.0.1:1/")
    assert capsys.readouterr().out == ""


def test_a_folder_of_another_test_is_refused(inputs, answers, tmp_path, monkeypatch):
    folder = ("--folder", tmp_path / "f")
    given = ("--load_model", inputs / "base.pth", inputs / "tuned.pth", "--questions", inputs / "q.txt", *SAMPLING, *folder)
    run(monkeypatch, *given)
    (tmp_path / "q.txt").write_text("Another?")
    for more, told in (
        (("--load_model", inputs / "tuned.pth", inputs / "base.pth"), "other models"),
        (("--questions", tmp_path / "q.txt"), "other questions"),
        (("--temperature", 0.5), "--temperature was 1.0"), (("--seed", 4), "--seed was 3"), (("--system", "x"), "--system was ''"),
        (("--precision", "bf16", "--top_p", 0.5), "--top_p was 0.7, --precision was 'fp32'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^--folder .*f: holds another test: {told}; another folder takes this one$"):
            run(monkeypatch, *given, *more)
    with pytest.raises(InputError, match="holds another test: other models"):
        run(monkeypatch, "--answers", *answers, *folder)
    # A model of another name and the same content is the same.
    (tmp_path / "renamed.pth").write_bytes((inputs / "base.pth").read_bytes())
    run(monkeypatch, *given, "--load_model", tmp_path / "renamed.pth", inputs / "tuned.pth")
    (tmp_path / "f" / "blindtest.json").write_text("[]")
    with pytest.raises(InputError, match=r"its blindtest\.json is none that blindtest\.py writes"):
        run(monkeypatch, *given)
    (tmp_path / "f" / "blindtest.json").unlink()
    with pytest.raises(InputError, match=r"holds answers\.jsonl, and no blindtest\.json"):
        run(monkeypatch, *given)


def test_faults_are_named(inputs, answers, tmp_path, monkeypatch):
    for name, size in (("small", 61), ("large", VOCAB_SIZE + 8)):
        save_weights(random_model(ModelShape(1, 16, 16, 32, size, head_size=8), torch.float32).state_dict(), tmp_path / f"{name}.pth")
    (tmp_path / "latin.txt").write_bytes("Né?".encode("cp1252"))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("")
    base, models = inputs / "base.pth", ("--load_model", inputs / "base.pth", inputs / "tuned.pth")
    for given, told in (
        ((), r"--load_model A\.pth B\.pth, .*, --answers A\.jsonl B\.jsonl"),
        (("--load_model", base), "--load_model: 1 checkpoints; accepted are 2, or 1 with --peft_load"),
        ((*models, base), "--load_model: 3 checkpoints; accepted are 2, or 1 with --peft_load"),
        ((*models, "--peft_load", inputs / "adapter-final"), "--load_model: 2 checkpoints; accepted are 1, the base of the adapter"),
        (("--load_model", base, base), "the same model twice"),
        (("--load_model", base, tmp_path / "small.pth"), r"small\.pth: text becomes tokens .*, 65536 of them; it has a vocabulary of 61"),
        (("--load_model", base, tmp_path / "large.pth"), r"vocabularies of different sizes: 65536 of .*base\.pth, 65544 of .*large\.pth"),
        (("--load_model", base, tmp_path / "none.pth"), r"none\.pth"),
        ((*models, "--questions", tmp_path / "latin.txt"), r"--questions .*latin\.txt: not UTF-8: .* at byte 1"),
        ((*models, "--questions", tmp_path / "empty.txt"), r"--questions .*empty\.txt: holds no prompt"),
        ((*models, "--auto", tmp_path / "none.save"), r"--auto .*none\.save: no such pair file"),
        ((*models, "--folder", tmp_path / "file" / "f"), "--folder .*: cannot be created: Not a directory"),
        (("--answers", *answers, "--auto", "x.save"), "--answers and --auto: the answers exist already"),
        (("--answers", *answers, "--temperature", 0), "--answers and --temperature: the answers exist already"),
        (("--answers", *answers, *models), "--answers and --load_model: the answers exist already"),
        (("--answers", answers[0], tmp_path / "none.jsonl"), r"--answers .*none\.jsonl: no such file"),
        (("--answers", answers[0], tmp_path), "--answers .*: a folder"),
        (("--answers", *answers, "--port", 70000), "--port 70000: 0 to 65535 is accepted"),
        ((*models, "--top_p", 2), "--top_p 2.0: 0 to 1 is accepted"),
        ((*models, "--batch_tokens", 0), "--batch_tokens 0: at least 1"),
    ):
        with pytest.raises(InputError, match=told) as refused:
            run(monkeypatch, "--folder", tmp_path / "f", *given)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "f").exists()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: another program has it"):
            blindtest.main(list(map(str, ("--answers", *answers, "--folder", tmp_path / "g", "--port", port))))
    assert not (tmp_path / "g").exists()


def test_a_folder_that_cannot_be_written_to_is_told_first(answers, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match=r"--folder .*f: cannot be written to$"):
        run(monkeypatch, "--answers", *answers, "--folder", tmp_path / "f")
