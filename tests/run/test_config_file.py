"""--config: a file of flags."""

import json
import sys

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.run.flags import parse_flags
from rwkv_dpo.run_folder.identity import Identity


def parsed(*arguments):
    return parse_flags(list(map(str, arguments)))


TYPED = ("--dpo_train_file", "t.save", "--load_model", "m.pth", "--lr_init", "1e-5", "--dpo_loss", "sigmoid,sft", "--precision", "bf16",
         "--dpo_general_corpus_ratio", 0, "--enable_progress_bar", "False")  # fmt: skip
FORMS = {
    "run.yaml": "dpo_train_file: t.save\nload_model: m.pth\nlr_init: 1e-5  # a string to YAML 1.1\ndpo_loss: [sigmoid, sft]\n"
                "dpo_general_corpus_ratio: 0\nenable_progress_bar: no\nprecision: bf16\nwandb: null\n",
    "run.json": '{"dpo_train_file": "t.save", "load_model": "m.pth", "lr_init": 1e-5, "dpo_loss": ["sigmoid", "sft"],\n'
                '\t"dpo_general_corpus_ratio": 0, "enable_progress_bar": false, "precision": "bf16", "wandb": null}',
    "run.toml": 'dpo_train_file = "t.save"\nload_model = "m.pth"\nlr_init = 1e-5\ndpo_loss = ["sigmoid", "sft"]\n'
                'dpo_general_corpus_ratio = 0\nenable_progress_bar = false\nprecision = "bf16"\n',
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_file_says_what_its_flags_would(tmp_path, name):
    if name.endswith("toml") and sys.version_info < (3, 11):
        pytest.skip("needs tomllib")
    (tmp_path / name).write_text(FORMS[name])
    assert parsed("--config", tmp_path / name) == parsed(*TYPED)


def test_a_typed_flag_comes_first_wherever_it_stands_and_whatever_its_name(tmp_path):
    (tmp_path / "run.yaml").write_text(FORMS["run.yaml"])
    path = tmp_path / "run.yaml"
    for arguments in (("--lr_init", 3e-5, "--config", path), (f"--config={path}", "--learning_rate", 3e-5)):
        settings, given = parsed(*arguments)
        assert settings.optimizer.lr_init == 3e-5
        assert "dpo_loss" in given


def test_names_of_other_programs_are_taken_as_on_the_command_line(tmp_path):
    (tmp_path / "trl.yml").write_text("model_name_or_path: m.pth\nlearning_rate: 2.0e-5\nbeta: 0.3\ndpo_train_file: t.save\n")
    assert parsed("--config", tmp_path / "trl.yml", "--dpo_general_corpus_ratio", 0)[0].optimizer.lr_init == 2e-5


def test_config_json_of_a_run_stands_for_that_run(tmp_path):
    settings = parsed(*TYPED, "--proj_dir", "elsewhere")[0].with_flags(recipe="lora", peft="lora", warmup_steps=7)
    (tmp_path / "config.json").write_text(json.dumps(Identity(settings.as_flags(), {"load_model": "abc"}).as_json()))
    again, given = parsed("--config", tmp_path / "config.json")
    # Its values are in the file already.
    assert again.as_flags() == settings.as_flags() | {"recipe": ""}
    # Else a checkpoint of another shape would contradict it.
    assert "n_layer" not in given


@pytest.mark.parametrize(("name", "content", "fault"), [
    ("run.txt", "", r"run\.txt: accepted are \.yaml, \.yml, \.json, \.toml"),
    ("run.yaml", "lr_intt: 1", r"--config .*run\.yaml: --lr_intt: unknown flag; did you mean --lr_init\?"),
    ("run.yaml", "lr_init: fast", r"--config .*run\.yaml: argument --lr_init: invalid float value: 'fast'"),
    ("run.yaml", "- lr_init", "expected flags and their values, found list"),
    ("run.yaml", "", "expected flags and their values, found"),
    ("run.yaml", "lr_init: {a: 1}", "'lr_init' holds an object; expected a value"),
    ("run.yaml", "a: [", "not YAML: "),
    ("run.yaml", "!!python/object/apply:os.system [x]", "expected flags and their values, found list"),
    ("run.json", "{", "not JSON: "),
    ("run.json", "[" * 100_000, "not JSON: "),
    ("run.yaml", b"\xff", "not UTF-8"),
    ("no.yaml", None, "cannot be read: No such file"),
])  # fmt: skip
def test_faults_name_the_file(tmp_path, name, content, fault):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=fault) as caught:
        parsed("--config", tmp_path / name)
    assert "\n" not in str(caught.value)
