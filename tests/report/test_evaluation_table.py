"""The table of an evaluation, line by line."""

import copy

from rwkv_dpo.report.evaluation_table import as_table

SHARES = {"much shorter": None, "shorter": 0.5, "about equal": 1.0, "longer": 0.25, "much longer": 0.0}


def figures(is_scored: bool = True, **changes) -> dict:
    keys = ("logps", "rewards") if is_scored else ("logps",)
    groups = [{"chosen_is": name, "pairs": 1200, "accuracies": dict.fromkeys(keys, share)} for name, share in SHARES.items()]
    names = ["logps/accuracies", "logps/margins", *(["rewards/accuracies", "rewards/margins"] if is_scored else [])]
    scored = {"dpo_beta": 0.1, "calibration": {"ece": 0.04, "brier": 0.2, "log_loss": 0.6}} if is_scored else {}
    lengths = {"groups": groups, "longer_is_chosen": 0.625, "correlations": dict.fromkeys(keys, -0.5)}
    rest = {"n_pairs": 6000, "n_prompts": 3000, "lengths": lengths, "intervals": {name: [0.25, 0.75] for name in names}}
    return {**dict.fromkeys(names, 0.5), **scored, **rest, **changes}


def lines_of(*reports: dict) -> dict[str, list[str]]:
    """The cells by their label."""
    return {line[:26].strip(): line[26:].split() for line in as_table(reports).splitlines() if line}


def test_one_checkpoint_on_one_file():
    table = as_table([{"checkpoint": "a/out/rwkv-final.pth", "pairs": {"testset.save": figures()}}])
    assert table == """\
                             out/rwkv-final.pth
preference accuracy                       0.500
  95 % interval                  0.250 to 0.750
mean margin (nats)                        +0.50
  95 % interval                  +0.25 to +0.75
reward accuracy                           0.500
  95 % interval                  0.250 to 0.750
reward margin                            +0.500
  95 % interval                +0.250 to +0.750
beta of the rewards                         0.1
calibration error (ECE)                   0.040
Brier score                               0.200
log loss (nats)                           0.600
accuracy, if chosen is      preference / reward
  much shorter (1,200)                    - / -
  shorter (1,200)                 0.500 / 0.500
  about equal (1,200)             1.000 / 1.000
  longer (1,200)                  0.250 / 0.250
  much longer (1,200)             0.000 / 0.000
longer answer is chosen                   0.625
r of margin and length                    -0.50
r of reward and length                    -0.50"""


def test_differences_are_of_the_columns_after_the_first():
    apart = {"logps/accuracies": {"mean": 0.1, "interval": [0.05, 0.15]}, "logps/margins": {"mean": 1, "interval": None}}
    reports = [{"checkpoint": name, "pairs": {"p": figures(differences=apart if name != "m0" else {})}} for name in ("m0", "m1")]
    table = as_table(reports).splitlines()
    first, *others = [line for line in table if line.startswith("  more than the first by")]
    assert first.split()[5:] == ["+0.050", "to", "+0.150"]
    assert first.endswith("+0.050 to +0.150")
    assert others == []
    assert as_table([{**reports[0]}]).count("more than") == 0


def test_what_is_not_known_leaves_its_place_empty():
    unscored = figures(is_scored=False, intervals={"logps/accuracies": None, "logps/margins": None})
    unscored["lengths"]["correlations"]["logps"] = None
    lines = lines_of({"checkpoint": "m0", "pairs": {"p": unscored}})
    assert lines["95 % interval"] == []
    assert lines["r of margin and length"] == ["-"]
    assert not [label for label in lines if "reward" in label or "calibration" in label]
    both = [{"checkpoint": "m0", "pairs": {"p": figures()}}, {"checkpoint": "m1", "pairs": {"p": figures(calibration=None)}}]
    assert lines_of(*both)["Brier score"] == ["0.200", "-"]


def test_files_have_a_block_each_under_their_name():
    corpus = {"corpus_loss": 2.0, "corpus_perplexity": 7.389, "n_windows": 12, "intervals": {"corpus_loss": [1.9, 2.1]}}
    other = {**corpus, "corpus_loss": 1.0, "kl": 0.125, "intervals": {"corpus_loss": [0.9, 1.1], "kl": [0.1, 0.2]}}
    other["differences"] = {"corpus_loss": {"mean": -1.0, "interval": [-1.1, -0.9]}}
    reports = [
        {"checkpoint": "m0", "pairs": {"a.save": figures(), "b.save": figures()}, "corpora": {"c": {**corpus, "kl": 0.0}, "d": corpus}},
        {"checkpoint": "m1", "pairs": {"a.save": figures(), "b.save": figures()}, "corpora": {"c": other, "d": corpus}},
    ]
    table = as_table(reports)
    heads = ["a.save: 6,000 pairs of 3,000 prompts", "b.save: 6,000 pairs of 3,000 prompts", "c: 12 windows", "d: 12 windows"]
    assert [line for line in table.splitlines() if line.startswith(("a", "b.", "c:", "d:")) and "accuracy," not in line] == heads
    block = table.split("c: 12 windows\n")[1].split("\n\nd:")[0]
    assert [line.split() for line in block.splitlines()] == [
        ["corpus", "loss", "(nats/token)", "2.0000", "1.0000"],
        ["95", "%", "interval", "1.9000", "to", "2.1000", "0.9000", "to", "1.1000"],
        ["more", "than", "the", "first", "by", "-1.1000", "to", "-0.9000"],
        ["corpus", "perplexity", "7.39", "7.39"],
        ["change", "of", "corpus", "loss", "+0.0", "%", "-50.0", "%"],
        ["KL", "to", "the", "first", "column", "0.0000", "0.1250"],
        ["95", "%", "interval", "0.1000", "to", "0.2000"],
    ]
    alone = copy.deepcopy(reports)
    for report in alone:
        del report["pairs"]["b.save"], report["corpora"]["d"]
    assert not [head for head in heads if head in as_table(alone)]


def test_answers_stand_below_by_prompt():
    reports = [{"checkpoint": name, "answers": [{"prompt": "Why?", "answer": f"{name} says so."}]} for name in ("m0", "m1")]
    assert as_table(reports).endswith("\n\nm0 answers:\n  m0 says so.\n\nm1 answers:\n  m1 says so.")
    for report in reports:
        report["answers"].append({"prompt": "How?\n", "answer": "Thus."})
    assert as_table(reports).endswith("\n\nUser: How?\n\nm0 answers:\n  Thus.\n\nm1 answers:\n  Thus.")
    assert "\n\nUser: Why?\n\nm0 answers:\n  m0 says so." in as_table(reports)
