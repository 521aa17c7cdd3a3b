"""Commands on a GPU that is not there: torch's CUDA build, its allocator, Lightning and DeepSpeed for real, over a stand-in for the CUDA
runtime whose kernels do nothing. It lies in shared/fake_gpu beside the checkout; its README says what it shows and what not."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

STAND_IN = Path(__file__).resolve().parents[2] / "shared" / "fake_gpu" / "run.sh"
KEPT = Path(os.environ.get("FAKE_GPU_HOME") or Path.home() / ".cache" / "fake_gpu")
# Where it isn't, the stand-in fetches it: 4.5 GB, which no test should.
CUDA_TORCH = KEPT / f"torch-{version('torch').split('+')[0]}"


def unusable_because() -> str:
    """"" where there is one."""
    if not STAND_IN.exists():
        return f"no stand-in for a GPU: {STAND_IN} is not there"
    if not CUDA_TORCH.exists():
        return f"no CUDA build of torch for the stand-in: {CUDA_TORCH} is not there (`{STAND_IN} true` fetches 4.5 GB)"
    return ""


def run_on_fake_gpu(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python script, in the environment of this process."""
    environment = os.environ | {
        "FAKE_GPU_HOME": str(KEPT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cuda",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = [str(STAND_IN), sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
