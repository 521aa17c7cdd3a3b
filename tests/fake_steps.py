"""Steps of train.py over fake CUDA tensors, which have a device and a shape and no numbers: where a step would wait for the GPU, and
where tensors of two devices meet, in every combination of the flags that change what a step computes.

    python tests/fake_steps.py FOLDER       FOLDER takes inputs and what is compiled; prints JSON: by flags, the places found

A place is "file:line: what". torch's CPU build does, with fake_cuda.cpp beside it; nothing is launched, so that the recurrence is a
stand-in of the right shapes. tests/test_fake_steps.py says which places are accepted.
"""

import ctypes
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(importlib.util.find_spec("torch").origin or "").parent
CSRC = Path(__file__).with_name("fake_cuda.cpp")


def pretend_cuda(folder: Path) -> None:
    """To be called before torch is imported, which looks for a GPU once."""
    if (TORCH / "lib" / "libtorch_cuda.so").exists():
        return
    library = folder / "fake_cuda.so"
    flags = ("-std=c++20", "-O0", "-fPIC", "-shared", "-w", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu")
    subprocess.run(["c++", str(CSRC), "-o", str(library), *flags], check=True)
    ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


if __name__ == "__main__":
    pretend_cuda(Path(sys.argv[1]))
sys.path[:0] = [str(ROOT / "RWKV-v5"), str(ROOT / "RWKV-v5/src"), str(ROOT / "tests")]

import runs  # noqa: E402 (the path above holds it)
import torch  # noqa: E402 (after pretend_cuda)
from rwkv_dpo.batches.micro_batch import MicroBatch  # noqa: E402 (as above)
from rwkv_dpo.kernels import fused  # noqa: E402 (as above)
from rwkv_dpo.model.quantized import quantized  # noqa: E402 (as above)
from rwkv_dpo.objective import chunked_step  # noqa: E402 (as above)
from rwkv_dpo.objective.losses import LOSSES, mixture_of  # noqa: E402 (as above)
from rwkv_dpo.run import trainer  # noqa: E402 (as above)
from rwkv_dpo.run.data import open_data  # noqa: E402 (as above)
from rwkv_dpo.run.flags import parse_flags  # noqa: E402 (as above)
from rwkv_dpo.run.model import build_model, resolve_shape  # noqa: E402 (as above)
from rwkv_dpo.training.module import DPOModule  # noqa: E402 (as above)
from rwkv_dpo.tuning.tuning import begin_tuning  # noqa: E402 (as above)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402 (as above)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402 (as above)
from torch.utils._pytree import tree_leaves  # noqa: E402 (as above)

GPU = torch.device("cuda:0")
MEMORY: tuple[dict[str, Any], ...] = tuple({"grad_cp": name} for name in ("0", "selective", "1"))
CHUNKS: tuple[dict[str, Any], ...] = ({}, {"chunk_ctx": 16}, {"chunk_ctx": 16, "tbptt": 1})
# tf32 is fp32 to all but the matrix products; PiSSA and rsLoRA are LoRA that starts elsewhere.
ARITHMETIC: tuple[dict[str, Any], ...] = (
    *({"precision": name} for name in ("fp32", "fp16", "bf16")),
    *({"precision": "bf16", "peft": name} for name in ("lora", "dora", "state")),
)
# What changes the loss alone, and --quant, each in its own step.
OBJECTIVES: tuple[dict[str, Any], ...] = (
    *({"dpo_loss": name} for name in LOSSES if name != "exo_pair"), {"dpo_loss": "exo_pair", "dpo_label_smoothing": 0.001},
    *({"dpo_f_divergence": name} for name in ("forward_kl", "js", "alpha")),
    {"dpo_wpo": 1}, {"dpo_ref": "recompute", "dpo_ld_alpha": 0.5}, {"dpo_general_corpus_ratio": 0}, {"dpo_general_corpus_ratio": 1},
    {"dpo": 0}, {"dropout": 0.1}, {"dpo_wpo": 1, "chunk_ctx": 16},
    {"peft": "lora", "quant": "nf4", "chunk_ctx": 16}, {"peft": "dora", "quant": "int8", "grad_cp": "1"},
)  # fmt: skip

aten = torch.ops.aten
# What hands numbers, or a shape that depends on numbers, to the host.
READS = {aten._local_scalar_dense, aten.nonzero, aten.item, aten.is_nonzero, aten.equal, aten.masked_select, aten._unique2,
         aten.unique_dim, aten.unique_consecutive, aten.bincount}  # fmt: skip
MASKED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}


