"""A step in chunks: the exact gradient in the memory of one chunk and of the states at the borders.

A first pass walks the chunks in order, yields what every scored row scores, and stores the states at the borders. The loss turns
these into one gradient a row; the backward pass walks the chunks from last to first, computes each again from its stored state,
and hands the gradient of that state to the chunk before. To everyone else this is one differentiable function of the trainable
parameters.

Truncated, states carry values and no gradients from chunk to chunk. Then nothing is stored, and windows, whose rows' gradients are
known beforehand, need one pass.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from rwkv_dpo.batches.chunks import Chunk, ChunkPlan
from rwkv_dpo.batches.forest import LayerState
from rwkv_dpo.kernels.linear_logprobs import LogProbs, LogProbsAndCollisions, Scores, scores_of
from rwkv_dpo.model.rwkv import RWKV

# Up to so many borders keep their states. Beyond, only every sqrt(n)-th does, and the backward pass computes those between once
# more: 2 sqrt(n) states instead of n, for one more forward pass (without the head).
DIRECT_BORDERS = 32

Live = list[LayerState]


def score_chunks(model: RWKV, plan: ChunkPlan) -> Scores:
    """What `objective.score_rows` returns, in the memory of one chunk; 0 for rows that no chunk scores. Differentiable in the
    parameters that require a gradient; with gradients off it is the first pass alone."""
    names, parameters = _trainable(model)
    if torch.is_grad_enabled() and parameters:
        return scores_of(_ScoreChunks.apply(model, plan, names, *parameters))
    with torch.no_grad():
        return scores_of(_first_pass(model, plan, lambda number, live: None))


def truncated_loss(model: RWKV, plan: ChunkPlan, loss_of: Callable[[Scores], Tensor]) -> Tensor:
    """The mean over a truncated plan's window rows of loss_of, itself a mean over the rows it gets, in a single pass: gradients are
    computed along with the value, and scaled later. (So not for fp16, whose small gradients want to be scaled beforehand.)"""
    names, parameters = _trainable(model)
    return _TruncatedLoss.apply(model, plan.chunks[: plan.n_window_chunks], loss_of, names, *parameters)


def _trainable(model: RWKV) -> tuple[list[str], list[Tensor]]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return list(trainable), list(trainable.values())


class _ScoreChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, plan, names, *parameters):
        n = len(plan.chunks)
        stride = 1 if n <= DIRECT_BORDERS else math.isqrt(n - 1) + 1
        ctx.model, ctx.plan, ctx.stride, ctx.names = model, plan, stride, names
        ctx.stored, ctx.draws = [], []

        def at_border(number: int, live: Live) -> None:
            ctx.draws.append(_random_state(model))
            if number % stride == 0 and not plan.truncated:
                ctx.stored.append(live)

        return _first_pass(model, plan, at_border)

    @staticmethod
    @once_differentiable
    def backward(ctx, *row_grads):
        model, chunks, draws, stored, stride = ctx.model, ctx.plan.chunks, ctx.draws, ctx.stored, ctx.stride

        def walk_on() -> None:
            live: Live = []
            for chunk, draw in zip(chunks, draws, strict=True):
                with _drawing_again(model, draw):
                    _, live = _learn(model, chunk, live, row_grads, None)

        def walk_back() -> None:
            after: list[Tensor | None] = []
            for first in reversed(range(0, len(chunks), stride)):
                group = list(zip(chunks, draws, strict=True))[first : first + stride]
                lives = [stored.pop()]
                for chunk, draw in group[:-1]:
                    with torch.no_grad(), _drawing_again(model, draw):
                        lives.append(_advance(model, chunk, lives[-1])[1])
                for chunk, draw in reversed(group):
                    with _drawing_again(model, draw):
                        after, _ = _learn(model, chunk, lives.pop(), row_grads, after)

        return None, None, None, *_gradients(model, ctx.names, walk_on if ctx.plan.truncated else walk_back)


class _TruncatedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, chunks, loss_of, names, *parameters):
        n_rows = sum(chunk.places.numel() for chunk in chunks)
        losses = []

        def walk_on() -> None:
            live: Live = []
            for chunk in chunks:
                with torch.enable_grad():
                    hidden, live = _advance(model, chunk, live)
                    loss = loss_of(_score(model, chunk, hidden)) * (chunk.places.numel() / n_rows)
                # Where tuned states alone train, what continues a cut-off state has no gradient for them.
                if loss.requires_grad:
                    loss.backward()
                losses.append(loss.detach())
                live = _detached(live)

        ctx.grads = _gradients(model, names, walk_on)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads, ctx.grads = ctx.grads, []
        return None, None, None, None, *(grad if grad is None else grad.mul_(grad_loss) for grad in grads)


def _gradients(model: RWKV, names: list[str], work: Callable[[], None]) -> list[Tensor | None]:
    """What the backward passes within `work` add up for the named parameters.

    It gathers in stand-ins that share the parameters' memory: the parameters' own gradients would meet hooks (DDP, DeepSpeed) once
    a chunk, and these results of a single autograd function meet them once."""
    parameters = dict(model.named_parameters())
    leaves = {name: parameters[name].detach().requires_grad_() for name in names}
    functional_call(_With(model), {f"model.{name}": leaf for name, leaf in leaves.items()}, (work,))
    return [leaf.grad for leaf in leaves.values()]


class _With(nn.Module):
    """Runs work while others stand in for the model's parameters."""

    def __init__(self, model: RWKV) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], None]) -> None:
        work()


