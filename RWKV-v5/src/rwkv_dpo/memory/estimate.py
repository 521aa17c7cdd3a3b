"""How much memory a training run will need, by part: arithmetic on sizes, from what the code keeps and when.

The peak is the largest of a few moments of a step:

    forward the forward pass ends: activations of all layers, logits
    head    the head's backward begins: the gradient of the head as well
    blocks  the first block's backward runs: whatever the forward kept, and one block's own temporaries
    end     the last block's backward runs: all gradients, and one block's own temporaries
    full    gradients are sent to other devices, by some strategies, during the backward pass or after it
    update  the optimizer works: all gradients, and its temporaries

or, where little is trained, a moment before the first step: weights stand beside the mapped file that they came from, or beside the
copy that DeepSpeed makes of them. What each strategy does with the trained parameters is in trained.py.

Weights and the optimizer's state stand beside all of them, accumulated gradients too. Python and libraries (some 0.5 GB) come on top.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rwkv_dpo.kernels.linear_logprobs import CHUNK_ROWS, CPU_TILE_ROWS, GRADIENT_COLUMNS, KEEP_BYTES, LEAN, TILE_ROWS
from rwkv_dpo.memory.frozen import QUANTIZED, held_frozen, in_a_product, while_quantizing
from rwkv_dpo.memory.newer_blocks import kept_by_newer_block
from rwkv_dpo.memory.trained import Held, Trained, held
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.chunked_step import DIRECT_BORDERS
from rwkv_dpo.optimizer.adamw_bf16 import CHUNK, CPU_CHUNK

# Bytes of Adam's two moments, a trainable parameter.
MOMENT_BYTES = {"adamw": 8.0, "adamw_bf16state": 4.0, "adamw8bit": 2.0 + 8 / 256}
# Share of activations and logits that a heap takes on top when it keeps what was freed (--cpu_malloc 1).
HEAP_SHARE = 0.4
# What cuBLAS works in: one workspace in the thread of the forward pass and one in that of the backward pass. (32 MiB each since sm_90;
# 8 before.)
WORKSPACES = 2 * (32 << 20)
# Tokens between the states that WKV-5's backends keep for their backward, in fp32; `reference` has autograd keep some three a token.
_STATE_EVERY = {"cuda": 64, "chunked": 32, "reference": 1 / 3}


@dataclass(frozen=True)
class Plan:
    """What the memory of one device's process depends on."""

    shape: ModelShape
    n_parameters: int
    n_trainable: int
    trains_head: bool
    frozen_bytes: int  # of a parameter that is not trained
    compute_bytes: int  # of an activation: 2 for bf16 and fp16, 4 for fp32
    optim: str  # as --optim
    grad_cp: str  # as --grad_cp
    chunk_ctx: int  # tokens that are computed together; 0: all
    n_tokens: int  # of the largest micro-batch, every token once
    n_rows: int  # of them scored by the head
    n_segments: int  # windows, prompts and answers
    accumulates: bool  # gradients stand beside the next forward pass
    on_gpu: bool
    wkv_backend: str  # cuda, cpu, chunked, reference
    keeps_heap: bool = False  # --cpu_malloc 1 on a CPU
    trained_bytes: int = 4  # of a parameter that is trained, and of its gradient
    ddp: bool = False
    zero_stage: int = 0  # DeepSpeed's, 0 without
    offload: bool = False
    n_bucket: int = 0  # numbers in a bucket of DeepSpeed's, with a zero_stage
    world_size: int = 1
    quant: str = "none"  # as --quant
    n_projections: int = 0  # numbers in what --quant is of
    file_bytes: int = 0  # of the checkpoint, which counts as memory of a CPU process while it is mapped


PARTS = ("weights", "gradients", "optimizer", "activations", "head", "states", "temporaries")