class Watch(TorchDispatchMode):
    """Collects the places at which a step would wait for the device, or fail on it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.is_transfer = False  # while a micro-batch is on its way to the device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if fault := self.fault_of(function, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)], kwargs):
            self.places.add(f"{place()}: {fault}")
        return function(*args, **kwargs)

    def fault_of(self, function: Any, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> str:
        """In a few words; "" when the device goes on by itself."""
        packet, on_gpu = function.overloadpacket, [x for x in tensors if x.device.type == "cuda"]
        to = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu")).type
        if packet is aten._to_copy or packet is aten.copy_:
            source = tensors[-1].device.type
            if source == "cpu" and to == "cuda" and not self.is_transfer:
                return f"{packet}: copies from the host"
            return f"{packet}: copies to the host" if source == "cuda" and to == "cpu" else ""
        if not on_gpu:
            return ""
        if packet in READS or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
            return f"{packet}: hands numbers to the host"
        if packet in MASKED and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:]):
            return f"{packet}: takes a mask"
        # A kernel of these takes a number of the host as an argument.
        takes_numbers = torch.Tag.pointwise in function.tags or packet is aten.fill_
        hosts = [x for x in tensors if x.device.type == "cpu" and not (x.dim() == 0 and takes_numbers)]
        return f"{packet}: takes a tensor of the host" if hosts else ""


def place() -> str:
    """Where in the package this was asked for; what autograd's own backward passes ask for has no line."""
    own = [frame for frame in traceback.extract_stack() if "rwkv_dpo" in frame.filename]
    return f"{Path(own[-1].filename).relative_to(ROOT / 'RWKV-v5/src/rwkv_dpo')}:{own[-1].lineno}" if own else "autograd"


class ShapesOfWkv(torch.autograd.Function):
    """What a recurrence returns, by its shape. It neither reads nor lays out cu_seqlens, as one that finds its layout in the batch."""

    @staticmethod
    def forward(ctx, r, k, v, time_decay, u, n_sequences, state0):
        ctx.save_for_backward(r, k, v, time_decay, u, state0)
        return torch.empty_like(r), r.new_empty(n_sequences, r.shape[1], r.shape[2], r.shape[2], dtype=torch.float32)

    @staticmethod
    def backward(ctx, gy, g_state):
        r, k, v, time_decay, u, state0 = (None if x is None else torch.empty_like(x) for x in ctx.saved_tensors)
        return r, k, v, time_decay, u, None, state0


def wkv(r, k, v, time_decay, u, cu_seqlens, state0=None):
    return ShapesOfWkv.apply(r, k, v, time_decay, u, cu_seqlens.numel() - 1, state0)


def combinations() -> Iterator[dict[str, Any]]:
    for parts in itertools.product(ARITHMETIC, MEMORY, CHUNKS):
        yield {name: value for part in parts for name, value in part.items()}
    for changes in OBJECTIVES:
        yield {"precision": "bf16", **changes}


def step_of(flags: list[str]) -> tuple[DPOModule, MicroBatch]:
    """What train.py would train, and its first micro-batch, on the CPU."""
    settings, given = parse_flags(flags)
    shape, weights = resolve_shape(settings, given)
    data = open_data(settings, shape.vocab_size)
    model = build_model(settings, shape, weights, torch.device("cpu"))
    begin_tuning(model, settings.tuning, given)
    model.wkv = wkv
    module = DPOModule(model, mixture_of(settings.objective), settings.objective.ratio, settings.schedule, 0, lambda _: None)
    return module, trainer.loader_of(settings, data, 0, on_gpu=True).dataset[0]


def places_of(flags: list[str]) -> list[str]:
    """Of a step: the way of the micro-batch to the device, forward and backward pass."""
    module, batch = step_of(flags)
    module.train()
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        watch.is_transfer = True
        for part in module.model.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = torch.nn.Parameter(torch.empty_like(p, device=GPU), p.requires_grad)
        for matrix in quantized(module.model).values():
            matrix.move(lambda x: torch.empty_like(x, device=GPU))
        batch = module.transfer_batch_to_device(batch, GPU, 0)
        watch.is_transfer = False
        loss = module.training_step(batch, 0)
        loss.backward()
        assert all(p.grad is None or p.grad.device == GPU for p in module.model.parameters())
        assert any(p.grad is not None for p in module.model.parameters())
    return sorted(watch.places)


def main(folder: Path) -> None:
    # Which are those of a GPU, where a CPU has none. They are on the host, and no step waits for them.
    chunked_step._random_state = lambda model: {}  # type: ignore[assignment]
    chunked_step._drawing_again = lambda model, state: nullcontext()  # type: ignore[assignment]
    fused._of_device = lambda device: fused.plain
    if not (folder / "valid.save").exists():
        runs.write_inputs(folder, runs.TINY, 8)
    found = {}
    for changes in combinations():
        name = " ".join(f"{flag} {value}" for flag, value in changes.items())
        flags = runs.flags(folder, folder / "out", ctx_len=24, micro_bsz=1, wkv_backend="reference", **changes)
        try:
            found[name] = places_of(flags)
        except Exception:
            found[name] = ["failed: " + traceback.format_exc()]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # A thread that torch has begun for a device that isn't there has, once, aborted the interpreter's end.
    sys.stdout.flush()
    os._exit(0)
