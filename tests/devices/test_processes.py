"""On which devices a run is, who started its processes, and what Lightning refuses of it, told in a line."""

import pytest
import torch
from lives import free_port
from runs import flags
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.devices import processes
from rwkv_dpo.devices.settings import DeviceSettings

JOB = {"SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(("variables", "changes", "message"), [
    ({"SLURM_NTASKS": "4"}, {}, r"--devices 1 .*ntasks-per-node.*; srun starts as many as Slurm has tasks, `unset SLURM_NTASKS`"),
    ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", **JOB}, {}, r"that is 1 process, and SLURM has 4; srun .*unset SLURM_NTASKS"),
    ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", **JOB}, {"devices": 2}, r"--devices 2 .* that is 2 processes, and SLURM has 4"),
], ids=str)  # fmt: skip
def test_tasks_of_slurm_that_the_flags_do_not_count_are_a_line(data, tmp_path, monkeypatch, variables, changes, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as error:
        train.main(flags(data, tmp_path / "out", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_more_processes_of_torchrun_than_the_flags_say_are_a_line(data, tmp_path, monkeypatch):
    """Each would be a run of its own."""
    for name, value in {"WORLD_SIZE": 4, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": 1,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="--devices 1 --num_nodes 1 --strategy auto: that is 1 process, and TorchElastic has 4"):
        train.main(flags(data, tmp_path / "out"))


def test_a_package_that_a_strategy_lacks_is_a_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr("pytorch_lightning.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    with pytest.raises(InputError, match=r"--strategy deepspeed_stage_2: Lightning doesn't start that: .*DeepSpeed"):
        train.main(flags(data, tmp_path / "out", strategy="deepspeed_stage_2"))


def test_gpus_that_are_not_there_or_on_a_cpu_are_refused(data, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--devices 0,1 names GPUs, and this run is on a CPU"):
        train.main(flags(data, tmp_path / "out", devices="0,1"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    cuda = torch.device("cuda")
    processes.check_devices(DeviceSettings(devices=2, gpu_ids="0,1"), cuda)
    with pytest.raises(InputError, match="--devices 0,2: there is no GPU 2; 0 to 1 are accepted"):
        processes.check_devices(DeviceSettings(devices=2, gpu_ids="0,2"), cuda)
    with pytest.raises(InputError, match="--devices 3: this machine has 2"):
        processes.check_devices(DeviceSettings(devices=3), cuda)


@pytest.mark.parametrize(("settings", "given"), [
    (DeviceSettings(devices=2, gpu_ids="1,3", precision="bf16"), [1, 3]), (DeviceSettings(devices=2, precision="bf16"), 2),
])  # fmt: skip
def test_lightning_gets_the_named_gpus(monkeypatch, settings, given):
    """Lightning itself is not asked: it looks for the GPUs."""
    got = {}
    monkeypatch.setattr("pytorch_lightning.Trainer", lambda **arguments: got.update(arguments))
    processes.build_lightning(settings, torch.device("cuda"))
    assert (got["accelerator"], got["devices"]) == ("gpu", given)
