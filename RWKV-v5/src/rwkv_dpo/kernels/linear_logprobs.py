"""Log-probabilities of given tokens straight from hidden rows and the head's weight, without a [rows, vocabulary] tensor in fp32.

The head is the widest matrix of the model: at 65,536 tokens of vocabulary, 1,024 rows of logits are 268 MB in fp32, and a
plain log_softmax keeps two more of the kind. Here the rows go through in chunks, and within a chunk the softmax works on a
tile small enough for the cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows computed together: each further chunk costs a pass over the gradient of the whole weight.
CHUNK_ROWS = 2048
# Up to this many bytes the forward keeps its chunks (in the compute dtype) for the backward; chunks beyond are computed again,
# which costs a fourth matrix product on top of three.
KEEP_BYTES = 512 << 20
# Where memory matters more than time.
LEAN = {"chunk_rows": 256, "keep_bytes": 0}
# Tokens of the vocabulary whose weights' gradients are computed together.
GRADIENT_COLUMNS = 8192
# Rows of one softmax tile: on a CPU 16 rows of 65,536 fp32 logits are 4 MB, which stay in the cache between passes; on an
# accelerator it takes more to fill the chip.
CPU_TILE_ROWS, TILE_ROWS = 16, 256


class LogProbs(NamedTuple):
    """What the head gives for the rows of a step."""

    logps: Tensor  # fp32 [R], log-probability of each row's target
    max_logits: Tensor  # fp32 [R], each row's largest logit


class LogProbsAndCollisions(NamedTuple):
    """The same where collisions are asked for."""

    logps: Tensor
    max_logits: Tensor
    collisions: Tensor  # fp32 [R], log of the sum of each row's squared probabilities, without a gradient


Scores = LogProbs | LogProbsAndCollisions


def scores_of(parts: Sequence[Tensor]) -> Scores:
    """By their number."""
    return LogProbs(*parts) if len(parts) == 2 else LogProbsAndCollisions(*parts)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int = CHUNK_ROWS, keep_bytes: int = KEEP_BYTES,
    collisions: bool = False, cast: Tensor | None = None,
) -> Scores:  # fmt: skip
    """log_softmax(hidden @ weight.T)[targets], the rows' largest logits, and, where asked for, collisions.

    hidden [R, C] in the compute dtype; weight [V, C], used in the dtype of hidden; targets int64 [R]. Softmax and results are
    fp32 (float64 for float64 inputs). Differentiable in hidden and weight through the first two results. cast: the weight in the
    dtype of hidden, where the caller has it.
    """
    return scores_of(_LinearLogProbs.apply(hidden, weight, targets, chunk_rows, keep_bytes, collisions, cast))


class _LinearLogProbs(torch.autograd.Function):
    """Logits of a chunk become exp(logit - row's largest) in place, which is all that the backward needs of them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_rows, keep_bytes, collisions, cast):
        n_rows = hidden.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps, max_logits, sums = (torch.empty(n_rows, dtype=wide, device=hidden.device) for _ in range(3))
        norms = torch.empty_like(sums) if collisions else None
        compute_weight = weight.to(hidden.dtype) if cast is None else cast
        needs_backward = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kept, n_kept_bytes = [], 0
        for rows in _slices(0, n_rows, chunk_rows):
            logits = hidden[rows] @ compute_weight.T
            n_kept_bytes += logits.nbytes
            keep = needs_backward and n_kept_bytes <= keep_bytes
            for tile, part in _tiles(rows, logits):
                x = part.to(wide)
                max_logits[tile] = x.amax(dim=1)
                logps[tile] = x.gather(1, targets[tile, None]).squeeze(1) - max_logits[tile]
                exps = _exps(x, max_logits[tile])
                sums[tile] = exps.sum(dim=1)
                if norms is not None:
                    norms[tile] = torch.linalg.vector_norm(exps, dim=1)
                if keep:
                    part.copy_(exps)
            kept.append(logits if keep else None)
            del logits, part
        logps -= sums.log()
        ctx.save_for_backward(hidden, weight, targets, max_logits, sums, cast)
        ctx.kept, ctx.chunk_rows = kept, chunk_rows
        ctx.set_materialize_grads(False)
        if norms is None:
            return logps, max_logits
        norms = 2 * (norms.log() - sums.log())
        ctx.mark_non_differentiable(norms)
        return logps, max_logits, norms

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_max_logits, *_):
        hidden, weight, targets, max_logits, sums, cast = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros_like(sums)
        if grad_max_logits is None:
            grad_max_logits = torch.zeros_like(sums)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight) if hidden.shape[0] else torch.zeros_like(weight)
        compute_weight = weight.to(hidden.dtype) if cast is None else cast
        for i, rows in enumerate(_slices(0, hidden.shape[0], ctx.chunk_rows)):
            exps, ctx.kept[i] = ctx.kept[i], None
            is_kept = exps is not None
            if not is_kept:
                exps = hidden[rows] @ compute_weight.T
            for tile, part in _tiles(rows, exps):
                x = part.to(sums.dtype) if is_kept else _exps(part.to(sums.dtype), max_logits[tile])
                part.copy_(_grad_logits(x, sums[tile], targets[tile], grad_logps[tile], grad_max_logits[tile]))
            if grad_hidden is not None:
                torch.mm(exps, compute_weight, out=grad_hidden[rows])
            if grad_weight is not None:
                # Several chunks add up in the weight's own dtype: fp32 master weights get an fp32 sum. A part of the vocabulary at
                # a time: the product in bf16, and its copy in fp32, are never there as a whole.
                for columns in _slices(0, weight.shape[0], GRADIENT_COLUMNS):
                    product = exps[:, columns].T @ hidden[rows]
                    grad_weight[columns].copy_(product) if i == 0 else grad_weight[columns].add_(product)
                    del product
            del exps, part
        return grad_hidden, grad_weight, None, None, None, None, None


