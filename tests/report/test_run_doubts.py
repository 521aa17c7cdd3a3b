"""Each known failure is told where the records show it, and not just below."""

import pytest
from rwkv_dpo.report.columns import Columns
from rwkv_dpo.report.run_doubts import SATURATED, run_doubts

FLAGS = {"dpo_loss": "sigmoid"}


def held_out(*values: dict) -> Columns:
    return Columns({"step": 10 * i, **value} for i, value in enumerate(values))


def train(n: int = 60, **figures) -> Columns:
    """figures: a number, or a function of the step's place from 0 to 1."""
    return Columns(
        {"step": i + 1, **{name: value(i / (n - 1)) if callable(value) else value for name, value in figures.items()}} for i in range(n)
    )


def names(steps=None, evaluations=None, flags=FLAGS) -> set[str]:
    return set(run_doubts(steps or Columns(), evaluations or Columns(), flags))


def falls(chosen, rejected, accuracy=0.9):
    first = {"logps/chosen": -100.0, "logps/rejected": -120.0, "rewards/accuracies": 0.5}
    return held_out(first, {}, {"logps/chosen": chosen, "logps/rejected": rejected, "rewards/accuracies": accuracy})


def test_accuracy_that_rises_while_both_log_probabilities_fall():
    """By more than a tenth, and 5 nats."""
    assert names(evaluations=falls(-110.1, -132.1)) == {"falling"}
    assert names(evaluations=falls(-109.9, -132.1)) == names(evaluations=falls(-110.1, -131.9)) == set()
    assert names(evaluations=falls(-110.1, -132.1, accuracy=0.5)) == set()
    short = [{"logps/chosen": value, "logps/rejected": value, "rewards/accuracies": 0.5 - value / 100} for value in (-20.0, -24.9, -25.1)]
    assert names(evaluations=held_out(*short[:2])) == set()
    assert names(evaluations=held_out(short[0], short[2])) == {"falling"}
    line = run_doubts(Columns(), falls(-150.0, -200.0), FLAGS)["falling"]
    assert "from 0.50 to 0.90" in line
    assert "chosen answers from -100.0 to -150.0 and those of rejected answers from -120.0 to -200.0 nats" in line
    assert all(flag in line for flag in ("--lr_init", "--dpo_beta", "--dpo_loss dpop", "sigmoid,sft"))


def test_without_evaluations_the_first_and_last_steps_say_it():
    """Two stretches of 20 steps of 60 each, that have nothing in common: a fall of 30 over all is one of 20 between their middles."""
    falling = {"logps/chosen": lambda x: -100 - 30 * x, "logps/rejected": lambda x: -100 - 30 * x}
    assert names(train(**falling, **{"rewards/accuracies": lambda x: x})) == {"falling"}
    assert names(train(39, **falling, **{"rewards/accuracies": lambda x: x})) == set()
    assert names(train(**falling, **{"rewards/accuracies": lambda x: 1 - x})) == set()


def test_a_corpus_loss_that_rises_by_a_tenth():
    assert names(evaluations=held_out({"corpus_loss": 2.0}, {"corpus_loss": 2.21})) == {"forgetting"}
    assert names(evaluations=held_out({"corpus_loss": 2.0}, {"corpus_loss": 2.19})) == set()
    # Of training windows, without evaluations: from 2 to 2.4 over 60 steps, means of 20 lie 0.271 apart, of 2.064.
    assert names(train(loss_general=lambda x: 2 + 0.4 * x)) == {"forgetting"}
    assert names(train(loss_general=lambda x: 2 + 0.3 * x)) == set()
    (line,) = run_doubts(Columns(), held_out({"corpus_loss": 2.0}, {"corpus_loss": 3.0}), FLAGS).values()
    assert "risen by 50%, from 2.000 to 3.000" in line
    assert "--dpo_general_corpus_ratio" in line


def test_margins_beyond_which_nothing_is_left_to_learn():
    def saturated(margin, accuracy=1.0, loss="sigmoid"):
        return names(train(**{"rewards/margins": margin, "rewards/accuracies": accuracy}), flags={"dpo_loss": loss})

    assert pytest.approx(4.595, abs=1e-3) == SATURATED
    assert saturated(4.6) == saturated(4.6, loss="dpop, sft") == {"saturated"}
    assert saturated(4.59) == saturated(9.0, accuracy=0.97) == set()
    # Their gradients don't vanish so.
    assert saturated(9.0, loss="ipo") == saturated(9.0, loss="simpo") == set()
    (line,) = run_doubts(train(**{"rewards/margins": 6.0, "rewards/accuracies": 1.0}), Columns(), FLAGS).values()
    assert "6.0 on average" in line
    assert "--epoch_count" in line
    assert "--dpo_beta" in line


def test_preferred_answers_that_lengthen_against_the_chosen_ones():
    def lengthens(to, chosen=100.0):
        lengths = ((90, 100), (to, chosen))
        return names(evaluations=held_out(*({"lengths/preferred": one, "lengths/chosen": other} for one, other in lengths)))

    assert lengthens(109) == {"lengthening"}
    assert lengthens(107) == lengthens(109, chosen=110.0) == set()
    (line,) = run_doubts(Columns(), held_out(*({"lengths/preferred": n, "lengths/chosen": 100} for n in (90, 180))), FLAGS).values()
    assert "from 0.90 to 1.80 times" in line
    assert "--dpo_loss sigmoid_norm" in line


def test_training_pairs_that_are_known_by_heart():
    def overfits(seen, found, high, n=60):
        evaluation = {"rewards/accuracies": found, "rewards/accuracies_95": [0.0, high]}
        return names(train(n, **{"rewards/accuracies": seen}), held_out(evaluation))

    assert overfits(0.95, 0.79, 0.9) == {"overfitting"}
    assert overfits(0.95, 0.81, 0.9) == set()
    # So few held-out pairs that it may be chance; so few steps that they say nothing.
    assert overfits(0.95, 0.75, 0.96) == overfits(0.95, 0.7, 0.8, n=39) == set()
    (line,) = run_doubts(train(**{"rewards/accuracies": 1.0}), held_out({"rewards/accuracies": 0.6}), FLAGS).values()
    assert "1.00 on training pairs and 0.60 on held-out ones" in line
    assert "--keep_best" in line


def test_nothing_is_said_of_nothing_and_of_a_run_that_is_well():
    assert names() == names(Columns(), held_out({"pairs": 3})) == set()
    well = {"logps/chosen": -30.0, "rewards/accuracies": 0.8, "rewards/margins": 1.0, "loss_general": 0.6}
    assert names(train(**well), held_out({**well, "corpus_loss": 0.6}, {**well, "corpus_loss": 0.55})) == set()
