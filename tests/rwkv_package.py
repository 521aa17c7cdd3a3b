"""The pip package `rwkv` as the oracle for logits."""

import functools
import importlib.util
import os

import torch
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.model.checkpoint import save_weights

# Two fp32 implementations with different orders of summation; the issue asks for 1e-4 on logits of order 1.
TOLERANCE = 1e-4


@functools.cache
def _package(is_v7):
    """The module rwkv.model, which becomes one for RWKV-7 or one for the others when it is imported."""
    os.environ["RWKV_JIT_ON"], os.environ["RWKV_CUDA_ON"], os.environ["RWKV_V7_ON"] = "0", "0", str(int(is_v7))
    spec = importlib.util.find_spec("rwkv.model")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_model(model, folder):
    weights = dict(model.state_dict())
    if model.shape.n_layer == 1 and model.shape.version != "7":
        # The package can't read a single layer, so it gets a second one that adds nothing to the residual stream.
        weights |= {
            n.replace("blocks.0", "blocks.1"): torch.zeros_like(w)
            for n, w in weights.items()
            if n.startswith("blocks.0") and "ln0" not in n
        }
    save_weights(weights, folder / "m.pth")
    if model.shape.version == "7":
        return _package(True).RWKV(model=str(folder / "m"), strategy="cpu fp32")
    return _package(False).RWKV(model=str(folder / "m"), strategy="cpu fp32", verbose=False)


def one_sequence(tokens):
    builder = ForestBuilder()
    builder.add(tokens)
    return builder.build()[0]
