"""A checkpoint of last/ may come from anyone, as others do: it is looked through before it is loaded, and fits or is refused."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import train
from runs import run_until
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.files.hashed import hashed_write
from test_resume import flags


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """The newest checkpoint of an interrupted run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run_until(3, flags(data, folder, dropout=0))
    return max((folder / "last").glob("step-*.pth"), key=lambda path: int(path.stem[5:]))


def resume(data, path: Path, proj_dir: Path):
    train.main(flags(data, proj_dir, dropout=0, resume=path))


def changed(interrupted, path: Path, change) -> Path:
    content = torch.load(interrupted, weights_only=True)
    change(content)
    with hashed_write(path) as file:
        torch.save(content, file)
    return path


def broadcastable(content):
    content["weights"]["emb.weight"] = torch.zeros(1)


def missing(content):
    del content["weights"]["ln_out.bias"]


def more(content):
    content["weights"]["blocks.9.att.key.weight"] = torch.zeros(2, 2)


def other_moment(content):
    content["optimizer"]["emb.weight"]["exp_avg"] = torch.zeros(1)


def moment_of_nothing(content):
    content["optimizer"]["nothing"] = {"exp_avg": torch.zeros(1)}


def no_step(content):
    del content["progress"]["step"]


def other_form(content):
    content["form"] = 1


def no_weights(content):
    content["weights"] = [1, 2]


@pytest.mark.parametrize(("change", "message"), [
    (broadcastable, r"emb\.weight is \(1,\); this run trains \(61, 32\)"),
    (missing, r"ln_out\.bias is missing; this run trains \(32,\)"),
    (more, r"blocks\.9\.att\.key\.weight is \(2, 2\); this run trains no such weight"),
    (other_moment, r"the optimizer's exp_avg of emb\.weight is \(1,\); the weight is \(61, 32\)"),
    (moment_of_nothing, r"the optimizer's exp_avg of nothing is \(1,\); the weight is missing"),
    (no_step, "not a checkpoint to resume from"),
    (other_form, "a checkpoint of form 1, of another version; 2 is accepted"),
    (no_weights, "not a checkpoint to resume from"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_what_is_odd(data, interrupted, tmp_path, change, message):
    path = changed(interrupted, tmp_path / "step-3.pth", change)
    with pytest.raises(InputError, match=message):
        resume(data, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_checkpoint_runs_nothing_and_takes_no_more_memory_than_its_file(data, interrupted, tmp_path, capsys):
    path = tmp_path / "step-3.pth"
    with hashed_write(path) as file:
        torch.save({"form": 2, "progress": Evil()}, file)
    with pytest.raises(InputError, match=r"not a readable \.pth file"):
        resume(data, path, tmp_path / "out")
    assert "executed" not in capsys.readouterr().out
    # 8 GB of zeros, in some hundred bytes: a tensor without a storage of its size.
    def huge(content):
        content["weights"]["emb.weight"] = torch.zeros(1).expand(2**31)

    with pytest.raises(InputError, match="tensors that share memory are not accepted"):
        resume(data, changed(interrupted, path, huge), tmp_path / "out")
    # A memo of 2**31 entries: what the scan of pickles sees.
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
        members.writestr("archive/version", b"3")
    with hashed_write(path) as file:
        file.write(archive.getvalue())
    with pytest.raises(InputError, match=r"not a readable \.pth file"):
        resume(data, path, tmp_path / "out")
    assert pickle.loads(b"\x80\x02}q\x00.") == {}  # noqa: S301 - the same without the number is a pickle
