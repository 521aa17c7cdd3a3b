"""What rank 0 decides before the processes of a run can talk through torch: the others are told, and none of them waits for ever.

The run folder may be on a disk that rank 0 alone sees. So rank 0 alone reads it, and hands what it found to the others: to processes
that it starts itself in their environment, to those that torchrun, Slurm or a person starts through a store at the run's address.
"""

import base64
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from pytorch_lightning.plugins.environments import ClusterEnvironment
from torch.distributed import PrefixStore, Store, TCPStore

from rwkv_dpo.base.errors import InputError

T = TypeVar("T")
_VARIABLE = "RWKV_DPO_TOLD"
# To reach rank 0's machine, and for a rank to come to a question: another may be hashing a checkpoint over a slow network meanwhile.
_PATIENCE = timedelta(minutes=30)
_PAUSE = 0.02  # seconds between two looks; a blocking wait would keep signals waiting, too


class Ranks:
    """`rank`: of this process among all; `local_rank`: among those of its machine. environment: Lightning's, None for a run of one
    process."""

    def __init__(self, environment: ClusterEnvironment | None = None, num_nodes: int = 1) -> None:
        self._is_alone = environment is None
        self.rank = environment.global_rank() if environment else 0
        self.local_rank = environment.local_rank() if environment else 0
        self._answers: dict[str, tuple[Any, str]] = {}  # by question: what rank 0 decided, and the fault that kept it from deciding
        self._askers: list[int] = []
        self._store: Store | None = None
        parent, answers = pickle.loads(base64.b64decode(os.environ.get(_VARIABLE, "") or _encoded(0, {})))  # noqa: S301 - our own parent's
        if environment is None:
            return
        if parent == os.getppid():
            self._answers = answers
            return
        n_ranks = environment.world_size()
        self._askers = list(range(n_ranks) if environment.creates_processes_externally else range(0, n_ranks, n_ranks // num_nodes))[1:]
        if self._askers:
            self._store = _open_store(environment, self.rank == 0)

    def told(self, question: str, decide: Callable[[], T]) -> T:
        """What `decide` returns on rank 0, on every rank. When it raises InputError there, the other ranks leave with status 2 and
        no word. Every rank asks the same questions in the same order."""
        if self._is_alone:
            return decide()
        if self.rank:
            value, fault = self._answers.get(question) or self._ask(question)
            self._remember(question, value, fault)
            if fault:
                raise SystemExit(2)
            return value
        try:
            value = decide()
        except InputError as error:
            self._tell(question, None, str(error))
            raise
        self._tell(question, value, "")
        return value

    def _tell(self, question: str, value: Any, fault: str) -> None:
        self._remember(question, value, fault)
        if self._store is None:
            return
        self._store.set(question, base64.b64encode(pickle.dumps((value, fault))).decode())
        # The store may end with this process.
        missing = _wait(self._store, [f"{question}/{rank}" for rank in self._askers])
        if missing and not fault:
            ranks = ", ".join(name.rpartition("/")[2] for name in missing)
            raise InputError(f"rank 0 waited {_PATIENCE} for rank {ranks}, which did not begin; its own output may say why")

    def _ask(self, question: str) -> tuple[Any, str]:
        assert self._store is not None
        try:
            if _wait(self._store, [question]):
                raise InputError(f"rank {self.rank} waited {_PATIENCE} for rank 0 to say how to begin")
            answer = self._store.get(question)
            self._store.set(f"{question}/{self.rank}", "heard")
        except RuntimeError as error:
            raise InputError(f"rank {self.rank}: rank 0 ended before it had told how to begin") from error
        return pickle.loads(base64.b64decode(answer))  # noqa: S301 - from a process of the same run

    def _remember(self, question: str, value: Any, fault: str) -> None:
        """For this process's children, which inherit its environment."""
        self._answers[question] = value, fault
        os.environ[_VARIABLE] = _encoded(os.getpid(), self._answers)


def _wait(store: Store, names: list[str]) -> list[str]:
    """Until the store has all of them; those that are missing at the end of the patience."""
    end = time.monotonic() + _PATIENCE.total_seconds()
    while time.monotonic() < end:
        if store.check(names):
            return []
        time.sleep(_PAUSE)
    return [name for name in names if not store.check([name])]


def _encoded(parent: int, answers: dict[str, tuple[Any, str]]) -> str:
    return base64.b64encode(pickle.dumps((parent, answers))).decode()


def _open_store(environment: ClusterEnvironment, is_host: bool) -> Store:
    """At the address where torch's process group will meet, which shares the port within a process."""
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            environment.main_address, environment.main_port, is_master=is_host and not is_agents, timeout=_PATIENCE, wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except RuntimeError as error:
        address, reason = f"{environment.main_address}:{environment.main_port}", str(error).splitlines()[0]
        raise InputError(f"MASTER_ADDR, MASTER_PORT: the run's processes can't meet at {address} ({reason})") from error
    # An agent's store outlives the processes that it starts again after a failure.
    return PrefixStore(f"rwkv_dpo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
