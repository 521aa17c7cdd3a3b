"""The processes of a run: on which devices, started by whom, and what Lightning refuses of it."""

import os

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.base.libraries import check_package
from rwkv_dpo.devices.ranks import Ranks
from rwkv_dpo.devices.settings import DeviceSettings
from rwkv_dpo.devices.strategy import build_precision, build_strategy


def check_devices(settings: DeviceSettings, device: torch.device) -> None:
    """Refuses GPUs that are not there, and a strategy whose package isn't."""
    if settings.strategy.startswith("deepspeed"):
        check_package("deepspeed", f"--strategy {settings.strategy}", "ddp needs nothing")
    if device.type != "cuda":
        if settings.gpu_ids:
            refuse(f"--devices {settings.gpu_ids} names GPUs, and this run is on a CPU; there a number of processes is accepted")
        return
    n = torch.cuda.device_count()
    if settings.devices > n:
        refuse(f"--devices {settings.devices}: this machine has {n}")
    beyond = [number for number in gpu_ids(settings) if number >= n]
    if beyond:
        refuse(f"--devices {settings.gpu_ids}: there is no GPU {beyond[0]}; 0 to {n - 1} are accepted")


def gpu_ids(settings: DeviceSettings) -> list[int]:
    """The numbers of the GPUs that were named, none when it was only said how many."""
    return [int(number) for number in settings.gpu_ids.split(",") if number]


def take_gpu(settings: DeviceSettings, device: torch.device, ranks: Ranks) -> None:
    """Makes this process's own GPU the current one before anything runs there, as Lightning will: kernels are tried on it, and the first
    GPU of a machine doesn't keep a context of every process."""
    if device.type == "cuda":
        torch.cuda.set_device((gpu_ids(settings) or range(settings.devices))[ranks.local_rank])


def build_lightning(
    settings: DeviceSettings, device: torch.device, micro_bsz: int = 1, n_trained: int | None = None, **others: object
) -> pl.Trainer:
    """Lightning's trainer on the run's processes, without anything else that it would bring along. What it refuses is told in a line.

    micro_bsz, n_trained: as build_strategy takes them. others: arguments of pl.Trainer.
    """
    try:
        return pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=gpu_ids(settings) or settings.devices,
            num_nodes=settings.num_nodes, strategy=build_strategy(settings, device, micro_bsz, n_trained),
            **build_precision(settings, device), logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **others,  # type: ignore[arg-type]  # as the caller has them
        )  # fmt: skip
    except InputError:
        raise
    except (MisconfigurationException, ImportError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{_flags(settings)}: Lightning doesn't start that: {reason}{_hint()}") from error


def meet(settings: DeviceSettings, device: torch.device) -> Ranks:
    """The run's processes, as Lightning finds them. Refuses another number of them than the flags say."""
    probe = build_lightning(settings, device)
    environment: ClusterEnvironment = probe._accelerator_connector.cluster_environment
    # Lightning's own environment starts processes by the flags.
    if not isinstance(environment, LightningEnvironment) and environment.world_size() != settings.world_size:
        refuse(
            f"{_flags(settings)}: that is {_count(settings.world_size)}, and {type(environment).__name__.removesuffix('Environment')} "
            f"has {environment.world_size()}{_hint()}"
        )
    return Ranks(environment, settings.num_nodes) if settings.world_size > 1 else Ranks()


def _flags(settings: DeviceSettings) -> str:
    return f"--devices {settings.gpu_ids or settings.devices} --num_nodes {settings.num_nodes} --strategy {settings.strategy}"


def _count(n: int) -> str:
    return f"{n} process{'es' if n > 1 else ''}"


def _hint() -> str:
    """For a job's shell, where Slurm's variables are and srun is not."""
    is_slurm = "SLURM_NTASKS" in os.environ
    return "; srun starts as many as Slurm has tasks, `unset SLURM_NTASKS` starts a run without Slurm" if is_slurm else ""
