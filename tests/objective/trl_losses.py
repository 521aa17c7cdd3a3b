#!/usr/bin/env python3
"""Writes trl_losses.json: what TRL's own DPOTrainer computes for given log-probabilities, values and gradients.

    pip install trl==1.16.0 && python tests/objective/trl_losses.py

The trainer's loss is called as it is, with a stand-in for the model that hands it the log-probabilities of the tokens.
"""

import collections
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from trl.trainer.dpo_trainer import DPOTrainer

LENGTHS = [[3, 5], [4, 4], [7, 2], [1, 6], [5, 3]]
PROMPT = 2
NAMES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
         "apo_down", "discopop", "sft", "sigmoid_norm")  # fmt: skip
DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


def trainer(
    losses, weights, beta=0.1, label_smoothing=0.0, f_divergence="reverse_kl", f_alpha=0.5, ld_alpha=None, wpo=False
) -> SimpleNamespace:
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    args = SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None)
    metrics = {"train": collections.defaultdict(list)}
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, args=args, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
        loss_types=losses, loss_weights=weights, beta=beta, label_smoothing=label_smoothing, ld_alpha=ld_alpha, use_weighting=wpo,
        precompute_ref_logps=True, aux_loss_enabled=False, f_divergence_type=DIVERGENCES.get(f_divergence, f_divergence),
        f_alpha_divergence_coef=f_alpha,
    )  # fmt: skip


def batch(per_token: torch.Tensor, ref_logps: torch.Tensor, collisions: torch.Tensor | None = None) -> tuple[object, dict]:
    lengths = torch.tensor(LENGTHS).T.reshape(-1)  # all chosen answers, then all rejected ones
    width = PROMPT + int(lengths.max())
    places = torch.arange(width)
    mask = ((places >= PROMPT) & (places < PROMPT + lengths[:, None])).long()
    shown = SimpleNamespace(log_probs=per_token, entropy=torch.zeros_like(per_token), mean_logits=torch.zeros_like(per_token),
                            log_sum_sq_probs=collisions, is_top1=torch.zeros_like(per_token, dtype=torch.bool))  # fmt: skip
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": ref_logps[:, 0], "ref_rejected_logps": ref_logps[:, 1]}  # fmt: skip
    return (lambda **_: shown), inputs


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    logps = -lengths * (1 + torch.rand(lengths.shape, generator=generator))
    ref_logps = logps + 2 * torch.randn(lengths.shape, generator=generator)
    cases = []
    for name in NAMES:
        smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust", "aot", "aot_unpaired") else {}
        cases += [{"losses": [name], "options": {"beta": beta, **smoothing}} for beta in (0.1, 0.7)]
    for name in ("sigmoid", "ipo", "hinge"):
        cases += [{"losses": [name], "options": {"beta": 0.1, "f_divergence": divergence}} for divergence in DIVERGENCES]
    cases.append({"losses": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0], "options": {"beta": 0.1}})
    for case in cases:
        case.setdefault("weights", [1.0])
        case["name"] = "+".join(case["losses"]) + "".join(f" {key}={value}" for key, value in case["options"].items())
        sums = logps.clone().requires_grad_()
        # Every token of an answer has the same share of its sum.
        flat = (sums / lengths).T.reshape(-1)
        width = PROMPT + int(lengths.max())
        model, inputs = batch(flat[:, None].expand(-1, width - 1) * torch.ones(width - 1), ref_logps)
        mask = inputs["completion_mask"][:, 1:]
        model = (lambda shown: lambda **_: shown)(SimpleNamespace(**{**vars(model()), "log_probs": model().log_probs * mask}))
        loss = DPOTrainer._compute_loss(trainer(case["losses"], case["weights"], **case["options"]), model, inputs, False)
        loss.backward()
        case |= {"loss": loss.item(), "gradient": sums.grad.tolist()}
    told_tokens = by_tokens(ref_logps, generator)
    told = {"trl": version("trl"), "losses": NAMES, "lengths": LENGTHS, "logps": logps.tolist(), "ref_logps": ref_logps.tolist()}
    told |= {"cases": cases, "tokens": told_tokens}
    Path(__file__).with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{len(cases) + len(told_tokens['cases'])} cases")


def by_tokens(ref_logps: torch.Tensor, generator: torch.Generator) -> dict:
    """What depends on more than the sums: tokens [answers, longest], all chosen answers and then all rejected ones."""
    shape = 2 * len(LENGTHS), PROMPT + max(map(max, LENGTHS)) - 1
    # A token's log-probability, and the log of the sum of all squared ones, which is below 0 and above -log of the vocabulary.
    tokens = -3 * torch.rand(shape, generator=generator)
    collisions = -2 * torch.rand(shape, generator=generator)
    cases = [{"losses": losses, "weights": weights, "options": {"beta": 0.1, "label_smoothing": 0.1, **option}}
             for option in ({"ld_alpha": 0.3}, {"wpo": True})
             for losses, weights in ((["sigmoid"], [1.0]), (["exo_pair", "apo_zero"], [0.5, 2.0]))]  # fmt: skip
    for case in cases:
        leaves = tokens.clone().requires_grad_()
        model, inputs = batch(leaves, ref_logps, collisions)
        mask = inputs["completion_mask"][:, 1:]
        shown = SimpleNamespace(**{**vars(model()), "log_probs": leaves * mask})
        loss = DPOTrainer._compute_loss(trainer(case["losses"], case["weights"], **case["options"]), lambda s=shown, **_: s, inputs, False)
        loss.backward()
        case |= {"loss": loss.item(), "gradient": leaves.grad[:, PROMPT - 1 :].tolist()}
    return {"logps": tokens[:, PROMPT - 1 :].tolist(), "collisions": collisions[:, PROMPT - 1 :].tolist(), "cases": cases}


if __name__ == "__main__":
    main()
