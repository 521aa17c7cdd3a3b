"""What the trained parameters take on a device: weights, moments, gradients, and what DeepSpeed adds to them, by its ZeRO stages.

Read off DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py and stage3.py), with the allocator's record of a step at hand:

- Stages 1 and 2 put the weights into one flat tensor. Every stage keeps fp32 masters of this rank's share beside them, even of weights
  that are fp32 themselves.
- Gradients go through buckets of a fixed size, in the type of the weights: one, or two where sending overlaps with computing.
- Stages 1 and 2 copy the gradients of this rank's share out of the buckets, and flatten them once more for the optimizer. Stage 2 does so
  whenever a bucket is full, and after every micro-batch. Stage 1 does after the last one of a step; until then gradients stay where the
  backward pass put them.
- Stage 3 keeps its bucket and an fp32 buffer for its share of the gradients all the time, and copies a bucket to send it.
- With _offload masters, moments and their gradients are in host memory, in stage 3 the weights as well; the norm of a gradient is taken
  in float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

# DeepSpeed's stage3_max_live_parameters: so many weights of other ranks, or of host memory, stay on a device while a step lasts.
MAX_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Trained:
    """The trained parameters of a run, and how its devices share them."""

    n: int
    n_largest: int  # of the head, and of the embedding: the first and the last whose gradient is there; 0 when they aren't trained
    weight_bytes: int  # of one weight, and of its gradient
    moment_bytes: float  # of the optimizer's state, a weight
    accumulates: bool  # gradients wait for those of the next micro-batch
    at_once: bool = False  # all gradients appear at the end of the backward pass, from sums of its own (--chunk_ctx)
    ddp: bool = False
    zero_stage: int = 0  # 0 without DeepSpeed
    offload: bool = False
    world_size: int = 1
    n_bucket: int = 0  # weights whose gradients fill a bucket


class Held(NamedTuple):
    """Bytes on a device: of weights and moments all the time, of gradients and buckets at moments of a step."""

    weights: float
    optimizer: float
    setup: float  # weights, before the first step
    forward: float  # the forward pass
    layers: float  # the backward pass of the last layers
    end: float  # the backward pass of the first layer
    full: float  # the first bucket is full, or the backward pass over
    left: float  # how much of the backward pass is to come then
    update: float  # the optimizer's step
    keeps: bool  # a gradient stays where the backward pass puts it
    fetched: float = 0.0  # of weights, from elsewhere, for the forward and the backward pass
    last_fetched: float = 0.0  # of these, those of the embedding


def held(t: Trained) -> Held:
    """Bytes that trained parameters take under their strategy."""
    return (_plain, _stage_1_or_2, _stage_1_or_2, _stage_3)[t.zero_stage](t)


def _plain(t: Trained) -> Held:
    weights = gradients = float(t.weight_bytes * t.n)
    # Between micro-batches that ddp doesn't send, gradients stand beside its buckets; when it sends, buckets take their place.
    before = gradients * (t.ddp + t.accumulates)
    end = before + gradients if t.at_once else max(before, gradients)
    layers = end if t.at_once else before
    return Held(weights, t.moment_bytes * t.n, weights, layers, layers, end, end, 0.0, gradients, keeps=not t.ddp)


def _stage_1_or_2(t: Trained) -> Held:
    weights = gradients = float(t.weight_bytes * t.n)
    n_share = 0.0 if t.offload else t.n / t.world_size
    share = t.weight_bytes * n_share
    overlaps = t.world_size > 1
    bucket = float(t.weight_bytes * min(t.n_bucket, t.n))
    buckets = bucket * (1 + overlaps)
    # Ranks' parts of a bucket are copied out of it to be sent; an offloaded gradient's norm is taken.
    sending = bucket * overlaps + (8.0 * t.n_largest if t.offload else 0.0)
    keeps = t.zero_stage == 1 and not overlaps
    waiting = (gradients if t.zero_stage == 1 else share) if t.accumulates else 0.0
    own = gradients if keeps or t.at_once else 0.0
    reduced = buckets + sending + share
    if t.at_once:
        forward = layers = end = waiting + own + (buckets if keeps and t.accumulates else 0.0)
        # What goes into a bucket leaves its place.
        full = max(end, (0.0 if keeps else waiting) + own + max(buckets, reduced - bucket))
    else:
        forward = waiting + (buckets if keeps and t.accumulates else 0.0)
        layers = waiting + buckets
        end = max(waiting, own) + buckets + (sending + share if t.n > t.n_bucket and not keeps else 0.0)
        full = (gradients - bucket if keeps else waiting) + reduced
    return Held(
        weights=weights + 4.0 * n_share + (t.weight_bytes * t.n_largest if t.offload else 0.0),
        optimizer=t.moment_bytes * n_share,
        setup=2 * weights,
        forward=forward, layers=layers, end=end, full=full,
        left=0.0 if keeps or t.at_once else _left(t),
        # Made flat, and fp32, one group of parameters after another; the matrices are nearly all of them.
        update=share + share + (4.0 * n_share if t.weight_bytes < 4 else 0.0),
        keeps=keeps,
    )  # fmt: skip


def _stage_3(t: Trained) -> Held:
    n_share = 0.0 if t.offload else t.n / t.world_size
    bucket = float(t.weight_bytes * min(t.n_bucket, t.n))
    waiting = 4.0 * n_share + bucket
    sending = bucket + ((8.0 + t.weight_bytes) * t.n_largest if t.offload else 0.0)
    # A single rank's share is the weights themselves.
    is_fetched = t.world_size > 1 or t.offload
    left = _left(t)
    return Held(
        weights=(t.weight_bytes + 4.0) * n_share,
        optimizer=t.moment_bytes * n_share,
        setup=float(t.weight_bytes * (t.n + n_share)),
        forward=waiting,
        layers=waiting,
        end=waiting + (sending if left else 0.0),
        full=waiting + sending,
        left=left,
        update=waiting + 4.0 * n_share,
        keeps=False,
        fetched=float(t.weight_bytes * min(t.n, MAX_LIVE)) if is_fetched else 0.0,
        last_fetched=float(t.weight_bytes * t.n_largest) if is_fetched else 0.0,
    )  # fmt: skip


def _left(t: Trained) -> float:
    """How much of the layers' backward pass is to come when the first bucket is full, which the head's gradient was the first to enter."""
    if t.n <= t.n_bucket:
        return 0.0
    n_layers = t.n - 2 * t.n_largest
    return min(max(1 - (t.n_bucket - t.n_largest) / max(n_layers, 1), 0.0), 1.0)
