"""The original's way through a training step, written out here for bench_step.py and others: a batch-1 forward of prompt + answer for the
chosen and for the rejected answer of every pair, full [T, vocabulary] logits and cross-entropy each, one backward, every activation kept
by autograd. RWKV-6 and RWKV-7 are forwarded as RWKV-LM's trainers for them write it."""

import math
import types
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from rwkv_dpo.batches.step import build_step
from rwkv_dpo.data.pairs import Pair
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.model.checkpoint import empty_model
from rwkv_dpo.model.rwkv import RWKV, Block
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import l2wrap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETA, RATIO = 0.1, 0.5


def build(way: str, shape: ModelShape, precision: str, backend: str, device: torch.device, grad_cp: str = "0") -> RWKV:
    """A model with random weights, whose blocks compute in one way or the other: "original" or "forest"."""
    model = empty_model(shape, choose_backend(shape.version, backend, device).wkv, DTYPES[precision], grad_cp)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            last = name.rpartition(".")[2]
            if last == "time_decay":
                p.uniform_(-6, 1, generator=generator)
            elif p.dim() > 1 and min(p.shape[-2:]) > 1 and last not in ("time_faaaa", "r_k"):
                p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
            elif last not in ("weight", "bias"):
                p.uniform_(0, 1, generator=generator)
    if way == "original":
        time_mix, channel_mix = _HALVES[shape.version]
        for block in cast("list[Block]", list(model.blocks)):
            block.att.forward = types.MethodType(time_mix, block.att)  # type: ignore[method-assign]
            block.ffn.forward = types.MethodType(channel_mix, block.ffn)  # type: ignore[method-assign]
    return model.to(device)


def original_loss(model: RWKV, windows: Sequence[np.ndarray], pairs: Sequence[Pair], refs: np.ndarray) -> torch.Tensor:
    """ratio * LM + (1 - ratio) * DPO; the loss of pairs alone where there is no window."""
    loss = torch.zeros((), device=model.head.weight.device)
    for (prompt, chosen, rejected), ref in zip(pairs, refs, strict=True):
        logps = torch.stack([original_answer_logp(model, prompt, answer).float() for answer in (chosen, rejected)])[None]
        loss = loss + _sigmoid_loss(logps, torch.from_numpy(ref).float().to(loss.device)[None]) / len(pairs)
    for window in windows:
        logits = original_logits(model, window[:-1])
        general = F.cross_entropy(logits, torch.from_numpy(window[1:]).to(logits.device))
        loss = (1 - RATIO) * loss + RATIO * l2wrap(general, logits.amax(1))
    return loss


@torch.no_grad()
def score_original(model: RWKV, pairs: Sequence[Pair]) -> None:
    """Log-probabilities of all answers, which nothing asks for here."""
    for prompt, *answers in pairs:
        for answer in answers:
            original_answer_logp(model, prompt, answer)