def _exps(logits: Tensor, max_logits: Tensor) -> Tensor:
    return (logits - max_logits[:, None]).exp_()


def _grad_logits(exps: Tensor, sums: Tensor, targets: Tensor, grad_logps: Tensor, grad_max_logits: Tensor) -> Tensor:
    """d(loss)/d(logits) of one tile: grad_logps * (onehot(target) - softmax), plus grad_max_logits at the largest logit.
    Works in place on exps = exp(logits - largest)."""
    # Only corpus rows pull at their largest logit. Looking costs nothing on a CPU; elsewhere it would wait for the device.
    pulls = exps.device.type != "cpu" or bool(grad_max_logits.any())
    largest = _argmax(exps) if pulls else None
    grad = exps.mul_((-grad_logps / sums)[:, None])
    grad.scatter_add_(1, targets[:, None], grad_logps[:, None])
    if largest is not None:
        grad.scatter_add_(1, largest, grad_max_logits[:, None])
    return grad


def _argmax(x: Tensor) -> Tensor:
    """x.argmax(1, keepdim=True), by way of the largest of each 256 columns: torch's maximum is vectorized, its argmax is not."""
    n_rows, n_columns = x.shape
    if n_columns % 256:
        return x.argmax(dim=1, keepdim=True)
    blocks = x.view(n_rows, -1, 256)
    block = blocks.amax(dim=2).argmax(dim=1)
    within = blocks[torch.arange(n_rows, device=x.device), block].argmax(dim=1)
    return (256 * block + within)[:, None]


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _tiles(rows: slice, chunk: Tensor) -> list[tuple[slice, Tensor]]:
    """Cuts a chunk of rows into tiles: which rows of all each one holds, and its part of the chunk."""
    tiles = _slices(rows.start, rows.stop, CPU_TILE_ROWS if chunk.device.type == "cpu" else TILE_ROWS)
    return [(tile, chunk[tile.start - rows.start : tile.stop - rows.start]) for tile in tiles]
