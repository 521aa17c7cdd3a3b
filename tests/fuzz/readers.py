"""Every reader of a file or of flags: how it is called, valid inputs made by our own writers, hostile ones, and how inputs are changed."""

import io
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data import documents, prompts, sources, text_corpus
from rwkv_dpo.data.binidx import DTYPES, read_binidx, write_binidx
from rwkv_dpo.data.corpus import open_corpus
from rwkv_dpo.data.pair_files import load_pairs, save_original, save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.trees import grow

from fuzz import evil, mutations
from fuzz.mutations import Mutator, join


@dataclass(frozen=True)
class Reader:
    """`read` takes the path of the input, which ends with `suffix`, and looks at all that it gets; `share` of a campaign's inputs."""

    suffix: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    mutate: Mutator
    evil: Callable[[], dict[str, bytes]] = dict
    is_packed: bool = False
    share: int = 1


def _read_binidx(path: Path) -> None:
    corpus = read_binidx(path.with_suffix(""))
    assert corpus.tokens.nbytes == Path(f"{path.with_suffix('')}.bin").stat().st_size
    assert sum(len(corpus.document(i)) for i in range(len(corpus))) == len(corpus.tokens)
    _read_corpus(path.with_suffix(""), "binidx", 100)


def _read_corpus(path: Path, data_type: str, vocab_size: int) -> None:
    corpus = open_corpus(str(path), data_type, vocab_size, 2)
    for start in (0, corpus.n_tokens - 3):
        window = corpus.window(start, 3)
        assert window.min() >= 0
        assert window.max() < corpus.vocab_size
    assert len(corpus.characters) <= corpus.vocab_size


def _read_vocabulary(path: Path) -> None:
    characters = text_corpus.read_vocabulary(path)
    numbers, _ = text_corpus.character_tokens("cab", characters, "a text", path)
    assert [characters[number] for number in numbers] == list("cab")


def _read_pairs(path: Path) -> None:
    pairs = load_pairs(path, 100)
    n = sum(len(row) for i in range(len(pairs)) for row in pairs.pair(i))
    # A row of a tree is in several pairs.
    assert n >= len(pairs.tokens) <= 7 * path.stat().st_size
    assert n == len(pairs.tokens) or not pairs.is_plain


def _read_weights(path: Path) -> None:
    import safetensors.torch  # noqa: F401 (the reader imports it at the first file that looks like one, which the guard would see)
    import torch
    from rwkv_dpo.kernels.backends import choose_backend
    from rwkv_dpo.model.checkpoint import empty_model, load_into, read_weights, shape_of

    weights = read_weights(path)
    assert sum(value.numel() * value.element_size() for value in weights.values()) <= path.stat().st_size
    for value in weights.values():
        value.float().sum()  # reads all of it
    shape = shape_of(weights, path)
    model = empty_model(shape, choose_backend(shape.version, "reference", torch.device("cpu")).wkv, torch.float32)
    load_into(model, weights, path)


def _read_last(path: Path) -> None:
    from rwkv_dpo.run_folder.resume import check_fits, load

    saved = load(path)
    check_fits(saved, dict(_small_model().named_parameters()))
    for value in saved.weights.values():
        value.sum()  # reads all of it


def _read_adapter(path: Path) -> None:
    from rwkv_dpo.tuning.adapter_files import read_adapter

    saved = read_adapter(path.with_suffix(""))
    assert saved.r >= 1
    assert {f"{name}.lora_A.weight" for name in saved.modules} <= saved.tensors.keys()
    for tensors in (*saved.split(), saved.extra):
        for value in tensors.values():
            value.sum()


def _read_states(path: Path) -> None:
    from rwkv_dpo.tuning.states import read_states

    for value in read_states(path, _small_model()).values():
        value.float().sum()


def _read_preferences(path: Path) -> None:
    refusals = []
    for on_error in ("skip", "stop"):
        try:
            for row in sources.read_preferences(path, on_error=on_error):
                if isinstance(row, sources.Preference):
                    prompts.render(row, prompts.MODES["mix"], 0)
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _read_documents(path: Path) -> None:
    for split in (False, True):
        for text in documents.open_documents(str(path), split_blank_lines=split):
            text.encode()


def _read_templates(path: Path) -> None:
    prompts.render(sources.Preference("row 1", "", ("Hi",), "Hello!", "Go away."), prompts.load_templates(str(path)), 0)


