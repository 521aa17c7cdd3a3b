"""What a run computes on."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, SWITCH, Part, flag


@dataclass(frozen=True)
class DeviceSettings:
    """Devices, processes and arithmetic."""

    TITLE: ClassVar[str] = "devices"

    accelerator: str = flag(
        "gpu", "where to train; auto: on a GPU if there is one", choices=("gpu", "cuda", "cpu", "auto"), part=Part.INCIDENTAL
    )
    devices: int = flag(
        1, "GPUs, or CPU processes, per node; auto: all GPUs, or one CPU process; 0,2: those GPUs", AT_LEAST_ONE,
        part=Part.LAYOUT,
    )  # fmt: skip
    gpu_ids: str = flag("", "which GPUs to use, like --devices 0,2; empty: the first ones", part=Part.INCIDENTAL)
    num_nodes: int = flag(1, "number of machines", AT_LEAST_ONE, part=Part.LAYOUT)
    strategy: str = flag(
        "auto", "how devices work together",
        choices=(
            "auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_2_offload",
            "deepspeed_stage_3_offload",
        ),
        part=Part.LAYOUT,
    )  # fmt: skip
    ds_bucket_mb: int = flag(
        200, "size of DeepSpeed's communication buckets, in millions of gradients (4 MB each, 2 in fp16), up to all trainable parameters",
        AT_LEAST_ONE, part=Part.LAYOUT,
    )  # fmt: skip
    precision: str = flag(
        "fp16", "precision of the arithmetic; fp16 and bf16 keep fp32 master weights", choices=("fp32", "tf32", "fp16", "bf16")
    )
    wkv_backend: str = flag(
        "auto", "implementation of the WKV recurrence", choices=("auto", "reference", "chunked", "cpu", "cuda"), part=Part.INCIDENTAL
    )
    cpu_malloc: int = flag(
        1, "1: a CPU run keeps freed memory for the next step (faster, up to half more memory); 0: returns it to the system", SWITCH,
        part=Part.INCIDENTAL,
    )  # fmt: skip

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.devices * self.num_nodes
