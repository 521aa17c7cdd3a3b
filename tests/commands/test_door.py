"""rwkv-dpo and the scripts of RWKV-v5/: two doors to the same commands."""

import importlib
import os
import signal
from pathlib import Path

import pytest
from rwkv_dpo.base.script import program
from rwkv_dpo.base.signals import SIGNALS, leave_signals
from rwkv_dpo.commands import door
from rwkv_dpo.commands.door import COMMANDS

SCRIPTS = Path(__file__).resolve().parents[2] / "RWKV-v5"


def test_every_script_is_a_door_to_a_command():
    assert {path.name for path in SCRIPTS.glob("*.py")} == {f"{command.module}.py" for command in COMMANDS.values()}
    for name, command in COMMANDS.items():
        script = SCRIPTS / f"{command.module}.py"
        assert os.access(script, os.X_OK)
        assert f'enter("{command.module}", sys.argv[1:])' in script.read_text()
        assert f"`rwkv-dpo {name}` is the same" in script.read_text()


@pytest.mark.parametrize(("typed", "named"), [
    (["./RWKV-v5/train.py", "--devices", "2"], "train.py"), (["/env/bin/rwkv-dpo", "train", "--devices", "2"], "rwkv-dpo train"),
    (["C:/env/Scripts/rwkv-dpo.exe", "chat"], "rwkv-dpo chat"), (["/env/rwkv_dpo/__main__.py", "data", "a.txt"], "rwkv-dpo data"),
    (["/other/__main__.py", "data"], "__main__.py"), (["rwkv-dpo"], "rwkv-dpo"),
], ids=str)  # fmt: skip
def test_a_program_is_called_by_what_was_typed(monkeypatch, typed, named):
    monkeypatch.setattr("sys.argv", typed)
    assert program() == named


def entered(monkeypatch, *arguments: str) -> int:
    """The status of rwkv-dpo with these arguments, in this process, whose signals stay as they were."""
    monkeypatch.setattr("sys.argv", ["rwkv-dpo", *arguments])
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as end:
            door.main()
    finally:
        leave_signals()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return end.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_to_type_here(monkeypatch, capsys, name):
    assert entered(monkeypatch, name, "--help") == 0
    said, script = capsys.readouterr().out, f"{COMMANDS[name].module}.py"
    assert said.startswith(f"usage: rwkv-dpo {name} [-h]")
    # Examples of the description begin their lines with it.
    examples = importlib.import_module(f"rwkv_dpo.commands.{COMMANDS[name].module}").__doc__.count("%(prog)s")
    lines = [line.strip() for line in said.splitlines()[1:]]
    assert len([line for line in lines if line.startswith(f"rwkv-dpo {name} ")]) == examples
    assert not [line for line in lines if line.startswith(script)]


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (["trian"], 2, "rwkv-dpo: argument COMMAND: invalid choice: 'trian' (choose from "),
    (["--devices", "2"], 2, "rwkv-dpo: "),
    (["train", "--devises", "2"], 2, "rwkv-dpo train: --devises: unknown flag; did you mean --devices?"),
    (["doctor", "cpu"], 2, "rwkv-dpo doctor: 'cpu': not expected"),
], ids=str)  # fmt: skip
def test_a_fault_is_a_line_by_the_name_of_its_command(monkeypatch, capsys, arguments, status, said):
    assert entered(monkeypatch, *arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_without_a_command_the_commands_are_listed(monkeypatch, capsys):
    assert entered(monkeypatch) == 0
    assert capsys.readouterr().out.startswith("usage: rwkv-dpo [-h] [--version] {train,prepare,data,")