def _parse_flags(path: Path) -> None:
    from rwkv_dpo.commands import evaluate, make_data, prepare_pairs
    from rwkv_dpo.optimizer.schedule import lr_at, weight_decay_at
    from rwkv_dpo.run.flags import parse_flags

    which, *arguments = path.read_bytes().decode(errors="surrogateescape").split("\0")
    try:
        if which == "train":
            settings, _ = parse_flags(arguments)
            for step in (0, 1, max(settings.length.total_steps - 1, 0)):
                assert 0 <= lr_at(settings.schedule, step, step) < 2**64
                assert 0 <= weight_decay_at(settings.schedule, step) < 2**64
        else:
            {"evaluate": evaluate, "make_data": make_data}.get(which, prepare_pairs).parse_flags(arguments)
    except SystemExit as stopped:
        if stopped.code:  # 0 after --help
            raise AssertionError(f"exit status {stopped.code}") from stopped


def _written(write: Callable[[Path], object], suffix: str = "") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, f"seed{suffix}"))
        return Path(folder, f"seed{suffix}").read_bytes()


def _corpora() -> list[bytes]:
    lists = [[1, 2, 3], [], [7], [5, 0, 9, 11]]
    seeds = []
    for dtype in DTYPES.values():
        with tempfile.TemporaryDirectory() as folder:
            write_binidx(Path(folder, "c"), [np.array(tokens, dtype) for tokens in lists], dtype)
            seeds.append(join(Path(folder, "c.idx").read_bytes(), Path(folder, "c.bin").read_bytes()))
    return seeds


def _pairs():
    rows = [([1, 2, 3], [4], [5, 6]), ([7], [8, 9], [8, 10]), ([70] * 30, [71] * 3, [72] * 9)]
    return pack_pairs(rows, np.array([[-1.5, -2.25], [-3, -4.0], [-8.5, -9]]), {"ctx_len": 64})


def _trees():
    rows = [([1, 2], [4], [5, 6]), ([1, 2], [4], [7]), ([8], [1], [2])]
    return grow(pack_pairs(rows, np.full((3, 2), -1.5), scores=np.array([[3, 2], [3, 1], [np.nan, np.nan]])), 100).pairs


def _pickled_pairs() -> list[bytes]:
    import pickle

    plain = [([1, 99, 2], [70], [5], -1.5, -2), ([4], (5,), [6], -1e9, -3.0)]
    rows = [*plain, ([np.int64(4)], [np.uint16(7)], [6], np.float64(-1), np.float32(-3))]
    shared = [1, 2, 3]
    return [
        _written(lambda path: save_original(path, _pairs())),
        *(pickle.dumps(plain, protocol) for protocol in range(6)),
        *(pickle.dumps(rows, protocol) for protocol in (3, 4, 5)),
        pickle.dumps([(shared, [4], [5], -1.0, -1.0), (shared, [6], [7], -1.0, -1.0)], 2),
    ]


def _torch_pairs() -> list[bytes]:
    """Lists, whole tensors, parts of tensors and arrays, as torch.save writes them and pickle.dump does."""
    import pickle

    import torch

    batch, halves = torch.arange(30).reshape(3, 10), torch.tensor([-1.5, -2.5], dtype=torch.bfloat16)
    rows = [
        ([1, 99, 2], [70], [5], -1.5, torch.tensor(-2.0)),
        (batch[0], batch[1, ::2], batch[:, 1].int(), halves[0], halves[1].double()),
        (np.arange(3), np.array([4], np.uint16), [np.int64(6)], np.float32(-1), np.array(-3.0)),
    ]
    return [
        _written(lambda path: save_original(path, _pairs())),
        _written(lambda path: torch.save(rows, path)),
        _written(lambda path: torch.save(rows[:2], path, pickle_protocol=4)),
        _written(lambda path: torch.save(rows, path, _use_new_zipfile_serialization=False)),
        _written(lambda path: torch.save(rows[:1], path, _use_new_zipfile_serialization=False)),
        pickle.dumps(rows, 2),
        pickle.dumps(rows[:2], 5),
    ]


@lru_cache
def _small_model():
    import torch
    from conftest import random_model
    from rwkv_dpo.model.shape import ModelShape

    return random_model(ModelShape(1, 8, 8, 32, 11, head_size=8), torch.float32)


def _checkpoints() -> list[bytes]:
    import torch
    from rwkv_dpo.model.checkpoint import save_weights

    model = _small_model()
    return [
        _written(lambda path: save_weights(model.state_dict(), path)),
        _written(lambda path: torch.save(model.state_dict(), path)),
        _written(lambda path: torch.save({name: value.bfloat16() for name, value in model.state_dict().items()}, path)),
        _written(lambda path: torch.save(dict(model.state_dict()), path, _use_new_zipfile_serialization=False)),
        _written(lambda path: torch.save(_trained(model), path)),
    ]


