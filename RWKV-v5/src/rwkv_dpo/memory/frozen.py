"""What the weights take that stay as they are: all the time, while they are loaded, and while a product reads them."""

from rwkv_dpo.model.quantized import FORMS
from rwkv_dpo.model.shape import ModelShape

# Forms of --quant. bitsandbytes makes them by way of fp32 and int32 copies, a few of which live at a time: their bytes, a number.
QUANTIZED = {"int8": 12.0, "nf4": 14.1}


def held_frozen(shape: ModelShape, n: int, n_projections: int, dtype_bytes: int, quant: str) -> float:
    """Bytes of n numbers, those in the blocks' projections among them. dtype_bytes: of a number; quant: the form of the projections, as
    --quant."""
    if quant == "none":
        return float(dtype_bytes * n)
    return dtype_bytes * (n - n_projections) + FORMS[quant].bytes_a_number(shape.n_embd) * n_projections


def in_a_product(shape: ModelShape, compute_bytes: int, quant: str) -> float:
    """Bytes of the largest projection in the compute dtype, which a product makes where it is held in fewer bits."""
    return float(compute_bytes * _largest(shape)) if quant != "none" else 0.0


def while_quantizing(shape: ModelShape, quant: str) -> float:
    """Bytes beside the matrices that are there already and the file that they come from, when the largest is made. On the CPU, where
    every model is loaded."""
    return QUANTIZED[quant] * _largest(shape) if quant != "none" else 0.0


def _largest(shape: ModelShape) -> int:
    return shape.n_embd * max(shape.dim_ffn, shape.dim_att)
