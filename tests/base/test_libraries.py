"""Packages that a flag alone needs, where they are missing: a line before anything is written, which says what to type."""

import sys
from importlib.metadata import packages_distributions

import pyarrow
import pytest
from runs import flags
from rwkv_dpo.base import libraries
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import blindtest, make_data, prepare_pairs, train


@pytest.fixture(params=["a checkout", "an installed package"])
def installs(request, tmp_path, monkeypatch):
    """Has a package missing, and says what the line then tells to type."""
    if request.param == "an installed package":
        monkeypatch.setattr(libraries, "ROOT", tmp_path)

    def missing(package: str, extra: str) -> str:
        monkeypatch.setitem(sys.modules, package, None)
        return f"needs the package {package}: pip install " + (package if libraries.is_checkout() else f"'rwkv-dpo[{extra}]'")

    return missing


@pytest.mark.parametrize(("package", "extra", "given"), [
    ("wandb", "wandb", {"wandb": "NAME"}), ("tensorboard", "tensorboard", {"tensorboard": 1}),
    ("bitsandbytes", "quant", {"optim": "adamw8bit"}), ("bitsandbytes", "quant", {"peft": "lora", "quant": "nf4"}),
    ("deepspeed", "deepspeed", {"strategy": "deepspeed_stage_1"}),
], ids=str)  # fmt: skip
def test_a_run_does_not_begin(installs, data, tmp_path, package, extra, given):
    line = installs(package, extra)
    with pytest.raises(InputError) as refused:
        train.main(flags(data, tmp_path / "out", **given))
    (name, value), = list(given.items())[-1:]
    assert str(refused.value).startswith(f"--{name} {value} {line}")
    assert not (tmp_path / "out").exists()


def test_data_that_only_a_package_reads(installs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.pth", "a.parquet", "a.arrow"):
        (tmp_path / name).touch()
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(b'{"text": "a"}\n', "zstd", asbytes=True))
    line = installs("pyarrow", "datasets")
    for source, named in (("a.parquet", "a.parquet"), ("a.arrow", "a.arrow"), ("a.jsonl.zst", "a .zst file")):
        with pytest.raises(InputError) as refused:
            make_data.main([source, "--out", "corpus"])
        assert str(refused.value) == f"{named} {line}"
    line = installs("datasets", "datasets")
    with pytest.raises(InputError) as refused:
        prepare_pairs.main(["--source", "owner/name", "--load_model", "model.pth"])
    assert str(refused.value).startswith(f"owner/name, which is no file or folder here, {line}")


def test_the_page_of_the_blind_test(installs, tmp_path):
    line = installs("aiohttp", "serve")
    with pytest.raises(InputError) as refused:
        blindtest.main(["--load_model", "a.pth", "b.pth", "--folder", str(tmp_path / "f")])
    assert str(refused.value) == f"--terminal 0 {line}; --terminal 1 needs nothing"


def test_what_is_imported_by_another_name_than_it_is_installed_by_is_none_of_them():
    """The line is typed as it stands."""
    assert all(package in packages_distributions()[package] for package in libraries.EXTRAS)
