"""Inputs of every recurrence, and what a backend makes of them."""

import importlib
import math

import torch
from rwkv_dpo.kernels import wkv5, wkv6, wkv7

# In the order of the call, state0 aside; the first are rows of one type, those of FP32 come in fp32.
NAMES = {
    "5": ("r", "k", "v", "time_decay", "u"),
    "6": ("r", "k", "v", "log_w", "u"),
    "7": ("r", "k", "v", "a", "b", "log_w"),
}
FP32 = ("time_decay", "log_w", "u", "state0")
PACKAGES = {"5": wkv5, "6": wkv6, "7": wkv7}


def backend(version: str, name: str):
    """(the recurrence, why it can't be used on its device or None, that device)."""
    module = importlib.import_module(f"rwkv_dpo.kernels.wkv{version}.{name}")
    device = torch.device("cuda" if name == "cuda" else "cpu")
    return getattr(module, f"wkv{version}"), module.unusable_because(device), device


def reference(version: str):
    return backend(version, "reference")[0]


class Case:
    """Random inputs and output gradients, exact in `dtype`, for packed sequences of the given lengths.

    decays: log(-log w) lies between these, by head where there are several pairs of them; None: as the version's models have them."""

    def __init__(self, version, lengths, n_heads, head_size, decays=None, dtype=torch.float32):
        random = torch.Generator().manual_seed(sum(lengths) + 1000 * head_size)
        rows, state = (sum(lengths), n_heads, head_size), (len(lengths), n_heads, head_size, head_size)

        def normal(*shape):
            return torch.randn(shape, generator=random)

        # Of version 7: sigmoid(-9 .. 9) * exp(-0.5), up to the fastest decay that there is.
        low, high = torch.as_tensor(decays or ((-9.5, -0.5) if version == "7" else (-9.0, 2.0))).unbind(-1)
        uniform = torch.rand(rows[1:] if version == "5" else rows, generator=random)
        decay = low.view(-1, 1) + (high - low).view(-1, 1) * uniform
        values = {"r": normal(*rows), "k": normal(*rows), "v": normal(*rows)}
        values |= {"time_decay": decay, "log_w": -decay.exp(), "u": normal(n_heads, head_size), "state0": normal(*state)}
        values["a"] = -torch.nn.functional.normalize(normal(*rows), dim=-1)
        values["b"] = -values["a"] * torch.rand(rows, generator=random)
        self.version, self.dtype = version, dtype
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.inputs = {name: values[name] if name in FP32 else values[name].to(dtype) for name in (*NAMES[version], "state0")}
        self.gy, self.g_state_end = normal(*rows).to(dtype), normal(*state)

    @property
    def arguments(self):
        return [self.inputs[name] for name in NAMES[self.version]]

    def run(self, wkv=None, device="cpu", exact=False, use=("y", "state_end"), with_state0=True):
        """y, state_end and the gradients of all inputs, in float64 on the CPU; `exact` computes in float64, by the loop."""
        wkv = wkv or reference(self.version)

        def to(x):
            return x.to(device, torch.float64 if exact else x.dtype)

        inputs = {name: to(x).requires_grad_() for name, x in self.inputs.items() if with_state0 or name != "state0"}
        y, state_end = wkv(*(inputs[name] for name in NAMES[self.version]), self.cu_seqlens, inputs.get("state0"))
        outputs = {"y": (y, to(self.gy)), "state_end": (state_end, to(self.g_state_end))}
        used, gradients = zip(*(outputs[name] for name in use), strict=True)
        found = torch.autograd.grad(used, list(inputs.values()), gradients, allow_unused=True)
        values = {"y": y, "state_end": state_end}
        values |= {f"gradient of {n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), found, strict=True)}
        return {name: x.detach().cpu().double() for name, x in values.items()}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error = (found[name] - x).norm() / x.norm().clamp(min=1e-300)
        assert found[name].shape == x.shape
        # Written so that NaN fails.
        assert error <= tolerance, f"{name}: relative L2 error {error:.1e}"


# Decays of 7 end at exp(-0.5).
FASTEST = -math.exp(-0.5)
