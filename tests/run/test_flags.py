"""The command line: the original's flags under their names and defaults, and clear words for anything else."""

import subprocess
import sys
from pathlib import Path

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import make_data
from rwkv_dpo.run.flags import NEUTRAL, build_parser, flag_table, parse_flags
from rwkv_dpo.run.settings import FLAGS, RunSettings

ROOT = Path(__file__).resolve().parents[2]

# The original's flags and defaults, as facts of its command line.
ORIGINAL: dict[str, object] = {
    "load_model": '', "wandb": '', "proj_dir": 'out', "random_seed": -1, "data_file": '', "data_type": 'utf-8', "vocab_size": 0,
    "ctx_len": 1024, "epoch_steps": 1000, "epoch_count": 500, "epoch_begin": 0, "epoch_save": 5, "micro_bsz": 12, "n_layer": 6,
    "n_embd": 512, "dim_att": 0, "dim_ffn": 0, "pre_ffn": 0, "head_qk": 0, "tiny_att_dim": 0, "tiny_att_layer": -999, "lr_init":
    0.0006, "lr_final": 1e-05, "warmup_steps": -1, "beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-08, "grad_cp": "0", "dropout": 0,
    "weight_decay": 0, "weight_decay_final": -1, "my_pile_version": 1, "my_pile_stage": 0, "my_pile_shift": -1, "my_pile_edecay": 0,
    "layerwise_lr": 1, "ds_bucket_mb": 200, "my_sample_len": 0, "my_ffn_shift": 1, "my_att_shift": 1, "head_size_a": 64,
    "head_size_divisor": 8, "my_pos_emb": 0, "load_partial": 0, "magic_prime": 0, "my_qa_mask": 0, "my_random_steps": 0, "my_testing":
    '', "my_exit": 99999999, "my_exit_tokens": 0, "dpo": 1, "dpo_train_file": 'trainset.save', "dpo_beta": 0.01,
    "dpo_general_corpus_ratio": 0, "accelerator": 'gpu', "strategy": 'auto', "devices": 1, "num_nodes": 1, "precision": 'fp16',
    "accumulate_grad_batches": 1, "enable_progress_bar": True,
}  # fmt: skip


def test_every_flag_of_the_original_is_here_with_its_default():
    ours = RunSettings().as_flags() | {name: accepted[0] for name, accepted in NEUTRAL.items()}
    assert {name: ours.get(name) for name in ORIGINAL} == ORIGINAL


def test_given_flags_are_told_from_defaults():
    settings, given = parse_flags(["--n_layer", "6", "--enable_progress_bar", "False", "--pre_ffn", "0"])
    assert settings.model.n_layer == 6
    assert settings.training.enable_progress_bar is False
    assert given == {"n_layer", "enable_progress_bar"}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--n_layers", "3"], r"--n_layers: unknown flag; did you mean --n_layer\?"),
    (["--n_l", "3"], "--n_l: unknown flag"),  # no silent abbreviations
    (["stray"], "'stray': not expected"),
    (["--head_qk", "256"], "--head_qk 256: that experiment"),
    (["--my_testing", "r3r4g"], "--my_testing 'r3r4g': accepted are"),
    (["--enable_progress_bar", "maybe"], "True and False are accepted"),
    (["--lr_init", "nan"], "--lr_init nan: 0 or more"),
    (["--beta1", "1"], "--beta1 1.0: 0 or more and below 1"),
    (["--n_layer"], "expected one argument"),
    (["--lr_init", "inf"], "--lr_init inf: a number between"),
    (["--dpo_beta", "inf"], "--dpo_beta inf: a number between"),
    (["--weight_decay_final", "nan"], "--weight_decay_final nan: a number between"),
    (["--lr_init", "1e-320"], "0 or a magnitude of at least"),
    (["--n_layer=--"], "--n_layer: expected one argument, found '--'"),
    (["--adam_eps", "-1"], "--adam_eps -1.0: 0 or more"),
    (["--epoch_count", "9" * 40], "--epoch_count 9{30}: a number between"),
])  # fmt: skip
def test_faults_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_flags(arguments)


def test_other_scripts_name_a_slip_of_the_fingers_too():
    with pytest.raises(InputError, match=r"--sed: unknown flag; did you mean --seed\?"):
        make_data.parse_flags(["text.txt", "--sed", "1"])
    with pytest.raises(InputError, match=r"--frobnicate: unknown flag \(--help lists them all\)"):
        make_data.parse_flags(["text.txt", "--frobnicate", "1"])


def test_help_shows_every_flag_and_needs_no_torch():
    code = "import sys; sys.argv = ['train.py', '--help']; import runpy\ntry: runpy.run_path(%r, run_name='__main__')\n"
    code = code % str(ROOT / "RWKV-v5" / "train.py") + "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    for name in FLAGS:
        assert f"--{name}" in done.stdout


def test_the_documentation_holds_the_flag_table():
    assert flag_table() in (ROOT / "docs" / "flags.md").read_text("utf-8"), "regenerate it: see CONTRIBUTING.md"


def test_the_parser_and_the_settings_have_the_same_names():
    options = {option[2:] for action in build_parser()._actions for option in action.option_strings if option.startswith("--")}
    assert options - {"help", "config"} == set(FLAGS) | set(NEUTRAL)


@pytest.mark.parametrize(("given", "devices", "gpu_ids"), [
    (["--devices", "3"], 3, ""), (["--devices", "[0,1]"], 2, "0,1"), (["--devices", "0,2"], 2, "0,2"), (["--devices", "3,"], 1, "3"),
    (["--gpu_ids", "1, 0"], 2, "1,0"), (["--devices", "2", "--gpu_ids", "4,5"], 2, "4,5"), (["--gpus", "0,1"], 2, "0,1"),
    (["--devices", "auto", "--accelerator", "cpu"], 1, ""), (["--devices", "auto", "--accelerator", "gpu"], 8, ""),
    (["--devices", "-1", "--accelerator", "auto"], 8, ""), ([], 1, ""),
], ids=str)  # fmt: skip
def test_devices_are_a_number_or_auto_or_the_numbers_of_gpus(monkeypatch, given, devices, gpu_ids):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    settings, _ = parse_flags([*given, "--data_type", "dummy"])
    assert (settings.devices.devices, settings.devices.gpu_ids) == (devices, gpu_ids)


@pytest.mark.parametrize("devices", ["two", "", "0,0", "0,x", "1.5", "-2", "9" * 5000, "0,,1", ","])
def test_other_devices_are_refused(devices):
    with pytest.raises(InputError, match=r"--devices .*: a number of devices, auto, or different numbers of GPUs such as 0,2 are accepted"):
        parse_flags([f"--devices={devices}"])


def test_as_many_devices_as_numbers_of_gpus():
    with pytest.raises(InputError, match=r"--devices 3 --gpu_ids 0,1: those are 2"):
        parse_flags(["--devices", "3", "--gpu_ids", "0,1"])
