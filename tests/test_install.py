"""The wheel, installed into an environment of its own and run outside of the checkout.

That environment borrows the packages of the one that runs the tests, all but those of extras, and has no path to the sources.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import NamedTuple

import pytest
from lives import free_port
from packaging.requirements import Requirement
from rwkv_dpo import __version__
from rwkv_dpo.base.libraries import EXTRAS
from rwkv_dpo.commands.door import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "RWKV-v5" / "src" / "rwkv_dpo"
# What a wheel is built of, beside the package.
SOURCES = ("pyproject.toml", "README.md", "LICENSE")
Run = Callable[..., subprocess.CompletedProcess[str]]


class Installed(NamedTuple):
    """wheel: the file. run: a program of the environment and its arguments, in `folder`, which is empty at first."""

    wheel: Path
    distribution: Distribution
    folder: Path
    run: Run


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Iterator[Installed]:
    base = tmp_path_factory.mktemp("install")
    sources, folder = base / "sources", base / "elsewhere"
    shutil.copytree(PACKAGE.parents[1] / "src", sources / "RWKV-v5" / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", base, sources], check=True)
    (wheel,) = base.glob("*.whl")
    environment = base / "environment"
    venv.EnvBuilder(symlinks=True).create(environment)
    subprocess.run([*pip, "--python", environment / "bin" / "python", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    packages = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (packages / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    # To Python, a module that is None can't be imported.
    (packages / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({[*EXTRAS, 'ninja', 'ipykernel']}))\n")
    folder.mkdir()

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        variables |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
        command = [environment / "bin" / program, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)

    yield Installed(wheel, PathDistribution(next(packages.glob("rwkv_dpo-*.dist-info"))), folder, run)
    shutil.rmtree(base)


def requirements(lines: list[str]) -> set[tuple[str, str]]:
    """(name, versions)"""
    found = map(Requirement, lines)
    return {(re.sub(r"[-_.]+", "-", one.name).lower(), str(one.specifier)) for one in found if one.name != "rwkv-dpo"}


def test_the_wheel_holds_the_whole_package(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("rwkv_dpo/")}
    files = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file())
    assert held == {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert {Path(name).suffix for name in held} >= {".cpp", ".h", ".cu", ".cuh", ".html", ".jsonl"}


def test_requirements_txt_and_the_wheel_name_the_same_packages_and_versions(installed):
    listed = [line.partition("#")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    needed = installed.distribution.requires or []
    assert requirements(listed) == requirements([line for line in needed if "notebook" not in line])
    extras = set(installed.distribution.metadata.get_all("Provides-Extra"))
    assert extras == {*EXTRAS.values(), "notebook", "all"}
    for package, extra in EXTRAS.items():
        # datasets brings pyarrow.
        brings = {name for name, _ in requirements([line for line in needed if f'extra == "{extra}"' in line])}
        assert {"pyarrow": "datasets"}.get(package, package) in brings
    (all_of_them,) = (Requirement(line) for line in needed if 'extra == "all"' in line)
    assert all_of_them.extras == extras - {"all"}


def test_the_image_is_made_of_files_that_docker_is_given():
    """Docker can't build here; hadolint reads the rest."""
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    sources = {source for line in copied for source in line.split()}
    assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == sources
    assert {*SOURCES, "RWKV-v5/src", "constraints.txt"} == sources


def test_it_says_its_version_and_its_commands(installed):
    for door in (("rwkv-dpo",), ("python", "-m", "rwkv_dpo")):
        done = installed.run(*door, "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"rwkv-dpo {__version__}\n", "")
    assert installed.distribution.version == __version__
    done = installed.run("python", "-c", "import rwkv_dpo; print(rwkv_dpo.__file__)")
    assert not Path(done.stdout).is_relative_to(ROOT)
    said = installed.run("rwkv-dpo", "--help").stdout
    assert all(re.search(rf"^ +{name} +{command.what} \({command.module}\.py\)$", said, re.M) for name, command in COMMANDS.items())


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_bare_install_trains_on_two_processes_with_the_kernel_in_it(installed):
    corpus = ROOT / "default_text_document"
    done = installed.run(
        "rwkv-dpo", "train", "--dpo", 0, "--data_file", corpus, "--vocab_size", 65536, "--ctx_len", 16, "--n_layer", 1, "--n_embd", 64,
        "--epoch_steps", 2, "--epoch_count", 1, "--accelerator", "cpu", "--devices", 2, "--precision", "fp32", "--wkv_backend", "cpu",
        "--proj_dir", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (installed.folder / "out" / "rwkv-final.pth").is_file()
    assert [json.loads(line)["step"] for line in (installed.folder / "out" / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert "fp32 on 2 x cpu" in done.stderr
    # There is no script to name.
    assert "rwkv-dpo evaluate --load_model out/rwkv-final.pth" in done.stderr
    done = installed.run("rwkv-dpo", "train", "--data_type", "dummy", "--accelerator", "cpu", "--wandb", "NAME", "--proj_dir", "another")
    assert done.returncode == 2
    assert done.stderr == (
        "rwkv-dpo train: --wandb NAME needs the package wandb: pip install 'rwkv-dpo[wandb]'; metrics.jsonl has the same figures\n"
    )


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_its_doctor_finds_every_kernel(installed):
    done = installed.run("rwkv-dpo", "doctor", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(kernel["fault"] for kernel in json.loads(done.stdout)["kernels"])
