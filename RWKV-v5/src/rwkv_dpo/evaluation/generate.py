"""Text from a model: the prompt in one call, then token by token from the carried state."""

import numpy as np
import torch

from rwkv_dpo.batches.forest import Forest, ForestBuilder
from rwkv_dpo.data.tokenizer import DOCUMENT_END, LAST_TOKEN, WorldTokenizer
from rwkv_dpo.model.rwkv import RWKV


@torch.no_grad()
def generate(model: RWKV, tokenizer: WorldTokenizer, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int) -> str:
    """Continues `prompt` until a blank line, the end of a document, or max_tokens. temperature 0 takes the likeliest token."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens, state = tokenizer.encode(prompt), None
    answer: list[int] = []
    while len(answer) < max_tokens:
        hidden, state = model(_sequence(tokens).to(device), state)
        logits = model.head(hidden[-1:])[0].float().cpu()
        logits[LAST_TOKEN + 1 :] = -torch.inf  # nothing that the tokenizer could decode
        token = _pick(logits, temperature, top_p, generator)
        if token == DOCUMENT_END:
            break
        answer.append(token)
        tokens = [token]
        if "\n\n" in tokenizer.decode(answer):
            break
    return tokenizer.decode(answer).strip()


def _sequence(tokens: list[int]) -> Forest:
    builder = ForestBuilder()
    builder.add(np.array(tokens))
    return builder.build()[0]


def _pick(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751): from the likeliest tokens that make up top_p together."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / temperature, 0).sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities > top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
