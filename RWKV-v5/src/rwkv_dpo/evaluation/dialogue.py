"""A dialogue with a model: the state after every turn is kept, so that a turn costs its own tokens and no more."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rwkv_dpo.data.prompts import clean
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.evaluation.generate import TURN_END, Sampler, Sampling, States, read, stream
from rwkv_dpo.model.rwkv import RWKV

_CUE = f"{TURN_END}Assistant:"


@dataclass(frozen=True)
class _Moment:
    """After a turn: the states, what of the text they have not read, and the messages so far."""

    states: States | None
    unread: str
    messages: tuple[dict[str, str], ...]


class Dialogue:
    """User and assistant by turns, in the chat template that prepare_pairs.py writes."""

    def __init__(self, model: RWKV, tokenizer: WorldTokenizer, sampling: Sampling, max_tokens: int, seed: int, system: str = "") -> None:
        self.model, self.tokenizer, self.sampling, self.max_tokens = model, tokenizer, sampling, max_tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.moments: list[_Moment] = []
        self.reset(system)

    @property
    def messages(self) -> list[dict[str, str]]:
        """[{"role": "user", "content": "Hi"}, ...], the system's first."""
        return list(self.moments[-1].messages)

    def reset(self, system: str = "") -> None:
        """Begins a new dialogue, with a system message or without one."""
        text = clean(system)
        messages = ({"role": "system", "content": text},) if text else ()
        self.moments = [_Moment(None, f"System: {text}{TURN_END}" if text else "", messages)]

    def undo(self) -> bool:
        """Takes the last turn back; whether there was one."""
        if len(self.moments) > 1:
            self.moments.pop()
            return True
        return False

    def retry(self) -> Iterator[str]:
        """Another answer to the last question, as say gives it. Nothing without one."""
        if len(self.moments) > 1:
            question = self.messages[-2]["content"]
            self.undo()
            yield from self.say(question)

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. A dialogue that is left before its end has not had this turn."""
        before = self.moments[-1]
        question = clean(text)
        prompt = self.tokenizer.encode(f"{before.unread}User: {question}{_CUE}")
        logits, states = read(self.model, [prompt], before.states)
        sampler = Sampler(self.sampling, 1, logits.shape[1], self.generator)
        tokens: list[int] = []
        shown = ""
        for token, after in stream(self.model, logits, states, sampler, self.max_tokens, self.tokenizer):
            tokens.append(token)
            states = after
            said = self.tokenizer.decode(tokens).partition(TURN_END)[0].lstrip()
            # A character may take several tokens; a blank line at the end may be the answer's.
            if not said.endswith(("\ufffd", "\n")):
                yield said[len(shown) :]
                shown = said
        raw = self.tokenizer.decode(tokens)
        answer = raw.partition(TURN_END)[0].strip()
        if answer.startswith(shown):
            yield answer[len(shown) :]
        # What the states have not read of what closes the turn.
        n_newlines = min(len(raw) - len(raw.rstrip("\n")), len(TURN_END))
        turn = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        self.moments.append(_Moment(states, TURN_END[n_newlines:], (*before.messages, *turn)))