def original_answer_logp(model: RWKV, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    """log p of an answer after its prompt."""
    sequence = np.concatenate([prompt, answer])
    logits = original_logits(model, sequence[:-1])
    targets = torch.from_numpy(sequence[1:]).to(logits.device)
    return -F.cross_entropy(logits, targets, reduction="none")[-len(answer) :].sum()


def original_logits(model: RWKV, tokens: np.ndarray) -> torch.Tensor:
    """Full logits [T, V] of one sequence, batch 1."""
    forest = build_step([np.append(tokens, 0)], []).forest.to(model.head.weight.device)
    return model.head(model(forest)[0])


def _sigmoid_loss(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    ratios = logps - ref_logps
    return -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()


def _time_mix_5(self: Any, stream, norm, forest, before, initial, wkv, v_first):
    """The half of a block that looks back, for one sequence from its beginning."""
    x = norm(stream)
    r, k, v, g = (_plain(getattr(self, name), _mixed(x, mix)) for name, mix in (
        ("receptance", self.time_mix_r), ("key", self.time_mix_k), ("value", self.time_mix_v), ("gate", self.time_mix_g)
    ))  # fmt: skip
    r, k, v = _heads(self, r, k, v)
    y, ends = wkv(r, k, v, self.time_decay, self.time_faaaa, forest.cu_seqlens, initial)
    return stream + _plain(self.output, _normed(self, y) * F.silu(g)), x[-1:], ends, v_first


def _time_mix_6(self: Any, stream, norm, forest, before, initial, wkv, v_first):
    x = norm(stream)
    back = _before(x) - x
    depths = torch.tanh((x + back * self.time_maa_x[0].to(x.dtype)) @ self.time_maa_w1.to(x.dtype)).view(len(x), 5, -1).transpose(0, 1)
    more = torch.bmm(depths, self.time_maa_w2.to(x.dtype))
    xw, xk, xv, xr, xg = (x + back * (getattr(self, f"time_maa_{name}")[0].to(x.dtype) + m) for name, m in zip("wkvrg", more, strict=True))
    w = self.time_decay[0].to(x.dtype) + torch.tanh(xw @ self.time_decay_w1.to(x.dtype)) @ self.time_decay_w2.to(x.dtype)
    layers = (self.receptance, self.key, self.value)
    r, k, v, log_w = _heads(self, *map(_plain, layers, (xr, xk, xv)), -torch.exp(w.float()))
    y, ends = wkv(r, k, v, log_w, self.time_faaaa, forest.cu_seqlens, initial)
    return stream + _plain(self.output, _normed(self, y) * F.silu(_plain(self.gate, xg))), x[-1:], ends, v_first


def _time_mix_7(self: Any, stream, norm, forest, before, initial, wkv, v_first):
    x = norm(stream)
    back = _before(x) - x
    xr, xw, xk, xv, xa, xg = (x + back * getattr(self, f"x_{name}")[0].to(x.dtype) for name in "rwkvag")
    own = {name: getattr(self, name).to(x.dtype) for name in ("w0", "w1", "w2", "a0", "a1", "a2", "g1", "g2", "k_k", "k_a", "r_k")}
    r, k, v = map(_plain, (self.receptance, self.key, self.value), (xr, xk, xv))
    log_w = -math.exp(-0.5) * torch.sigmoid((own["w0"][0] + torch.tanh(xw @ own["w1"]) @ own["w2"]).float())
    if v_first is None:
        v_first = v
    else:
        depth = torch.sigmoid(self.v0[0].to(x.dtype) + (xv @ self.v1.to(x.dtype)) @ self.v2.to(x.dtype))
        v = v + (v_first - v) * depth
    a = torch.sigmoid(own["a0"][0] + (xa @ own["a1"]) @ own["a2"])
    g = torch.sigmoid(xg @ own["g1"]) @ own["g2"]
    kk = F.normalize((k * own["k_k"][0]).view(len(x), self.n_head, -1), dim=-1, p=2.0).view_as(k)
    k = k * (1 + (a - 1) * own["k_a"][0])
    r, k, v, taken, put_back, log_w = _heads(self, r, k, v, -kk, kk * a, log_w)
    y, ends = wkv(r, k, v, taken, put_back, log_w, forest.cu_seqlens, initial)
    y = _normed(self, y) + ((r * k * own["r_k"]).sum(-1, keepdim=True) * v).flatten(1)
    return stream + _plain(self.output, y * g), x[-1:], ends, v_first


def _channel_mix_5(self: Any, stream, norm, forest, before):
    """The other half."""
    x = norm(stream)
    k, r = _plain(self.key, _mixed(x, self.time_mix_k)), _plain(self.receptance, _mixed(x, self.time_mix_r))
    return stream + torch.sigmoid(r) * _plain(self.value, torch.relu(k) ** 2), x[-1:]


def _channel_mix_6(self: Any, stream, norm, forest, before):
    x = norm(stream)
    back = _before(x) - x
    k = _plain(self.key, x + back * self.time_maa_k[0].to(x.dtype))
    r = _plain(self.receptance, x + back * self.time_maa_r[0].to(x.dtype))
    return stream + torch.sigmoid(r) * _plain(self.value, torch.relu(k) ** 2), x[-1:]


def _channel_mix_7(self: Any, stream, norm, forest, before):
    x = norm(stream)
    k = _plain(self.key, x + (_before(x) - x) * self.x_k[0].to(x.dtype))
    return stream + _plain(self.value, torch.relu(k) ** 2), x[-1:]


_HALVES = {"5": (_time_mix_5, _channel_mix_5), "6": (_time_mix_6, _channel_mix_6), "7": (_time_mix_7, _channel_mix_7)}


def _before(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 1, -1))


def _mixed(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    mix = mix.view(-1).to(x.dtype)
    return x * mix + _before(x) * (1 - mix)


def _heads(self: Any, *rows: torch.Tensor) -> list[torch.Tensor]:
    return [part.view(-1, self.n_head, self.head_size) for part in rows]


def _normed(self: Any, y: torch.Tensor) -> torch.Tensor:
    weight, bias = self.ln_x.weight.to(y.dtype), self.ln_x.bias.to(y.dtype)
    return F.group_norm(y.flatten(1), self.n_head, weight, bias, self.norm_eps)


def _plain(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight.to(x.dtype))
