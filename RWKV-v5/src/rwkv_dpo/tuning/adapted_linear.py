"""peft's LoRA layer over our Linear: peft makes, starts and merges its matrices; the forward pass keeps our memory.

Hu et al. 2021 (arXiv:2106.09685); DoRA: Liu et al. 2024 (arXiv:2402.09353).
"""

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from rwkv_dpo.model.linear import GIVEN, products

# peft's name for the only adapter of a model.
NAME = "default"


class AdaptedLinear(lora.Linear):
    """x @ W.T + scaling * (x @ A.T) @ B.T for prepared rows x, with A [r, in], B [out, r] fp32; DoRA scales each output.

    x is computed again in the backward pass for both products, so that the adapter keeps r values per token (DoRA: and its output);
    with dropout it keeps x.
    """

    def factors(self) -> tuple[Tensor | None, ...]:
        """As Linear's: the base's, then A, or with dropout the rows themselves."""
        base: tuple[Tensor | None, ...] = self.get_base_layer().factors()  # type: ignore[operator]  # a Linear
        if self.disable_adapters or self.merged:
            return base
        return (*base, None if self._drops() else self._weight("lora_A"))

    def combine(self, plain: Tensor, second: Tensor | None = None) -> Tensor:
        """What the base layer makes of its input, and what the adapter adds: [S, n_out]. second: rows times A, or rows to drop from."""
        if second is None:
            return plain
        b, is_dora, base, low = self._weight("lora_B").to(plain.dtype), NAME in self.lora_variant, plain, second
        if self._drops():
            x = self.lora_dropout[NAME](second)
            low = F.linear(x, self._weight("lora_A").to(x.dtype))
            if is_dora:  # peft's DoRA sees the input with dropout in the base's product too
                base = self.get_base_layer()(x)
        adapted = torch.addmm(base, low, b.T, alpha=self.scaling[NAME])
        if not is_dora:
            return adapted
        # In fp32: rounded to bf16, a scale near 1 would not show steps below 1/256.
        scaled = (self._dora_scale() * adapted).to(plain.dtype)
        return scaled if base is plain else plain - base + scaled

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no further arguments
        """Rows [S, n_in], which are kept for the backward pass; [S, n_out]."""
        return products(GIVEN, (x,), [self])[0][0]

    def _drops(self) -> bool:
        return self.training and not isinstance(self.lora_dropout[NAME], nn.Identity)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        """What peft makes the adapter in: what trains is fp32, also beside a base in bf16."""
        (weight,) = base_layer.factors()  # type: ignore[operator]  # a Linear
        # A matrix of fewer bits has no dtype.
        return weight.device, torch.promote_types(weight.dtype or torch.float32, torch.float32)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Peft's own looks at the weight, which would be made for that where it is held in fewer bits."""
        return module.in_features, module.out_features  # type: ignore[return-value]  # a Linear's

    def _weight(self, part: str) -> Tensor:
        # Not get_parameter, which insists on a Parameter: --chunk_ctx has plain tensors stand in for them.
        return getattr(self, part)[NAME].weight

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Of W + scaling * B A, which DoRA's magnitudes start from."""
        change = self.scaling[NAME] * self._weight("lora_B") @ self._weight("lora_A")
        (weight,) = self.get_base_layer().factors()  # type: ignore[operator]  # a Linear
        return torch.linalg.norm(weight.to(change.dtype) + change, dim=1)

    def _dora_scale(self) -> Tensor:
        # The norms count as constants in the gradient: section 4.3 of the paper.
        return self._weight("lora_magnitude_vector") / self.row_norms()