def _trained(model) -> dict:
    """As a script saves it beside its optimizer, and with a tied head."""
    import argparse

    import torch

    optimizer = torch.optim.AdamW(model.parameters())
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    weights["module.head.weight"] = weights["module.emb.weight"]
    return {"state_dict": weights, "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=1e-3, path=Path("a")), "epoch": 3}


def _safetensors() -> list[bytes]:
    from rwkv_dpo.files.tensor_files import write_safetensors

    weights = _small_model().state_dict()
    halves = {name: value.bfloat16() for name, value in weights.items()}
    return [_written(lambda path, one=one: write_safetensors(one, path, {"by": "us"})) for one in (weights, halves)]  # type: ignore[misc]


def _adapters() -> list[bytes]:
    """LoRA, DoRA and PiSSA, with a weight beside."""
    import torch
    from rwkv_dpo.files.tensor_files import write_safetensors
    from rwkv_dpo.tuning.adapter_files import PREFIX

    name = "blocks.0.att.key"
    plain = {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(8, 4), "ln_out.bias": torch.ones(8)}
    kinds = {"lora": plain, "pissa": plain, "dora": {**plain, f"{name}.lora_magnitude_vector": torch.ones(8)}}
    found = []
    for method, tensors in kinds.items():
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": method == "dora", "target_modules": ["att.key"], "bias": "none"}
        named = {PREFIX + name: value for name, value in tensors.items()}
        weights = _written(lambda path, named=named, method=method: write_safetensors(named, path, {"method": method}))  # type: ignore[misc]
        found.append(join(json.dumps(config).encode(), weights))
    return found


def _states() -> list[bytes]:
    import torch
    from rwkv_dpo.model.checkpoint import save_weights

    shape = _small_model().shape  # made here, because the guard sees what the reader does
    states = {"blocks.0.att.time_state": torch.ones(shape.n_head, shape.head_size, shape.head_size)}
    return [_written(lambda path, ending=ending: save_weights(states, path), ending) for ending in (".pth", ".safetensors")]  # type: ignore[misc]


def _lasts() -> list[bytes]:
    """Of a run that has trained, in AdamW's form."""
    import torch

    weights = _small_model().state_dict()
    moments = {name: {"step": 3.0, "exp_avg": value, "exp_avg_sq": value * value} for name, value in weights.items()}
    counts = dict.fromkeys(("step", "samples", "pairs_seen", "skipped_steps", "bad_in_a_row"), 3)
    progress = {"identity": {"optim": "adamw"}, "epoch_losses": [1.5], "logs": {"metrics.jsonl": 99}, **counts}
    parts = {"weights": weights, "optimizer": moments, "generators": [{"cpu": torch.get_rng_state()}], "scaler": {}}
    return [_written(lambda path: torch.save({"form": 2, "progress": progress, **parts}, path))]


def _npy_arrays() -> list[bytes]:
    arrays = [np.arange(9, dtype="<u2"), np.arange(9, dtype=">i8"), np.arange(6, dtype=np.uint8).reshape(2, 3)]
    return [_written(lambda path, one=one: np.save(path, one), ".npy") for one in arrays]  # type: ignore[misc]


_PREFERENCES = [
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away.", "score_chosen": 9, "score_rejected": 1.5},
    {
        "prompt": "Hi",
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}],
    },
    {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yes"},
        "rejected": {"from": "gpt", "value": "No"},
    },
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {
        "prompt": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hé"}],
        "chosen": [{"role": "assistant", "content": "ü"}],
        "rejected": [{"role": "assistant", "content": "x"}],
    },
]
_TEXTS = [{"text": "One.\n\nTwo é"}, {"text": "Three", "more": [1, {"a": None}]}]


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: list[dict]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression=("none", "snappy", "zstd")[len(rows) % 3])
    return file.getvalue()


