#!/usr/bin/env python3
"""Speed of the data commands on a CPU, into benchmarks/results/data_cpu.json.

    python benchmarks/bench_data.py [--parts make_data pairs scoring] [--repeats 3] [--megabytes 64] [--rows 62000]

make_data.py, started as a program, against a loop over the pure Python tokenizer of the package `rwkv` with the same reader and
writer; preparing UltraFeedback-like rows, in a process of its own so that its memory can be told; loading the pairs; scoring pairs
under a reference, of 256/200/150 tokens (the lengths of the other benchmarks) and of UltraFeedback's lengths, against the original's
way (a full forward of prompt + answer for each answer, full logits). All text is made up here, of the vocabulary's own words. Both
sides have to give the same corpora, and the same log-probabilities, or nothing is timed.

Scoring is timed in processes that take turns: "stock" has torch's default settings, "tuned" those that prepare_pairs.py makes.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "RWKV-v5" / "src"))

import bench_step  # noqa: E402 (the path above makes the package importable without installing it)
import measure  # noqa: E402 (as above)
import numpy as np  # noqa: E402 (as above)
import original_way  # noqa: E402 (as above)
import pyrwkv_tokenizer  # noqa: E402 (as above)
import torch  # noqa: E402 (as above)
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER  # noqa: E402 (as above)
from rwkv_dpo.batches.sampling import item_at  # noqa: E402 (as above)
from rwkv_dpo.data.binidx import write_binidx  # noqa: E402 (as above)
from rwkv_dpo.data.documents import open_documents  # noqa: E402 (as above)
from rwkv_dpo.data.pair_files import load_pairs, save_pairs  # noqa: E402 (as above)
from rwkv_dpo.data.pairs import Pair, pack_pairs  # noqa: E402 (as above)
from rwkv_dpo.data.prepare import prepare  # noqa: E402 (as above)
from rwkv_dpo.data.sources import read_preferences  # noqa: E402 (as above)
from rwkv_dpo.data.splits import split_rows  # noqa: E402 (as above)
from rwkv_dpo.data.tokenizer import VOCAB_SIZE, WorldTokenizer  # noqa: E402 (as above)
from rwkv_dpo.devices.device import tune_cpu  # noqa: E402 (as above)
from rwkv_dpo.evaluation.scoring import score_pairs  # noqa: E402 (as above)
from rwkv_dpo.model.shape import ModelShape  # noqa: E402 (as above)

VOCABULARY = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
LENGTHS = ("256/200/150", "UltraFeedback")
MARKS = {
    "make_data": {"times": 6},
    "pairs": {"prepare_seconds": 60, "prepare_peak_gb": 2, "load_seconds": 1},
    "scoring": {"times fp32": 1.7, "times bf16": 1.7, "times bf16 against fp32": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=64, help="of text for make_data")
    parser.add_argument("--rows", type=int, default=62_000, help="preferences to prepare")
    parser.add_argument("--prepare", nargs=2, type=Path, metavar=("ROWS", "PAIRS"), help=argparse.SUPPRESS)
    parser.add_argument("--n_layer", type=int, default=12, help="of the reference")
    parser.add_argument("--n_embd", type=int, default=768, help="of the reference")
    parser.add_argument("--scored_pairs", type=int, default=16)
    parser.add_argument("--score", nargs=4, metavar=("LENGTHS", "WAY", "PRECISION", "SETTINGS"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.score:
        print(scoring_seconds(flags))
        return
    if flags.prepare:
        print(json.dumps(prepared(*flags.prepare)))
        return
    for part in flags.parts:
        # A busy machine slows a program of several processes more than one of one: the reader must be able to see it.
        load = round(os.getloadavg()[0], 2)
        with tempfile.TemporaryDirectory() as folder:
            measured = PARTS[part](Path(folder), flags)
        print(part, *(f"{name}: {value}" for name, value in measured.items()), sep="\n  ", flush=True)
        measure.save("data_cpu", {part: {"load_average_before": load, "marks": MARKS[part], **measured}})


def time_make_data(folder: Path, flags: argparse.Namespace) -> dict[str, object]:
    source = folder / "corpus.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents(made_up_text(0, flags.megabytes * 10**6)))
    trie = TRIE_TOKENIZER(str(VOCABULARY))

    def loop() -> None:
        encoded = [np.array([*trie.encode(text), 0], dtype=np.uint16) for text in open_documents(str(source))]
        write_binidx(folder / "loop", (encoded[item_at(i, len(encoded), 0)] for i in range(len(encoded))))

    def make_data() -> None:
        command: list[str | Path] = [sys.executable, ROOT / "RWKV-v5" / "make_data.py", source, "1", "--out", folder / "command"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    loop()
    make_data()
    for ending in ("bin", "idx"):
        if (folder / f"loop.{ending}").read_bytes() != (folder / f"command.{ending}").read_bytes():
            sys.exit(f"the two tokenizers make different .{ending} files, so nothing is measured")
    n_tokens = (folder / "loop.bin").stat().st_size // 2
    medians = measure.alternate({"loop": loop, "make_data": make_data}, flags.repeats, warmup=0)
    return {
        "corpus": f"{source.stat().st_size} bytes of .jsonl, {n_tokens} tokens",
        "tokens_per_s": {name: round(n_tokens / seconds) for name, seconds in medians.items()},
        "times": round(medians["loop"] / medians["make_data"], 2),
    }


def time_pairs(folder: Path, flags: argparse.Namespace) -> dict[str, object]:
    rows, pairs = folder / "rows.jsonl", folder / "pairs.save"
    with open(rows, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ultrafeedback_rows(flags.rows))
    command: list[str | Path] = [sys.executable, __file__, "--prepare", rows, pairs]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    medians = measure.alternate({"load": lambda: load_pairs(pairs, VOCAB_SIZE)}, max(3, flags.repeats))
    sizes = {"rows_file": f"{rows.stat().st_size} bytes of .jsonl", "pairs_file": f"{pairs.stat().st_size} bytes"}
    return {**sizes, **json.loads(child.stdout), "load_seconds": round(medians["load"], 3)}


def prepared(rows: Path, pairs: Path) -> dict[str, object]:
    """Rows to split pairs, in this process: how long it took and the most memory it had."""
    start = time.perf_counter()
    made = prepare(read_preferences(rows), WorldTokenizer(), ctx_len=4096, templates="mix", seed=0)
    splits = split_rows(made.prompt_keys, valid_ratio=0.1, test_ratio=0.1, seed=0)
    seconds = time.perf_counter() - start
    # Linux counts kilobytes; saving comes after.
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    save_pairs(pairs, made.pairs)
    return {
        "pairs": {name: len(split) for name, split in splits.items()},
        "pair_tokens": len(made.pairs.tokens),
        "prepare_seconds": round(seconds, 2),
        "prepare_peak_gb": round(peak_gb, 3),
    }


def time_scoring(folder: Path, flags: argparse.Namespace) -> dict[str, object]:
    check_scoring_parity()
    model = f"{flags.n_layer} layers, {flags.n_embd} wide, vocabulary {VOCAB_SIZE}"
    return {"model": model, **{lengths: time_scoring_of(lengths, flags) for lengths in LENGTHS}}


def time_scoring_of(lengths: str, flags: argparse.Namespace) -> dict[str, object]:
    jobs = [(way, precision, "stock") for precision in ("fp32", "bf16") for way in ("original", "ours")]
    jobs += [("ours", precision, "tuned") for precision in ("fp32", "bf16")]
    times: dict[str, list[float]] = {" ".join(job): [] for job in jobs}
    for _ in range(flags.repeats):
        for job in times:
            command = [sys.executable, __file__, *sys.argv[1:], "--score", lengths, *job.split()]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            times[job].append(float(child.stdout.splitlines()[-1]))
    seconds = {job: median(values) for job, values in times.items()}
    means = np.mean([[len(part) for part in pair] for pair in scored_pairs(lengths, flags.scored_pairs)], axis=0)
    return {
        "pairs": f"{flags.scored_pairs}, mean tokens of prompt, chosen, rejected: {' '.join(f'{n:.0f}' for n in means)}",
        "ms_per_pair": {job: round(1000 * value / flags.scored_pairs, 1) for job, value in seconds.items()},
        "times fp32": round(seconds["original fp32 stock"] / seconds["ours fp32 stock"], 2),
        "times bf16": round(seconds["original bf16 stock"] / seconds["ours bf16 stock"], 2),
        "times fp32, ours tuned": round(seconds["original fp32 stock"] / seconds["ours fp32 tuned"], 2),
        "times bf16, ours tuned": round(seconds["original bf16 stock"] / seconds["ours bf16 tuned"], 2),
        "times bf16 against fp32": round(seconds["original fp32 stock"] / seconds["ours bf16 tuned"], 2),
    }


def check_scoring_parity() -> None:
    """Both ways on a small model in fp32, to 1e-3 nats in sums of some 100; some pairs share their prompt."""
    model = original_way.build("original", ModelShape(2, 128, 128, 448, 512), "fp32", "auto", torch.device("cpu"))
    pairs = measure.make_pairs((20, 17, 9), 5, 512)
    pairs += [(pairs[0][0], *pair[1:]) for pair in pairs[1:3]]
    with torch.no_grad():
        original = [[original_way.original_answer_logp(model, prompt, answer).item() for answer in answers] for prompt, *answers in pairs]
    worst = np.abs(score_pairs(model, pack_pairs(pairs), 60) - np.array(original)).max()
    if not worst < 1e-3:
        sys.exit(f"the two ways of scoring differ by {worst:.1e} nats, so nothing is measured")


def scored_pairs(lengths: str, n: int) -> list[Pair]:
    """Random tokens in the lengths asked for; UltraFeedback's are those of ultrafeedback_rows: exponential, with means of 175 tokens
    for prompts and 350, 300 for answers."""
    if lengths in bench_step.CASES:
        return measure.make_pairs(bench_step.CASES[lengths], n, VOCAB_SIZE)
    draw = np.random.default_rng(0)
    drawn = (20 + draw.exponential((155, 330, 280), (n, 3))).astype(int).clip(max=1500)
    prompt, chosen, rejected = ([draw.integers(1, VOCAB_SIZE, length) for length in column] for column in drawn.T)
    return list(zip(prompt, chosen, rejected, strict=True))


def scoring_seconds(flags: argparse.Namespace) -> float:
    """One way, in this process."""
    lengths, way, precision, settings = flags.score
    if settings == "tuned":
        tune_cpu(keep_memory=True)
    shape = ModelShape(flags.n_layer, flags.n_embd, flags.n_embd, int(flags.n_embd * 3.5) // 32 * 32, VOCAB_SIZE)
    model = original_way.build("original" if way == "original" else "forest", shape, precision, "auto", torch.device("cpu"))
    pairs = scored_pairs(lengths, flags.scored_pairs)

    def run(pairs: list[Pair]) -> None:
        if way == "original":
            original_way.score_original(model, pairs)
        else:
            score_pairs(model, pack_pairs(pairs), 8192)

    run(pairs[:2])
    return measure.alternate({way: lambda: run(pairs)}, 1, warmup=0)[way]


def made_up_text(seed: int, n_bytes: int) -> str:
    """The vocabulary's words, short ones more often than long ones, with numbers, punctuation and some Chinese: 4.2 bytes a token,
    where written English has 4.7."""
    lines = VOCABULARY.read_text("utf-8").splitlines()
    latin = [word for line in lines if (word := " ".join(line.split(" ")[1:-1])[1:-1]) and re.fullmatch(r" [A-Za-z]+", word)]
    han = [word for line in lines if (word := line.split(" ")[1].strip("'")) and re.fullmatch(r"[\u4e00-\u9fff]+", word)]
    draw = random.Random(seed)
    latin.sort(key=lambda word: len(word) + draw.randrange(26))
    words = [*latin, *(f" {n}" for n in range(1900, 2030)), *han, ",", ".", ".\n", ' "', "ly", "ed", "\n\n", "; ", " (", ")"]
    weights = [1 / (10 + i) for i in range(len(latin))] + [1e-4] * 130 + [5e-5] * len(han) + [0.4, 0.4] + [0.04] * 8
    parts: list[str] = []
    size = 0
    while size < n_bytes:
        paragraph = "".join(draw.choices(words, weights, k=10_000))
        parts.append(paragraph)
        size += len(paragraph.encode())
    return "".join(parts)


def documents(text: str) -> Iterator[str]:
    """Cut into pieces of 200 to 5,000 characters."""
    draw, start = random.Random(1), 0
    while start < len(text):
        yield text[start : (start := start + draw.randrange(200, 5000))]


def ultrafeedback_rows(n: int) -> Iterator[dict[str, object]]:
    """Rows with the columns and about the sizes of HuggingFaceH4/ultrafeedback_binarized."""
    text, draw = made_up_text(2, 8 * 10**6), random.Random(3)

    def piece(mean: int) -> str:
        start = draw.randrange(len(text) - 20_000)
        return text[start : start + 20 + min(19_000, int(draw.expovariate(1 / mean)))]

    for i in range(n):
        prompt = piece(700)
        chosen, rejected = ([{"content": prompt, "role": "user"}, {"content": piece(mean), "role": "assistant"}] for mean in (1400, 1200))
        scores = {"score_chosen": draw.randrange(6, 11) / 1.0, "score_rejected": draw.randrange(1, 12) / 2.0}
        yield {"prompt": prompt, "prompt_id": f"{i:064x}", "chosen": chosen, "rejected": rejected, "messages": chosen, **scores}


PARTS = {"make_data": time_make_data, "pairs": time_pairs, "scoring": time_scoring}

if __name__ == "__main__":
    main()