def estimate(plan: Plan) -> dict[str, float]:
    """Bytes by part at the moment of the peak; their sum is the peak."""
    trained = _trained(plan)
    frozen = held_frozen(plan.shape, plan.n_parameters - plan.n_trainable, plan.n_projections, plan.frozen_bytes, plan.quant)
    lasting = {
        "weights": trained.weights + frozen + _casts(plan), "optimizer": trained.optimizer, "states": _states(plan),
        "temporaries": float(WORKSPACES) if plan.on_gpu else 0.0,
    }  # fmt: skip
    saved, own, head = _saved(plan), _block_temporaries(plan), _head(plan)
    embedding = float(plan.trained_bytes * plan.shape.vocab_size * plan.shape.n_embd) if plan.trains_head else 0.0
    # A gradient is made before it is added to one that is there, or copied into a bucket: the largest is the embedding's or the head's.
    adds = plan.accumulates or plan.chunk_ctx > 0
    own += _returning(plan, adds)
    made, stays = (0.0, embedding) if trained.keeps and not adds else (embedding, 0.0)
    last = made if adds else 0.0
    going_back = {"gradients": trained.forward + stays, "head": head.weight + head.returning, "temporaries": made}
    everything = {"activations": saved, "weights": trained.fetched}
    fetched_when_full = max(trained.left * trained.fetched, trained.last_fetched)
    moments = (
        {**everything, "gradients": trained.forward, "head": head.weight + head.kept + head.computed},
        {**everything, **going_back},
        {**everything, "gradients": trained.layers + stays, "temporaries": max(own + last, made)},
        {"gradients": trained.end, "activations": _saved_by_first_block(plan), "weights": trained.last_fetched, "temporaries": own + last},
        {"gradients": trained.full, "activations": trained.left * saved, "weights": fetched_when_full},
        {"gradients": trained.update, "temporaries": _update_temporaries(plan)},
    )
    at_the_peak = max(moments, key=lambda moment: sum(moment.values()))
    parts = {name: lasting.get(name, 0.0) + at_the_peak.get(name, 0.0) for name in PARTS}
    if plan.keeps_heap:
        parts["temporaries"] += HEAP_SHARE * (parts["activations"] + parts["head"])
    nothing = dict.fromkeys(PARTS, 0.0)
    reading = plan.file_bytes + (0.0 if plan.on_gpu else while_quantizing(plan.shape, plan.quant))
    loading = nothing | {"weights": lasting["weights"] - _casts(plan), "temporaries": reading}
    setting_up = nothing | {"weights": trained.setup + frozen}
    return max(parts, loading, setting_up, key=lambda moment: sum(moment.values()))


def total(plan: Plan) -> float:
    """Bytes at the peak."""
    return sum(estimate(plan).values())


def alternatives(plan: Plan, n_lora: int, n_state: int) -> dict[str, Plan]:
    """The same run with one flag changed, for every flag that saves memory and isn't set: by the flag as it is typed.

    n_lora, n_state: trainable parameters of --peft lora (r = 32) and --peft state.
    """
    frozen: dict[str, Any] = {"trains_head": False, "frozen_bytes": plan.compute_bytes}
    changes: dict[str, dict[str, Any]] = {
        "--grad_cp 1": {"grad_cp": "1"},
        "--chunk_ctx 512": {"chunk_ctx": 512} if plan.chunk_ctx == 0 or plan.chunk_ctx > 512 else {},
        "--peft lora --lora_r 32": {"n_parameters": plan.n_parameters + n_lora, "n_trainable": n_lora, **frozen},
        "--peft state": {"n_parameters": plan.n_parameters + n_state, "n_trainable": n_state, **frozen},
        "--optim adamw_bf16state": {"optim": "adamw_bf16state"} if plan.optim == "adamw" else {},
        "--optim adamw8bit": {"optim": "adamw8bit"},
        "--precision bf16": {"compute_bytes": 2},
        "--cpu_malloc 0": {"keeps_heap": False},
    }
    if plan.n_trainable < plan.n_parameters:
        del changes["--peft lora --lora_r 32"], changes["--peft state"]
        changes |= {f"--quant {form}": {"quant": form} for form in QUANTIZED if plan.n_projections and form != plan.quant}
    plans = {flag: replace(plan, **change) for flag, change in changes.items()}
    return {flag: other for flag, other in plans.items() if other != plan}


def _trained(plan: Plan) -> Held:
    p = plan
    largest = p.shape.vocab_size * p.shape.n_embd if p.trains_head else 0
    return held(Trained(
        n=p.n_trainable, n_largest=largest, weight_bytes=p.trained_bytes, moment_bytes=MOMENT_BYTES[p.optim], accumulates=p.accumulates,
        at_once=p.chunk_ctx > 0, ddp=p.ddp, zero_stage=p.zero_stage, offload=p.offload, world_size=p.world_size, n_bucket=p.n_bucket,
    ))  # fmt: skip


def _casts(plan: Plan) -> float:
    """Copies of trained matrices in the compute dtype, which last from one optimizer step to the next: all but the embedding's."""
    if not plan.trains_head or plan.compute_bytes == plan.trained_bytes or plan.grad_cp == "1" or plan.zero_stage == 3:
        return 0.0
    return float(plan.compute_bytes * (plan.n_trainable - plan.shape.vocab_size * plan.shape.n_embd))


def _returning(plan: Plan, adds: bool) -> float:
    """A block's gradients on their way: those of the copies until the last is there, then in the weights' type, all at once."""
    if not _casts(plan):
        return 0.0
    n_block = (plan.n_trainable - 2 * plan.shape.vocab_size * plan.shape.n_embd) / plan.shape.n_layer
    return n_block * (plan.compute_bytes + (plan.trained_bytes if adds else 0))


def _live(n: int, plan: Plan) -> int:
    return min(n, plan.chunk_ctx) if plan.chunk_ctx else n


