"""peft's LoRA layer over our Linear: peft makes, starts and merges its matrices; the forward pass keeps our memory.

Hu et al. 2021 (arXiv:2106.09685); DoRA: Liu et al. 2024 (arXiv:2402.09353).
"""

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from rwkv_dpo.model.linear import Prepare, product

# peft's name for the only adapter of a model.
NAME = "default"


class AdaptedLinear(lora.Linear):
    """x @ W.T + scaling * (x @ A.T) @ B.T for x = prepare(*inputs), with A [r, in], B [out, r] fp32; DoRA scales each output.

    x is made anew in the backward pass for both products, so that the adapter keeps r numbers a token (DoRA: and its output);
    with dropout it keeps x.
    """

    def forward(self, *inputs: Tensor, prepare: Prepare | None = None) -> Tensor:  # type: ignore[override]  # several inputs
        """What the base layer makes of the inputs, and what the adapter adds: [S, n_out]."""
        plain = self.get_base_layer()(*inputs, prepare=prepare)
        if self.disable_adapters or self.merged:
            return plain
        a, b = self._weight("lora_A"), self._weight("lora_B").to(plain.dtype)
        is_dora = NAME in self.lora_variant
        base = plain
        if self.training and not isinstance(self.lora_dropout[NAME], nn.Identity):
            x = self.lora_dropout[NAME](inputs[0] if prepare is None else prepare(*inputs))
            low = F.linear(x, a.to(x.dtype))
            if is_dora:  # peft's DoRA sees the input with dropout in the base's product too
                base = F.linear(x, self.get_parameter("base_layer.weight").to(x.dtype))
        else:
            low = product(a, *inputs, prepare=prepare)
        adapted = torch.addmm(base, low, b.T, alpha=self.scaling[NAME])
        if not is_dora:
            return adapted
        # In fp32: rounded to bf16, a scale near 1 would not show steps below 1/256.
        scaled = (self._dora_scale() * adapted).to(plain.dtype)
        return scaled if base is plain else plain - base + scaled

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        """What peft makes the adapter in: what trains is fp32, also beside a base in bf16."""
        weight = base_layer.get_parameter("weight")
        return weight.device, torch.promote_types(weight.dtype, torch.float32)

    def _weight(self, part: str) -> Tensor:
        # Not get_parameter, which insists on a Parameter: --chunk_ctx has plain tensors stand in for them.
        return getattr(self, part)[NAME].weight

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Of W + scaling * B A, which DoRA's magnitudes start from."""
        change = self.scaling[NAME] * self._weight("lora_B") @ self._weight("lora_A")
        return torch.linalg.norm(self.get_parameter("base_layer.weight") + change, dim=1)

    def _dora_scale(self) -> Tensor:
        # The norms count as constants in the gradient: section 4.3 of the paper.
        return self._weight("lora_magnitude_vector") / self.row_norms()
