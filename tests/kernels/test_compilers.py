"""Which compilers are found, and how nvcc is called. What stands for nvcc here is a script that says its version."""

import os
import sys
from pathlib import Path

import pytest
import torch
from rwkv_dpo.kernels import compilers, cuda_library
from rwkv_dpo.kernels.build import BuildError
from rwkv_dpo.kernels.compilers import Nvcc, cuda_recipe, find_nvcc

SOURCE = Path("kernels.cu")


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compilers, "_USUAL_PLACES", ())
    find_nvcc.cache_clear()
    yield
    find_nvcc.cache_clear()


def install(home: Path, version: str = "13.0", script: str | None = None) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(script or f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    return nvcc


class TestFindNvcc:
    @pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
    def test_the_toolkit_that_is_named_comes_before_that_on_path(self, tmp_path, monkeypatch, name):
        named, on_path = install(tmp_path / "named", "12.8"), install(tmp_path / "other")
        monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
        monkeypatch.setenv(name, str(tmp_path / "named"))
        assert find_nvcc() == Nvcc(str(named), (12, 8))

    def test_a_script_on_path_is_as_good_as_nvcc_itself(self, tmp_path, monkeypatch):
        real = install(tmp_path / "toolkit")
        wrapper = install(tmp_path / "local", script=f'#!/bin/sh\nexec {real} "$@"\n')
        monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
        assert find_nvcc() == Nvcc(str(wrapper), (13, 0))

    def test_what_is_named_and_not_there_or_broken_is_passed_over(self, tmp_path, monkeypatch):
        install(tmp_path / "broken", script="#!/bin/sh\nexit 1\n")
        on_path = install(tmp_path / "other")
        monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "broken"))
        assert find_nvcc() == Nvcc(str(on_path), (13, 0))

    def test_pips_toolkit_is_found(self, tmp_path, monkeypatch):
        nvcc = install(tmp_path / "nvidia/cu13")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        assert find_nvcc() == Nvcc(str(nvcc), (13, 0))

    def test_without_one_the_reason_says_what_to_set(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "path", [])
        with pytest.raises(BuildError, match=r"no nvcc: set CUDA_HOME to a CUDA toolkit, or .* pip install"):
            cuda_recipe(SOURCE, [(9, 0)])


class TestCommand:
    @pytest.fixture(autouse=True)
    def _nvcc(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        install(tmp_path)

    def command(self, *capabilities):
        (command,) = cuda_recipe(SOURCE, capabilities).commands
        return command

    def test_every_device_of_the_machine_is_compiled_for_and_no_other(self, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Nonsense;9.0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(8, 9), (7, 5), (8, 9)][i])
        monkeypatch.setattr(cuda_library, "load_library", lambda recipe, entry_points: recipe)
        recipe = cuda_library.load_kernels(SOURCE, {})
        targets = [word for word in recipe.commands[0] if word.startswith("-gencode")]
        assert targets == ["-gencode=arch=compute_75,code=sm_75", "-gencode=arch=compute_89,code=sm_89"]
        assert recipe.variant == "nvcc13.0-sm_75_89"

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("", ()), ("g++-13", ("-ccbin", "g++-13")), ("ccache g++-13 -m64", ("-ccbin", "g++-13", "-Xcompiler=-m64")),
            ("ccache", ("-ccbin", "c++")),
        ],
    )  # fmt: skip
    def test_cxx_is_its_host_compiler_without_a_launcher(self, monkeypatch, value, words):
        monkeypatch.setenv("CXX", value)
        command = self.command((9, 0))
        begin = command.index("-ccbin") if words else 0
        assert command[begin : begin + len(words)] == words
        assert ("-ccbin" in command) == bool(words)

    @pytest.mark.parametrize(
        ("of_the_process", "linked"), [(None, "static"), ((12, 9), "none"), ((12, 8), "none"), ((12, 6), "static"), ((13, 0), "static")]
    )
    def test_torchs_runtime_serves_where_it_knows_what_this_nvcc_makes(self, tmp_path, monkeypatch, of_the_process, linked):
        install(tmp_path, "12.8")
        monkeypatch.setattr(compilers, "_runtime_of_process", lambda: of_the_process)
        command = self.command((9, 0))
        assert command[command.index("-cudart") + 1] == linked
