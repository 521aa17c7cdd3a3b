"""--strategy and --precision in Lightning's terms, DeepSpeed on CPUs included."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from pytorch_lightning.plugins import DeepSpeedPrecision, MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy, Strategy
from typing_extensions import override

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.devices.settings import DeviceSettings


class ScaledFloat16(MixedPrecision):
    """Loss scaling without autocast: the model casts by itself, and keeps fp32 master weights."""

    @override
    def forward_context(self) -> AbstractContextManager:  # type: ignore[override]  # Lightning types the decorator it uses
        return nullcontext()


    @override
    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:  # type: ignore[override]
        # The parent leaves it to a fused optimizer to unscale, after gradients were clipped as if they were not scaled.
        assert self.scaler is not None
        loss = closure()
        self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return loss


class DeepSpeedAsBuilt(DeepSpeedPrecision):
    """DeepSpeed's precision without Lightning's conversions: the model has its types already, fp32 for what trains and the compute type
    for matrices that don't; micro-batches hold token ids and fp32 log-probabilities."""

    @override
    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return module

    @override
    def convert_input(self, data: Any) -> Any:
        return data


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed on CPU processes. Lightning's strategy insists on CUDA; DeepSpeed itself does not."""

    @override
    def setup_environment(self) -> None:
        # Past the CUDA check of the parent, what its own parent does.
        super(DeepSpeedStrategy, self).setup_environment()

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def bucket_numbers(settings: DeviceSettings, n_trained: int | None) -> int:
    """Gradients that DeepSpeed sends together, an even number: --ds_bucket_mb millions, and no more than there are. It allocates whole
    buckets, whatever goes in."""
    wanted = settings.ds_bucket_mb * 1_000_000
    return wanted if n_trained is None else min(wanted, n_trained + n_trained % 2)


def build_precision(settings: DeviceSettings, device: torch.device) -> dict[str, Any]:
    """fp32, tf32 and bf16 keep fp32 weights and gradients (the model computes in bf16 by itself); fp16 also scales the loss."""
    if settings.strategy.startswith("deepspeed"):
        return {"plugins": [DeepSpeedAsBuilt("16-mixed" if settings.precision == "fp16" else "32-true")]}
    if settings.precision == "fp16":
        return {"plugins": [ScaledFloat16("16-mixed", device.type)]}
    return {"precision": "32-true"}


def uses_ddp(settings: DeviceSettings) -> bool:
    """Whether DDP joins the processes."""
    return settings.strategy == "ddp" or (settings.strategy == "auto" and settings.world_size > 1)


def build_strategy(settings: DeviceSettings, device: torch.device, micro_bsz: int = 1, n_trained: int | None = None) -> str | Strategy:
    """--strategy as Lightning takes it. micro_bsz: samples in a micro-batch of one process, for DeepSpeed's own figures. n_trained: numbers
    that the run trains, where there is a model already."""
    if settings.strategy == "auto" and settings.world_size == 1:
        return "auto"
    if uses_ddp(settings):
        # Gradients live in the buckets that are sent, not beside them.
        return DDPStrategy(gradient_as_bucket_view=True)
    stage, _, offload = settings.strategy.removeprefix("deepspeed_stage_").partition("_")
    bucket = bucket_numbers(settings, n_trained)
    zero: dict[str, Any] = {
        "stage": int(stage), "logging_batch_size_per_gpu": micro_bsz,
        "offload_optimizer": bool(offload), "offload_parameters": bool(offload) and stage == "3",
        "allgather_bucket_size": bucket, "reduce_bucket_size": bucket,
        # One process sends nothing that could overlap, and would pay for a second bucket.
        "overlap_comm": settings.world_size > 1,
    }  # fmt: skip
    if device.type == "cuda":
        return without_timers(DeepSpeedStrategy(**zero))
    # DeepSpeed asks for its accelerator by this variable alone.
    os.environ["DS_ACCELERATOR"] = "cpu"
    if settings.precision == "fp16":
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            refuse(f"--precision fp16: DeepSpeed can't compute in it on this CPU; --strategy {settings.strategy} takes fp32 and bf16")
    return without_timers(CPUDeepSpeedStrategy(process_group_backend="gloo", **zero))


def without_timers(strategy: DeepSpeedStrategy) -> DeepSpeedStrategy:
    """DeepSpeed's throughput timer waits for the device in every micro-batch, for figures that this program doesn't show."""
    assert isinstance(strategy.config, dict)
    strategy.config["timers"] = {"throughput": {"enabled": False}}
    return strategy


@contextmanager
def accumulating(strategy: Strategy) -> Iterator[None]:
    """Within, backward passes are not the last of their optimizer step: nothing is exchanged that can wait."""
    if isinstance(strategy, DeepSpeedStrategy):
        strategy.deepspeed_engine.set_gradient_accumulation_boundary(False)
        yield
        strategy.deepspeed_engine.set_gradient_accumulation_boundary(True)
    elif isinstance(strategy, ParallelStrategy):
        with strategy.block_backward_sync():
            yield
    else:
        yield
