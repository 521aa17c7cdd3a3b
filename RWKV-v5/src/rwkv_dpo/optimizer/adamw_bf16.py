"""AdamW whose moments are kept in bf16, rounded stochastically: 4 bytes per parameter instead of 8.

A bf16 number moves in steps of 1/128 to 1/256 of itself. exp_avg_sq changes by (1 - beta2) * (g^2 - exp_avg_sq), with beta2 = 0.99 at
most a hundredth of it when it falls: rounded to the nearest, changes below half a step are lost and the mean stops where it is, up to
two fifths off, or anywhere with beta2 = 0.999. Rounded up or down at random, with the odds that make the expected value exact,
nothing is lost on average. Libraries round parameters so (torchao) or quantize moments in blocks (bitsandbytes), but none does this.

The arithmetic is fp32 and the parameters, whatever their type, get the update from the moments before these are rounded.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Numbers worked on together: few enough for a CPU's cache; on a GPU enough to fill it, at some 150 MB of temporaries.
CPU_CHUNK, CHUNK = 1 << 16, 1 << 22


class AdamWBF16(torch.optim.Optimizer):
    """State of a parameter: `step` (fp32, as torch's AdamW has it), `exp_avg` and `exp_avg_sq` (bf16).

    The random bits are a function of seed, step and the parameter's place alone: processes of a ddp run round alike, and a run
    that is resumed rounds as it would have.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # torch overloads it
        """As torch.optim has it: the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[torch.device, torch.Generator] = {}
        place = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is None:
                    continue
                if parameter.device not in generators:
                    generators[parameter.device] = torch.Generator(parameter.device)
                self._update(parameter, parameter.grad, group, place, generators[parameter.device])
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], place: int, generator: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        state["step"] += 1
        step = int(state["step"])
        generator.manual_seed(_number(self.seed, step, place))
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1**step)
        correction2 = (1 - beta2**step) ** 0.5
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        flat = (parameter.view(-1), gradient.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        size = CPU_CHUNK if parameter.device.type == "cpu" else CHUNK
        for weight, grad, exp_avg, exp_avg_sq in zip(*(x.split(size) for x in flat), strict=True):
            grad = grad.float()
            mean = exp_avg.float().lerp_(grad, 1 - beta1)
            mean_square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            bits = random_int16(2 * grad.numel(), generator)
            round_into(exp_avg, mean, bits[: grad.numel()])
            round_into(exp_avg_sq, mean_square, bits[grad.numel() :])
            root = mean_square.sqrt_().div_(correction2).add_(group["eps"])
            weight.addcdiv_(mean.to(weight.dtype), root.to(weight.dtype), value=-step_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch casts what it loads to the parameters' type; the moments go back to bf16, which loses nothing."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].bfloat16()


def random_int16(n: int, generator: torch.Generator) -> Tensor:
    """n int16, all values alike likely; drawn as 64 bits at a time, which is the fastest."""
    words = torch.empty(-(-n // 4), dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:n]


def round_into(target: Tensor, values: Tensor, bits: Tensor) -> None:
    """bf16 target [n] <- fp32 values [n], each rounded to one of its two neighbours, by odds of which the mean is the value.

    bits: int16 [n], uniform. A bf16 is the upper half of an fp32: a random number in 0..65535 is added to the lower half, which
    carries as often as the lower half is large, and the lower half is cut off. Numbers that bf16 has stay as they are.
    """
    lifted = values.view(torch.int32).add(bits).add_(1 << 15)
    target.view(torch.int16).copy_(lifted.bitwise_right_shift_(16))


def _number(*parts: int) -> int:
    """64 bits that depend on all of `parts`."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")
