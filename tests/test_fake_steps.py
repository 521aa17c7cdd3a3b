"""No step waits for the GPU, and no tensors of two devices meet in one, whatever flags say of its computation (fake_steps.py). In a process
of its own, before whose torch a stand-in for CUDA is loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="written for Linux"),
    pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="needs a torch for CPUs, whose CUDA can be stood in for"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, list[str]]:
    """By flags: where a step waits, or fails."""
    done = subprocess.run([sys.executable, HERE / "fake_steps.py", tmp_path_factory.mktemp("steps")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_combination_of_flags_takes_a_step_that_waits_for_nothing(places):
    assert len(places) > 80
    found = {place: flags for flags, found in places.items() for place in found}
    assert not found, "\n".join(f"{place}    with {flags}" for place, flags in found.items())


WAITS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import fake_steps
fake_steps.pretend_cuda(Path(sys.argv[1]))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

def found(act):
    with FakeTensorMode(), fake_steps.Watch() as watch:
        x, i = torch.ones(4, 4, device="cuda:0"), torch.zeros(2, dtype=torch.int64, device="cuda:0")
        try:
            act(x, i)
        except Exception as error:
            return watch.places or {str(error)}
    return watch.places

cpu = torch.ones(4)
for name, act in {
    "item": lambda x, i: x[0, 0].item(), "tolist": lambda x, i: x.tolist(), "bool": lambda x, i: bool(x.any()),
    "nonzero": lambda x, i: x.nonzero(), "mask": lambda x, i: x[x > 0], "where": lambda x, i: torch.where(x > 0),
    "masked assignment": lambda x, i: x.__setitem__(x > 0, 1.0), "cpu": lambda x, i: x.cpu(),
    "numbers of the host": lambda x, i: x.__setitem__(i, 0.0),
    "an index of the host": lambda x, i: x[torch.tensor([1])], "made on the host": lambda x, i: torch.ones(4).to("cuda:0"),
    "two devices": lambda x, i: x + torch.ones(4), "repeats": lambda x, i: torch.repeat_interleave(i), "numpy": lambda x, i: x.numpy(),
}.items():
    assert found(act), name
for name, act in {
    "arithmetic": lambda x, i: (2 * x + 1).clamp(min=0).sum(), "gather": lambda x, i: x[i], "fill": lambda x, i: x.index_fill_(0, i, 0.0),
    "slice": lambda x, i: x[1:].zero_(), "set a slice": lambda x, i: x.__setitem__(slice(2), 0.0),
    "where": lambda x, i: torch.where(x > 0, x, 0.0),
    "a 0-d number of the host": lambda x, i: x * torch.tensor(2.0),
}.items():
    assert not found(act), (name, found(act))
"""


def test_what_waits_is_found_and_what_does_not_wait_is_not(tmp_path):
    done = subprocess.run([sys.executable, "-c", WAITS, tmp_path, HERE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
