"""Log-probabilities of given tokens straight from hidden rows and the head's weight, without a [rows, vocabulary] tensor in fp32.

The head is the widest matrix of the model: at 65,536 tokens of vocabulary, 1,024 rows of logits are 268 MB in fp32, and a
plain log_softmax keeps two more of the kind. Here the rows go through in chunks, and within a chunk the softmax works on a
tile small enough for the cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A matrix product over this many rows runs at full speed.
CHUNK_ROWS = 1024
# Up to this many bytes the forward keeps its logits (in the compute dtype) for the backward; rows beyond are computed again,
# which costs a fourth matrix product on top of three.
KEEP_BYTES = 512 << 20
# Rows of one softmax tile: on a CPU 16 rows of 65,536 fp32 logits are 4 MB, which stay in the cache between passes; on an
# accelerator it takes more to fill the chip.
CPU_TILE_ROWS, TILE_ROWS = 16, 256


class LogProbs(NamedTuple):
    logps: Tensor  # fp32 [R], log-probability of each row's target
    max_logits: Tensor  # fp32 [R], each row's largest logit


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int = CHUNK_ROWS, keep_bytes: int = KEEP_BYTES
) -> LogProbs:
    """log_softmax(hidden @ weight.T)[targets], and the rows' largest logits.

    hidden [R, C] in the compute dtype; weight [V, C], used in the dtype of hidden; targets int64 [R]. Softmax and results are
    fp32 (float64 for float64 inputs). Differentiable in hidden and weight through both results.
    """
    return LogProbs(*_LinearLogProbs.apply(hidden, weight, targets, chunk_rows, keep_bytes))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_rows, keep_bytes):
        n_rows = hidden.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps, max_logits, log_sums = (torch.empty(n_rows, dtype=wide, device=hidden.device) for _ in range(3))
        compute_weight = weight.to(hidden.dtype)
        needs_backward = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kept, n_kept_bytes = [], 0
        for rows in _slices(0, n_rows, chunk_rows):
            logits = hidden[rows] @ compute_weight.T
            for tile in _tiles(rows, hidden.device):
                x = logits[tile.start - rows.start : tile.stop - rows.start].to(wide)
                max_logits[tile] = x.amax(dim=1)
                logps[tile] = x.gather(1, targets[tile, None]).squeeze(1)
                log_sums[tile] = (x - max_logits[tile, None]).exp_().sum(dim=1).log_() + max_logits[tile]
            n_kept_bytes += logits.nbytes
            kept.append(logits if needs_backward and n_kept_bytes <= keep_bytes else None)
            del logits
        logps -= log_sums
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.kept, ctx.chunk_rows = kept, chunk_rows
        ctx.set_materialize_grads(False)
        return logps, max_logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_max_logits):
        hidden, weight, targets, log_sums = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros_like(log_sums)
        if grad_max_logits is None:
            grad_max_logits = torch.zeros_like(log_sums)
        compute_weight = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for rows, logits in zip(_slices(0, hidden.shape[0], ctx.chunk_rows), ctx.kept, strict=True):
            if logits is None:
                logits = hidden[rows] @ compute_weight.T
            for tile in _tiles(rows, hidden.device):
                part = logits[tile.start - rows.start : tile.stop - rows.start]
                part.copy_(_grad_logits(part, targets[tile], log_sums[tile], grad_logps[tile], grad_max_logits[tile]))
            if grad_hidden is not None:
                torch.mm(logits, compute_weight, out=grad_hidden[rows])
            if ctx.needs_input_grad[1]:
                product = logits.T @ hidden[rows]
                # Several chunks add up in the weight's own dtype: fp32 master weights get an fp32 sum.
                grad_weight = product.to(weight.dtype) if grad_weight is None else grad_weight.add_(product)
            del logits
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        ctx.kept = None
        return grad_hidden, grad_weight, None, None, None


def _grad_logits(logits: Tensor, targets: Tensor, log_sums: Tensor, grad_logps: Tensor, grad_max_logits: Tensor) -> Tensor:
    """d(loss)/d(logits) of one tile: grad_logps * (onehot(target) - softmax), plus grad_max_logits at the largest logit."""
    x = logits.to(log_sums.dtype)
    # Only corpus rows pull at their largest logit. Looking costs nothing on a CPU; elsewhere it would wait for the device.
    pulls = logits.device.type != "cpu" or bool(grad_max_logits.any())
    largest = x.argmax(dim=1, keepdim=True) if pulls else None
    grad = x.sub_(log_sums[:, None]).exp_().mul_(-grad_logps[:, None])
    grad.scatter_add_(1, targets[:, None], grad_logps[:, None])
    if largest is not None:
        grad.scatter_add_(1, largest, grad_max_logits[:, None])
    return grad


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _tiles(rows: slice, device: torch.device) -> list[slice]:
    return _slices(rows.start, rows.stop, CPU_TILE_ROWS if device.type == "cpu" else TILE_ROWS)
