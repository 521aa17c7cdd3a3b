"""Every test runs on one or two threads, on one where tests run beside each other: more of them fight over the cores."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings
from lives import Lives
from rwkv_dpo.data.pair_files import save_original
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.model.checkpoint import empty_model
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import ModelShape

# A slow or busy machine is no fault: an example waits for a disk, or for other tests, as long as it takes.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def random_model(shape: ModelShape, dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> RWKV:
    """A model with weights and activations of `dtype`, on the reference recurrence, every weight random and alive. version: the shape's."""
    shape = replace(shape, version=options.pop("version", shape.version))
    wkv = options.pop("wkv", None) or choose_backend(shape.version, "reference", torch.device("cpu")).wkv
    model = empty_model(shape, wkv, dtype, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("time_decay"):
                p.uniform_(-6, 1, generator=generator)
            elif name.endswith(("1", "2")) and p.dim() > 1:
                p.normal_(0, 0.7 * p.shape[-2] ** -0.5, generator=generator)
            elif "time_" in name or ".x_" in name:
                p.uniform_(0, 1, generator=generator)
            elif name.endswith("0") or p.dim() == 3:  # w0, a0, v0, k_k, k_a of RWKV-7
                p.normal_(0.0 if name.endswith("0") else 1.0, 1.0, generator=generator)
            elif p.dim() == 1:
                p.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=generator)
            else:
                p.normal_(0, p.shape[1] ** -0.5, generator=generator)
    return model


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch) -> None:
    """Of a run, which take half a second each; but where they are what is tested."""
    run_report = sys.modules.get("rwkv_dpo.training.run_report")
    if run_report is not None and request.module.__name__ != "test_run_report":
        monkeypatch.setattr(run_report, "as_png", lambda title, shown: b"")


@pytest.fixture(scope="session")
def tiny_shape() -> ModelShape:
    return ModelShape(n_layer=2, n_embd=32, dim_att=32, dim_ffn=96, vocab_size=61, head_size=8)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The files of runs.write_inputs, with 10 pairs, which original.save has in the original's form; nobody writes there."""
    import runs  # which imports this module

    folder = tmp_path_factory.mktemp("data")
    save_original(folder / "original.save", runs.write_inputs(folder, runs.TINY, 10))
    return folder


@pytest.fixture(scope="session")
def lives() -> Lives:
    """Starts runs that can be killed, quickly; see lives.py."""
    return Lives()


@pytest.fixture
def mount_disk(tmp_path):
    """Makes a folder, on a disk of its own, of that many kilobytes."""
    folder = tmp_path / "disk"

    def mount(kilobytes: int) -> Path:
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)
