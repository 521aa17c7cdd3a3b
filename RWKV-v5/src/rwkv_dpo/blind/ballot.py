"""What a judge sees and may do, for any page or terminal. Which model is which does not leave it before the end."""

from collections.abc import Callable, Sequence
from typing import Any

from rwkv_dpo.blind.cards import Card
from rwkv_dpo.blind.votes import CHOICES, Votes

QUESTION, JUDGED, ENDED = "question", "judged", "ended"


class Ballot:
    """Asks those cards, in their order, whose answers differ. result: what is shown of the votes at the end, as JSON values."""

    def __init__(self, cards: Sequence[Card], votes: Votes, result: Callable[[], dict[str, Any]]) -> None:
        self._cards, self._votes, self._result = cards, votes, result
        self._asked = [number for number, card in enumerate(cards, start=1) if card.is_asked]

    @property
    def current(self) -> int | None:
        """The number of the question that is to be judged; None when all are."""
        return next((number for number in self._asked if number not in self._votes.choices), None)

    def view(self) -> dict[str, Any]:
        """What may be seen now, as JSON values: "phase" QUESTION with the question and both answers, JUDGED with nothing but counts, or
        ENDED with the result."""
        progress = {"judged": len(self._votes.choices), "questions": len(self._asked)}
        if self._votes.is_ended:
            return {"phase": ENDED, **progress, "result": self._result()}
        if (number := self.current) is None:
            return {"phase": JUDGED, **progress}
        card = self._cards[number - 1]
        of_question = {"number": number, "prompt": card.question.prompt, "language": card.question.language}
        return {"phase": QUESTION, **progress, **of_question, "A": card.side("A"), "B": card.side("B")}

    def vote(self, number: object, choice: object) -> bool:
        """False for what is not the current question, as from a page that is behind, or no choice. InputError when it can't be kept."""
        if self._votes.is_ended or number != self.current or type(number) is not int or choice not in CHOICES:
            return False
        self._votes.vote(number, str(choice))
        return True

    def undo(self) -> bool:
        """False at the end, when the judge has seen which model is which. InputError as of vote."""
        if not self._votes.is_ended:
            self._votes.undo()
        return not self._votes.is_ended

    def end(self) -> None:
        """Once and for all: the result tells more than a judge may know. InputError as of vote."""
        if not self._votes.is_ended:
            self._votes.end()