def _states(plan: Plan) -> float:
    """What segments, and chunks of them, hand on to the next: in every layer the WKV state (fp32) and two token rows."""
    s = plan.shape
    n_chunks = -(-plan.n_tokens // plan.chunk_ctx) if plan.chunk_ctx else 0
    if n_chunks > DIRECT_BORDERS:
        n_chunks = 2 * (math.isqrt(n_chunks - 1) + 1)
    return (plan.n_segments + n_chunks) * s.n_layer * (4.0 * s.dim_att * s.head_size + 2.0 * s.n_embd * plan.compute_bytes)


def _kept_by_block(plan: Plan) -> float:
    """Bytes per token that one block keeps: the residual stream twice, the gate of the channel mix and what it gates; r, k, v, g and y of
    the time mix; the channel mix's wide row."""
    s = plan.shape
    if s.version != "5":
        return kept_by_newer_block(s, plan.compute_bytes, plan.wkv_backend)
    return plan.compute_bytes * (4.0 * s.n_embd + 5.0 * s.dim_att + s.dim_ffn) + _kept_by_wkv(plan)


def _kept_by_wkv(plan: Plan) -> float:
    """Bytes per token beside r, k and v: states, and in `chunked` fp32 copies and the scores within chunks."""
    s = plan.shape
    if plan.wkv_backend not in _STATE_EVERY:
        return 0.0
    n_bytes = 4.0 * s.dim_att * s.head_size / _STATE_EVERY[plan.wkv_backend]
    if plan.wkv_backend == "chunked":
        n_bytes += 3.0 * (4 - plan.compute_bytes) * s.dim_att + 4.0 * 32 * s.n_head
    return n_bytes


def _saved(plan: Plan) -> float:
    """All activations that the forward pass leaves to the backward pass: the blocks', the norm's before the head, the scored rows."""
    s, n_tokens = plan.shape, _live(plan.n_tokens, plan)
    block = s.n_embd * plan.compute_bytes if plan.grad_cp == "1" else _kept_by_block(plan)
    outside = s.n_embd * plan.compute_bytes * (2.0 * n_tokens + _live(plan.n_rows, plan))
    return block * s.n_layer * n_tokens + outside


def _saved_by_first_block(plan: Plan) -> float:
    block = plan.shape.n_embd * plan.compute_bytes if plan.grad_cp == "1" else _kept_by_block(plan)
    return block * _live(plan.n_tokens, plan)


def _block_temporaries(plan: Plan) -> float:
    """Of one block's backward, at its widest: the channel mix prepares its wide row again and makes two gradients of it. A block
    that is recomputed has all its activations there as well, but for the three rows that are used up by then."""
    wide = 3.0 * plan.shape.dim_ffn * plan.compute_bytes
    again = _kept_by_block(plan) - 3.0 * plan.shape.n_embd * plan.compute_bytes if plan.grad_cp == "1" else 0.0
    return (wide + again) * _live(plan.n_tokens, plan) + in_a_product(plan.shape, plan.compute_bytes, plan.quant)


class _Head(NamedTuple):
    """Bytes that the head takes for a while, beside its gradient."""

    weight: float  # a copy in the compute type
    kept: float  # exponentials of logits, from the forward to the backward pass
    computed: float  # logits of a chunk that are not kept, and their softmax
    returning: float  # in the backward pass: logits, and their softmax or what they add to the gradient


def _head(plan: Plan) -> _Head:
    s, n_rows = plan.shape, _live(plan.n_rows, plan)
    n_weight, row = float(s.vocab_size * s.n_embd), float(s.vocab_size * plan.compute_bytes)
    weight_bytes = plan.trained_bytes if plan.trains_head else plan.frozen_bytes
    chunk_rows, keep_bytes = (LEAN["chunk_rows"], LEAN["keep_bytes"]) if plan.grad_cp == "1" else (CHUNK_ROWS, KEEP_BYTES)
    n_kept = n_rows if n_rows * row <= keep_bytes else int(keep_bytes // (chunk_rows * row)) * chunk_rows
    kept, chunk = n_kept * row, min(n_rows - n_kept, chunk_rows) * row
    tiles = 3.0 * 4 * s.vocab_size * min(n_rows, TILE_ROWS if plan.on_gpu else CPU_TILE_ROWS)
    # Of a chunk's gradients and rows, before it is added to the gradient.
    product = (4.0 + plan.compute_bytes) * min(GRADIENT_COLUMNS, s.vocab_size) * s.n_embd * plan.trains_head
    weight = plan.compute_bytes * n_weight if weight_bytes != plan.compute_bytes and not _casts(plan) else 0.0
    return _Head(weight, kept, computed=chunk + tiles, returning=max(kept, chunk) + max(tiles, product))


def _update_temporaries(plan: Plan) -> float:
    if plan.optim == "adamw_bf16state":
        return 4.0 * 4 * min(CHUNK if plan.on_gpu else CPU_CHUNK, plan.n_trainable)
    if plan.optim == "adamw8bit" and not plan.on_gpu:
        # bitsandbytes' CPU code works on five fp32 copies of a parameter; the largest are embedding and head.
        largest = plan.shape.vocab_size * plan.shape.n_embd if plan.trains_head else 0
        return 5.0 * 4 * min(largest, plan.n_trainable)
    return 0.0
