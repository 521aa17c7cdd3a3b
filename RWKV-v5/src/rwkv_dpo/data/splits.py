"""The pair files of one preparation, trainset.save, validset.save, testset.save and report.json: what goes into which, and how they
come to stand in a folder together or not at all.

All of them carry the preparation's id. Files of one source with two ids were split in two ways: a prompt that is held out in the one
may be trained on in the other (held_out.py).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.pair_files import load_pairs, write_packed
from rwkv_dpo.data.pairs import PairSet, pairs_sha256
from rwkv_dpo.data.prompts import seeded_fraction
from rwkv_dpo.files.atomic import write_together
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.files.json_text import as_json

SPLITS = ("train", "valid", "test")
REPORT, PAGE = "report.json", "report.html"
Rows = Mapping[str, Sequence[int]]  # of each split


def split_rows(prompt_keys: Sequence[str], valid_ratio: float, test_ratio: float, seed: int) -> dict[str, list[int]]:
    """Rows of each of SPLITS. A prompt is in one split only; the ratios hold on average over prompts."""
    rows: dict[str, list[int]] = {name: [] for name in SPLITS}
    for row, key in enumerate(prompt_keys):
        fraction = seeded_fraction("split", seed, key)
        name = "test" if fraction < test_ratio else "valid" if fraction < test_ratio + valid_ratio else "train"
        rows[name].append(row)
    return rows


def identified(pairs: PairSet, rows: Rows, reference: str | Path, precision: str, quant: str = "none") -> PairSet:
    """The pairs with their preparation's id in the header, that of all that they are made of: tokens, settings, splits, and the
    checkpoint that is going to score them, held as --quant says."""
    header = {**pairs.header, "reference_sha256": file_sha256(reference), "reference_precision": precision}
    if quant != "none":
        header["reference_quant"] = quant
    made_of = [pairs_sha256(pairs), header, {name: list(rows[name]) for name in SPLITS}]
    return replace(pairs, header={**header, "preparation_id": hashlib.sha256(as_json(made_of, sort_keys=True).encode()).hexdigest()})


def is_prepared(folder: Path, pairs: PairSet, rows: Rows, is_packed: bool) -> bool:
    """Whether the folder holds this preparation (see identified) in that form, whole. InputError when it holds files of another, which
    would be lost."""
    report = _read_report(folder / REPORT)
    there = {name: path for name in SPLITS if (path := file_of(folder, name)).exists()}
    others = [path.name for name, path in there.items() if not _is_of(path, pairs, rows[name], is_packed, report)]
    if others:
        refuse(
            f"{folder} holds pair files that these settings don't make ({', '.join(others)}): --overwrite 1 replaces them, or give another "
            "--out_dir"
        )
    is_reported = report.get("pairs", {}).get("preparation_id") == pairs.header["preparation_id"]
    return is_reported and report.get("files") == {path.name: _entry(path, rows[name]) for name, path in there.items()}


def file_of(folder: Path, split: str) -> Path:
    """The path of a split: trainset.save and its like."""
    return folder / f"{split}set.save"


def write_splits(
    folder: Path, pairs: PairSet, rows: Rows, report: Mapping[str, Any], as_page: Callable[[Mapping[str, Any]], str],
    write: Callable[[BinaryIO, PairSet], None] = write_packed,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write a file per split, and the report, as JSON and as a page, which names the preparation and each file's number of pairs and
    sha256; returns these.

    All are on the disk before the first takes its name. What had those names goes before that, so that a kill in between leaves some
    of the files, and not some of each.
    """
    files: dict[str, dict[str, Any]] = {}
    paths = {name: file_of(folder, name) for name in SPLITS}

    def write_split(name: str, file: BinaryIO) -> None:
        write(file, pairs.select(rows[name]))
        file.flush()
        files[paths[name].name] = _entry(file.name, rows[name])

    def whole() -> dict[str, Any]:
        return {"pairs": dict(pairs.header), **report, "files": files}

    def write_page(file: BinaryIO) -> None:
        file.write(as_page(whole()).encode())

    def write_report(file: BinaryIO) -> None:
        file.write(as_json(whole(), indent=2, ensure_ascii=False).encode() + b"\n")
        file.flush()
        for path in (folder / REPORT, folder / PAGE, *paths.values()):
            path.unlink(missing_ok=True)

    splits = {path: partial(write_split, name) for name, path in paths.items()}
    write_together({**splits, folder / PAGE: write_page, folder / REPORT: write_report})
    return files


def _entry(path: str | Path, rows: Sequence[int]) -> dict[str, Any]:
    return {"pairs": len(rows), "sha256": file_sha256(path)}


def _is_of(path: Path, pairs: PairSet, rows: Sequence[int], is_packed: bool, report: Mapping[str, Any]) -> bool:
    try:
        there = load_pairs(path)
    except InputError:
        return False
    wanted = pairs.select(rows)
    if bool(there.header) != is_packed or pairs_sha256(there) != pairs_sha256(wanted if is_packed else wanted.alone()):
        return False
    # The original's form has no header, but a report.
    known = there.header if is_packed else report.get("pairs", {})
    return all(known.get(name, pairs.header[name]) == pairs.header[name] for name in ("reference_sha256", "preparation_id"))


def _read_report(path: Path) -> dict[str, Any]:
    """Nothing from a file that is not there or is no report."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    is_report = isinstance(report, dict) and isinstance(report.get("pairs"), dict)
    return report if is_report else {}
