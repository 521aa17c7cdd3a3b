"""Frozen matrices in 8 or 4 bits, by bitsandbytes, as QLoRA holds a base model (Dettmers et al. 2023, arXiv:2305.14314).

What is held so are the projections of the blocks, nine tenths of a model of billions. Embedding and head stay as they are: few products
read them, and a rounded head moves every log-probability. A product has the whole matrix in its own dtype, made for it and gone after it,
in the forward and in the backward pass: a run trains beside the very matrix that it computes with.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_dpo.base.libraries import bitsandbytes, check_package
from rwkv_dpo.model.linear import Linear

# Numbers that int8 brings back together, by way of two fp32 copies; on a CPU they fit its cache.
CHUNK, CPU_CHUNK = 1 << 22, 1 << 18
# Numbers, in nf4, that share a scale, and scales that share one of their own: QLoRA's.
BLOCK, SCALES_BLOCK = 64, 256


class QuantizedMatrix:
    """A matrix [n_out, n_in] in a weight's place: it takes values, and a product asks for it in its dtype."""

    # A weight's says whether a product can do with it as it is.
    dtype = None

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = torch.Size(shape)
        self.parts: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where it is; the CPU before it has values."""
        return next((part.device for part in self.parts.values()), torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        """All that it takes."""
        return sum(part.nbytes for part in self.parts.values())

    def move(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Puts its parts where `moved` puts a tensor. As bytes: scales stay fp32 where a model becomes fp16."""
        self.parts = {name: moved(part.view(torch.uint8)).view(part.dtype) for name, part in self.parts.items()}

    def copy_(self, values: Tensor) -> None:
        """Takes the nearest to these values [n_out, n_in] that it can hold. They count in fp32, whatever a product computes in."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> Tensor:
        """The matrix [n_out, n_in] in fp32, fp16 or bf16, on its device."""
        raise NotImplementedError

    @staticmethod
    def bytes_a_number(n_in: int) -> float:
        """Of a matrix with that many columns, scales included."""
        raise NotImplementedError


class Int8Matrix(QuantizedMatrix):
    """127 steps each way, of a size for each row."""

    @torch.no_grad()
    def copy_(self, values: Tensor) -> None:
        """See QuantizedMatrix."""
        codes, scales, _ = bitsandbytes("functional").int8_vectorwise_quant(values.float())
        self.parts = {"codes": codes, "scales": scales}

    @torch.no_grad()
    def to(self, dtype: torch.dtype) -> Tensor:
        """See QuantizedMatrix."""
        codes, scales, f = self.parts["codes"], self.parts["scales"], bitsandbytes("functional")
        whole = torch.empty(self.shape, dtype=dtype, device=codes.device)
        n = max((CPU_CHUNK if codes.device.type == "cpu" else CHUNK) // self.shape[1], 1)
        for rows, own, sizes in zip(whole.split(n), codes.split(n), scales.split(n), strict=True):
            rows.copy_(f.int8_vectorwise_dequant(own, sizes))
        return whole

    @staticmethod
    def bytes_a_number(n_in: int) -> float:
        """See QuantizedMatrix."""
        return 1 + 4 / n_in


class Nf4Matrix(QuantizedMatrix):
    """16 values, as normally distributed numbers want them, times a scale for each BLOCK of numbers; scales are 8-bit themselves."""

    @torch.no_grad()
    def copy_(self, values: Tensor) -> None:
        """See QuantizedMatrix."""
        codes, state = bitsandbytes("functional").quantize_4bit(values.float(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        of_scales = state.state2
        self.parts = {
            "codes": codes, "scales": state.absmax, "mean_scale": state.offset.view(1), "scales_of_scales": of_scales.absmax,
            "scale_table": of_scales.code.clone(),
        }  # fmt: skip

    @torch.no_grad()
    def to(self, dtype: torch.dtype) -> Tensor:
        """See QuantizedMatrix."""
        f, parts = bitsandbytes("functional"), self.parts
        of_scales = f.QuantState(parts["scales_of_scales"], code=parts["scale_table"], blocksize=SCALES_BLOCK, dtype=torch.float32)
        # On a CPU, bitsandbytes 0.50 reads the wrong scales where a block continues in the next row. In one row they follow each other.
        shape = self.shape if self.shape[1] % BLOCK == 0 else (self.shape.numel(),)
        state = f.QuantState(
            parts["scales"], shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=parts["mean_scale"], state2=of_scales
        )
        return f.dequantize_4bit(parts["codes"], state).view(self.shape)

    @staticmethod
    def bytes_a_number(n_in: int) -> float:
        """See QuantizedMatrix."""
        return 1 / 2 + (1 + 4 / SCALES_BLOCK) / BLOCK


FORMS: dict[str, type[QuantizedMatrix]] = {"int8": Int8Matrix, "nf4": Nf4Matrix}


class QuantizedLinear(Linear):
    """A Linear whose matrix does not train and is in a form of FORMS."""

    def __init__(self, form: str, n_in: int, n_out: int) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a weight
        self.in_features, self.out_features = n_in, n_out
        self.register_parameter("bias", None)
        self.matrix = FORMS[form]((n_out, n_in))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # peft reads it, to begin a DoRA
        """The matrix in fp32, made again each time."""
        return self.matrix.to(torch.float32)

    @property
    def qweight(self) -> Tensor:
        """Where peft looks for a layer's device first, many times over, before it asks for the weight."""
        return self.matrix.parts["codes"]

    def cast(self, dtype: torch.dtype) -> None:
        """Nothing is kept: see Cast."""

    def factors(self) -> tuple[Any, ...]:
        """As Linear's."""
        return (self.matrix,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """How a module moves to a device."""
        self.matrix.move(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What tells a model by its weights has to see these."""
        destination.update({f"{prefix}weight.{name}": part for name, part in self.matrix.parts.items()})


def quantize(model: nn.Module, form: str, but: Collection[str] = (), has_values: bool = True) -> None:
    """Holds the model's projections in a form of FORMS from here on, all but those whose weights' names are given; form "none" leaves all
    as they are. has_values: the model's weights are set; else they are taken in as they come, from `checkpoint.load_into`. Raises
    InputError without bitsandbytes."""
    if form == "none":
        return
    check_package("bitsandbytes", f"--quant {form}", "without it matrices are held in the compute dtype")
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear and f"{prefix}.{name}.weight" not in but:
                held = QuantizedLinear(form, child.in_features, child.out_features)
                if has_values:
                    held.matrix.copy_(child.weight.detach())
                setattr(parent, name, held)


def quantized(model: nn.Module) -> dict[str, QuantizedMatrix]:
    """The matrices that are held in fewer bits, by the names that their weights would have in the model."""
    return {f"{name}.weight": module.matrix for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
