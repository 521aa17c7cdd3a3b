"""A model on weights that are results of autograd: the slow twin of everything that puts its weights together."""

import torch
from rwkv_dpo.model.rwkv import RWKV
from torch import Tensor


class Materialised:
    """What objective() calls of a model, on `weights` by their official names."""

    grad_cp = is_lean = finds_collisions = False

    def __init__(self, plain: RWKV, weights: dict[str, Tensor]) -> None:
        self.plain, self.weights = plain, weights

    def __call__(self, forest):
        return torch.func.functional_call(self.plain, self.weights, (forest,))

    def head(self, *arguments, **options):
        return torch.func.functional_call(self.plain.head, {"weight": self.weights["head.weight"]}, arguments, options)