def _changed_parquet(content: bytes, draw: random.Random) -> bytes:
    """The bytes changed, more often near the end, where the footer is; or other rows."""
    if draw.random() < 0.2:
        try:
            rows = json.loads(mutations.json_values(json.dumps(_PREFERENCES[: draw.randrange(1, 3)]).encode(), draw))
            return _parquet(rows)
        # What cannot be written is no input.
        except Exception:
            return content
    at = draw.choice((0, 0, max(len(content) - 1200, 0), len(content) // 2))
    return content[:at] + mutations.some_bytes(content[at:], draw)


def _csv_seeds() -> list[bytes]:
    return [b'prompt,chosen,rejected\nHi,"Hello, ""you""\n!",No\nHo,a,b\n', 'text\n"é\r\n"\nb\n'.encode(), b"\xef\xbb\xbftext\na\n"]


def _gzip(seeds: list[bytes]) -> list[bytes]:
    import gzip

    return [gzip.compress(seed, mtime=0) for seed in seeds]


def _flag_lines() -> list[bytes]:
    from rwkv_dpo.run.settings import RunSettings

    lines = [["train", f"--{name}={value}"] for name, value in RunSettings().as_flags().items()]
    lines += [
        ["train", "--load_model", "x.pth", "--my_pile_stage", "3", "--magic_prime", "101", "--my_exit_tokens", "-5000"],
        ["train", "--help"],
    ]
    lines += [
        ["make_data", "in.jsonl", "3", "4096", "--out", "x", "--seed", "1"],
        ["make_data", "*.txt"],
        ["make_data", "a", "--split_blank_lines"],
    ]
    lines += [["prepare_pairs", "--source", "a.json", "--load_model", "b.pth", "--valid_ratio", "0.1", "--ctx_len", "64", "--limit", "3"]]
    lines += [
        ["evaluate", "--load_model", "a", "b", "--pairs", "p", "--top_p", "0.5", "--temperature", "1", "--seed", "3", "--ctx_len", "9"],
        ["evaluate", "--load_model", "a", "--pairs", "p", "q", "--data_file", "c", "d", "--data_type", "uint16", "--kl", "0", "--prompt",
         "e", "f", "--plot", "r.png", "--out", "r.json"],
    ]  # fmt: skip
    return ["\0".join(line).encode() for line in lines]


def _changed_flags(content: bytes, draw: random.Random) -> bytes:
    which, *arguments = content.split(b"\0")
    others = [part for line in draw.sample(_flag_lines(), 3) for part in line.split(b"\0")[1:]]
    for _ in range(draw.choice((1, 2, 3))):
        at = draw.randrange(len(arguments) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            arguments.insert(at, draw.choice(others or [b"-"]))
        elif kind == 1 and arguments:
            del arguments[at % len(arguments)]
        elif arguments:
            name, equals, value = arguments[at % len(arguments)].partition(b"=")
            words = (
                b"nan",
                b"inf",
                b"-1",
                b"1e308",
                b"1e-320",
                b"0",
                b"",
                b"9" * 5000,
                b"x" * 300,
                b"\xff",
                b"%s",
                b"%",
                b"{}",
                b"@x",
                b"-",
                b"--",
            )
            value = draw.choice((str(mutations.number(draw)).encode(), draw.choice(words), mutations.some_bytes(value or name, draw)))
            arguments[at % len(arguments)] = (name + equals if equals else b"") + value.replace(b"\0", b"")
    return b"\0".join([which, *arguments])


def _json(rows: list[dict]) -> list[bytes]:
    return [json.dumps(rows).encode(), json.dumps(rows[:1], indent=1).encode(), b"[]"]


# An input's file is named by its reader, so that a name is a suffix too.
READERS: dict[str, Reader] = {
    "binidx": Reader(".two", _read_binidx, _corpora, mutations.index_fields, evil.corpora, share=4),
    "pairs_packed": Reader(
        ".save",
        _read_pairs,
        lambda: [_written(lambda path, pairs=pairs: save_pairs(path, pairs)) for pairs in (_pairs(), _trees())],
        mutations.zip_members(mutations.npy_header),
        evil.packed_pairs,
        share=4,
    ),
    "pairs_pickled": Reader(".save", _read_pairs, _pickled_pairs, mutations.pickle_opcodes, evil.pickled_pairs, share=4),
    "pairs_torch": Reader(".save", _read_pairs, _torch_pairs, mutations.torch_file, evil.torch_pairs, share=4),
    "checkpoint": Reader(".pth", _read_weights, _checkpoints, mutations.zip_members(mutations.weights_member), evil.checkpoints, share=4),
    "safetensors": Reader(".safetensors", _read_weights, _safetensors, mutations.safetensors_header, evil.safetensors, share=3),
    "adapter": Reader(
        ".adapter", _read_adapter, _adapters, mutations.either(mutations.json_values, mutations.safetensors_header), evil.adapters, share=3
    ),
    "states": Reader(".pth", _read_states, _states, mutations.zip_members(mutations.weights_member), evil.checkpoints),
    "last": Reader(".pth", _read_last, _lasts, mutations.zip_members(mutations.weights_member), evil.checkpoints, share=2),
    "corpus_numpy": Reader(".npy", lambda path: _read_corpus(path, "numpy", 100), _npy_arrays, mutations.npy_header, evil.arrays, share=2),
    "corpus_utf8": Reader(".txt", lambda path: _read_corpus(path, "utf-8", 0), lambda: ["abcé\U0001f600\n".encode()], mutations.some_bytes),
    "corpus_utf16": Reader(
        ".txt", lambda path: _read_corpus(path, "utf-16le", 0), lambda: ["abcé\U0001f600\n".encode("utf-16le")], mutations.some_bytes
    ),
    "corpus_uint16": Reader(
        ".bin",
        lambda path: _read_corpus(path, "uint16", 100),
        lambda: [np.arange(0, 90, 3, dtype="<u2").tobytes(), b"\1\0" * 9],
        mutations.some_bytes,
    ),
    "corpus_world": Reader(
        ".jsonl",
        lambda path: _read_corpus(path, "utf-8", 65536),
        lambda: [_lines(_TEXTS * 3)],
        mutations.json_values,
        evil.json_lines,
    ),
    "vocabulary": Reader(
        ".json",
        _read_vocabulary,
        lambda: ['{"0": "c", "1": "é", "2": "b", "3": "a"}'.encode(encoding) for encoding in ("utf-16le", "utf-8")],
        mutations.json_values,
        evil.json_files,
    ),
    "preferences_json": Reader(".json", _read_preferences, lambda: _json(_PREFERENCES), mutations.json_values, evil.json_files, share=2),
    "preferences_jsonl": Reader(
        ".jsonl", _read_preferences, lambda: [_lines(_PREFERENCES)], mutations.json_values, evil.json_lines, share=2
    ),
    "preferences_csv": Reader(".csv", _read_preferences, _csv_seeds, mutations.some_bytes),
    "preferences_parquet": Reader(
        ".parquet", _read_preferences, lambda: [_parquet(_PREFERENCES[:1]), _parquet(_PREFERENCES[1:2] * 2)], _changed_parquet, evil.parquet
    ),
    "preferences_jsonl_gz": Reader(
        ".jsonl.gz",
        _read_preferences,
        lambda: _gzip([_lines(_PREFERENCES)]),
        mutations.gzipped(mutations.json_values),
        evil.gzipped,
        is_packed=True,
    ),
    "documents_json": Reader(".json", _read_documents, lambda: _json(_TEXTS), mutations.json_values, evil.json_files),
    "documents_jsonl": Reader(".jsonl", _read_documents, lambda: [_lines(_TEXTS)], mutations.json_values, evil.json_lines),
    "documents_csv": Reader(".csv", _read_documents, _csv_seeds, mutations.some_bytes),
    "documents_parquet": Reader(".parquet", _read_documents, lambda: [_parquet(_TEXTS[:1])], _changed_parquet, evil.parquet),
    "documents_txt": Reader(".txt", _read_documents, lambda: ["One.\r\n\r\nTwo é\n\n\nThree".encode()], mutations.some_bytes),
    "documents_txt_gz": Reader(
        ".txt.gz",
        _read_documents,
        lambda: _gzip(["One.\n\nTwo é".encode()]),
        mutations.gzipped(mutations.some_bytes),
        evil.gzipped,
        is_packed=True,
    ),
    "templates_json": Reader(
        ".json",
        _read_templates,
        lambda: [b'{"single": {"Q: {prompt}\\nA:": 3}, "user": "H", "answer": " {answer}\\n"}'],
        mutations.json_values,
        evil.json_files,
    ),
    "templates_txt": Reader(".txt", _read_templates, lambda: [b"Q: {prompt}\nA:\n"], mutations.some_bytes),
    "flags": Reader(".flags", _parse_flags, _flag_lines, _changed_flags, share=3),
}


def prepare(path: Path) -> None:
    """What the reader needs besides the input itself; not under guard."""
    place = path.with_suffix("")
    if path.suffix == ".two":
        names = (f"{place}.idx", f"{place}.bin")
    elif path.suffix == ".adapter":
        place.mkdir(exist_ok=True)
        names = (f"{place}/adapter_config.json", f"{place}/adapter_model.safetensors")
    else:
        return
    for name, content in zip(names, mutations.split(path.read_bytes()), strict=True):
        Path(name).write_bytes(content)
