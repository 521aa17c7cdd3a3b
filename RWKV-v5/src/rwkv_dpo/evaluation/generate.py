"""Text from a model: a prompt in one call, then token by token from the carried states, several answers at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.batches.forest import ForestBuilder, LayerState
from rwkv_dpo.data.tokenizer import DOCUMENT_END, LAST_TOKEN, WorldTokenizer
from rwkv_dpo.model.rwkv import RWKV

States = list[LayerState]
# What ends an answer.
TURN_END = "\n\n"
# Characters of a few tokens are enough to see one: longer tokens hold it whole.
_LOOK_BACK = 4


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature: 0 takes the most likely token; then, of what penalties leave, the top_k most likely (0: all),
    those that are at least min_p times as likely as the most likely one, and the most likely that make up top_p (Holtzman et al. 2019,
    arXiv:1904.09751).
    presence, repetition: taken off the logit of a token that the answer has already, once and for each time; a time counts
    decay times as much with each token that follows."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.0
    repetition: float = 0.0
    decay: float = 1.0


class Sampler:
    """Draws the next tokens of n answers, and remembers what each of them has."""

    def __init__(self, sampling: Sampling, n: int, vocab_size: int, generator: torch.Generator) -> None:
        self.sampling, self.generator = sampling, generator
        # Without penalties nothing needs to be remembered.
        n_remembered = n if sampling.presence or sampling.repetition else 0
        self.counts = torch.zeros(n_remembered, vocab_size)
        self.is_present = torch.zeros(n_remembered, vocab_size, dtype=torch.bool)

    def draw(self, logits: Tensor) -> Tensor:
        """int64 [n] of logits [n, V]. Nothing is drawn that the tokenizer could not decode."""
        s, logits = self.sampling, logits.float().cpu().clone()
        logits[:, LAST_TOKEN + 1 :] = -torch.inf
        if len(self.counts):
            logits -= s.presence * self.is_present + s.repetition * self.counts
        tokens = logits.argmax(1) if s.temperature == 0 else self._sampled(logits / s.temperature)
        if len(self.counts):
            rows = torch.arange(len(tokens))
            self.counts.mul_(s.decay)
            self.counts[rows, tokens] += 1
            self.is_present[rows, tokens] = True
        return tokens

    def keep(self, rows: list[int]) -> None:
        """Forgets the other answers."""
        if len(self.counts):
            self.counts, self.is_present = self.counts[rows], self.is_present[rows]

    def _sampled(self, logits: Tensor) -> Tensor:
        s = self.sampling
        probabilities, tokens = torch.softmax(logits, 1).sort(dim=1, descending=True)
        if s.top_k:
            probabilities[:, s.top_k :] = 0
        probabilities[probabilities < s.min_p * probabilities[:, :1]] = 0
        probabilities[probabilities.cumsum(1) - probabilities > s.top_p * probabilities.sum(1, keepdim=True)] = 0
        return tokens.gather(1, torch.multinomial(probabilities, 1, generator=self.generator))[:, 0]


@torch.no_grad()
def read(model: RWKV, sequences: Sequence[Sequence[int]], states: States | None = None) -> tuple[Tensor, States]:
    """Logits [n, V] after the last token of each sequence (of at least one token), and the states there; states: those to begin with."""
    builder = ForestBuilder()
    for tokens in sequences:
        builder.add(np.array(tokens))
    forest = builder.build()[0].to(model.head.weight.device)
    hidden, states = model(forest, states)
    return model.head(hidden[forest.last_rows]), states


def select(states: States, rows: Sequence[int]) -> States:
    """Those of some sequences, in that order, one perhaps several times."""
    numbers = torch.tensor(rows, device=states[0].wkv.device)
    return [LayerState(*(part.index_select(0, numbers) for part in layer)) for layer in states]


def answers(
    model: RWKV, tokenizer: WorldTokenizer, prompts: Sequence[str], n: int, sampling: Sampling, max_tokens: int, seed: int
) -> list[list[str]]:
    """n answers to each prompt, each up to a blank line, the end of a document, or max_tokens. All are drawn in one batch, of states that
    fork where their prompt ends."""
    if not max_tokens or not prompts:
        return [[""] * n for _ in prompts]
    logits, states = read(model, [tokenizer.encode(prompt) for prompt in prompts])
    forks = [i for i in range(len(prompts)) for _ in range(n)]
    logits, states = logits[forks], select(states, forks)
    sampler = Sampler(sampling, len(forks), logits.shape[1], torch.Generator().manual_seed(seed))
    found: list[list[int]] = [[] for _ in forks]
    going = list(range(len(forks)))
    while going:
        tokens = sampler.draw(logits).tolist()
        for i, token in zip(going, tokens, strict=True):
            found[i] += [token] if token != DOCUMENT_END else []
        rows = [k for k, i in enumerate(going) if tokens[k] != DOCUMENT_END and not _is_done(tokenizer, found[i], max_tokens)]
        going = [going[k] for k in rows]
        if going:
            sampler.keep(rows)
            logits, states = read(model, [[tokens[k]] for k in rows], select(states, rows))
    texts = [tokenizer.decode(tokens).strip() for tokens in found]
    return [texts[n * i : n * (i + 1)] for i in range(len(prompts))]


def generate(model: RWKV, tokenizer: WorldTokenizer, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int) -> str:
    """One answer to one prompt."""
    return answers(model, tokenizer, [prompt], 1, Sampling(temperature, top_p), max_tokens, seed)[0][0]


def stream(
    model: RWKV, logits: Tensor, states: States, sampler: Sampler, max_tokens: int, tokenizer: WorldTokenizer
) -> Iterator[tuple[int, States]]:
    """The tokens of one answer as they are drawn, each with the states after it; ends as answers do."""
    found: list[int] = []
    while len(found) < max_tokens:
        token = int(sampler.draw(logits))
        if token == DOCUMENT_END:
            return
        found.append(token)
        logits, states = read(model, [[token]], states)
        yield token, states
        if _is_done(tokenizer, found, max_tokens):
            return


def _is_done(tokenizer: WorldTokenizer, found: list[int], max_tokens: int) -> bool:
    return len(found) >= max_tokens or TURN_END in tokenizer.decode(found[-_LOOK_BACK:])