def _first_pass(model: RWKV, plan: ChunkPlan, at_border: Callable[[int, Live], None]) -> tuple[Tensor, ...]:
    """The parts of scores. at_border(number, live) is called before each chunk."""
    wide = torch.promote_types(model.compute_dtype, torch.float32)
    kind = LogProbsAndCollisions if model.finds_collisions else LogProbs
    result = tuple(torch.zeros(plan.n_rows, dtype=wide, device=model.head.weight.device) for _ in kind._fields)
    live: Live = []
    for number, chunk in enumerate(plan.chunks):
        at_border(number, live)
        hidden, live = _advance(model, chunk, live)
        if chunk.places.numel():
            for whole, part in zip(result, _score(model, chunk, hidden), strict=True):
                whole[chunk.places] = part
    return result


def _advance(model: RWKV, chunk: Chunk, live: Live) -> tuple[Tensor, Live]:
    """Hidden rows of the chunk, and the states that live after it."""
    initial = None if chunk.sources is None else [_select(layer, chunk.sources) for layer in live]
    hidden, ends = model(chunk.forest, initial)
    if not chunk.keep.numel():
        return hidden, []
    if live:
        ends = [LayerState(*map(torch.cat, zip(*layers, strict=True))) for layers in zip(live, ends, strict=True)]
    return hidden, [_select(layer, chunk.keep) for layer in ends]


def _select(states: LayerState, numbers: Tensor) -> LayerState:
    return LayerState(*(part.index_select(0, numbers) for part in states))


def _detached(live: Live) -> Live:
    return [LayerState(*(part.detach() for part in layer)) for layer in live]


def _score(model: RWKV, chunk: Chunk, hidden: Tensor) -> Scores:
    return model.head(hidden.index_select(0, chunk.rows), chunk.targets, model.is_lean, model.finds_collisions)


def _learn(
    model: RWKV, chunk: Chunk, live: Live, row_grads: tuple[Tensor, ...], after: list[Tensor | None] | None
) -> tuple[list[Tensor | None], Live]:
    """Adds a chunk's share to the parameters' gradients. `after`: gradients of the states that live after it, None when they are cut
    off. Returns those of the states before it (flat lists over layers), and the states after it."""
    with torch.enable_grad():
        live = [LayerState(*(part.detach().requires_grad_(after is not None) for part in layer)) for layer in live]
        hidden, ends = _advance(model, chunk, live)
        outputs, grads = ([], []) if after is None else ([part for layer in ends for part in layer], list(after))
        if chunk.places.numel():
            # Collisions have no gradient.
            outputs += _score(model, chunk, hidden)[:2]
            grads += [grad.index_select(0, chunk.places) for grad in row_grads[:2]]
    wanted = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad and grad is not None]
    del hidden, outputs
    if wanted:
        torch.autograd.backward([output for output, _ in wanted], [grad for _, grad in wanted])
    return [part.grad for layer in live for part in layer], _detached(ends)


def _random_state(model: RWKV) -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    device = model.head.weight.device
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


@contextmanager
def _drawing_again(model: RWKV, state: dict[str, Tensor]) -> Iterator[None]:
    """What is drawn within was drawn when `state` was taken; afterwards the generators go on as if nothing had been."""
    device = model.head.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)
        yield
