"""Names of files on the Hugging Face Hub.

The Hub is out of reach here. What stands in for it is a cache on this disk: huggingface_hub itself lays it out, from a server on this
machine that answers as its documentation says the Hub does, and reads it again with HF_HUB_OFFLINE=1.
"""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import runs
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import blindtest, chat, evaluate, export, prepare_pairs, train
from rwkv_dpo.files.hub import local_file
from rwkv_dpo.run_folder.contents import read_identity

REPOSITORY, COMMIT = "owner/tiny-rwkv", "0" * 39 + "1"
NAME = f"hf:{REPOSITORY}/RWKV/model.pth"


class Hub(http.server.BaseHTTPRequestHandler):
    """One file of one repository. A file's answer has its commit and its hash, a fault's answer a name of it."""

    def __init__(self, content: bytes, *request) -> None:
        self.content = content
        super().__init__(*request)

    def do_HEAD(self) -> None:
        repository, _, file = self.path.strip("/").partition("/resolve/main/")
        is_there = (repository, file) == (REPOSITORY, "RWKV/model.pth")
        self.send_response(200 if is_there else 404)
        if not is_there:
            self.send_header("X-Error-Code", "EntryNotFound" if repository == REPOSITORY else "RepoNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(self.content) if is_there else 0))
        self.end_headers()
        if self.command == "GET" and is_there:
            self.wfile.write(self.content)

    do_GET = do_HEAD

    def log_message(self, *message) -> None:
        pass


@pytest.fixture(scope="module")
def address(data):
    """Of the stand-in."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, (data / "model.pth").read_bytes()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(address, tmp_path, monkeypatch):
    """The cache, to which nothing was downloaded yet."""
    cache = tmp_path / "cache"
    # What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE say to a process that has yet to import the package.
    download = functools.partial(huggingface_hub.hf_hub_download, endpoint=address, cache_dir=cache)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return cache


@pytest.fixture
def offline(hub, monkeypatch):
    """The cache with the file in it, and no Hub."""
    huggingface_hub.hf_hub_download(REPOSITORY, "RWKV/model.pth")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return hub


def test_a_file_is_downloaded_once_into_the_hubs_own_cache(hub, data):
    path = Path(local_file("--load_model", NAME))
    assert path == hub / "models--owner--tiny-rwkv" / "snapshots" / COMMIT / "RWKV" / "model.pth"
    assert path.read_bytes() == (data / "model.pth").read_bytes()
    before = os.stat(path.resolve()).st_mtime_ns
    assert local_file("--load_model", NAME) == str(path)
    assert os.stat(path.resolve()).st_mtime_ns == before


def test_the_packages_own_variables_hold(address, tmp_path):
    code = "import sys; from rwkv_dpo.files.hub import local_file; print(local_file('--load_model', sys.argv[1]))"
    known = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    said = []
    for variables in (known, known | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "1"}):
        done = subprocess.run([sys.executable, "-c", code, NAME], env=os.environ | variables, capture_output=True, text=True, check=True)
        said.append(done.stdout.strip())
    assert said[0] == said[1] != ""
    assert Path(said[0]).is_relative_to(tmp_path / "cache")


def test_offline_a_file_comes_from_the_cache_and_paths_stay_paths(offline):
    assert Path(local_file("--load_model", NAME)).is_relative_to(offline)
    for path in ("model.pth", "", "0", "/a/hf:b/c/d", "hf/owner/name/file"):
        assert local_file("--load_model", path) == path


@pytest.mark.parametrize("name", ["hf:", "hf:a.pth", "hf:owner/a.pth", "hf:owner//a.pth", "hf:/owner/name/a.pth", "hf:owner/name/a/"])
def test_a_name_without_its_three_parts_says_what_is_accepted(name):
    with pytest.raises(InputError) as refused:
        local_file("--load_model", name)
    assert str(refused.value) == f"--load_model {name}: a file on the Hub is named hf:OWNER/NAME/FILE"


@pytest.mark.parametrize(("name", "reason"), [
    (f"hf:{REPOSITORY}/other.pth", f"{REPOSITORY} on the Hub has no such file"),
    ("hf:owner/other/model.pth", "no owner/other on the Hub, or a private one, which takes `hf auth login`"),
    # huggingface_hub's own words.
    ("hf:own er/name/model.pth", "Repo id must use alphanumeric chars"),
], ids=str)  # fmt: skip
def test_what_the_hub_does_not_have_is_a_line(hub, name, reason):
    with pytest.raises(InputError) as refused:
        local_file("--load_model", name)
    assert str(refused.value).startswith(f"--load_model {name}: {reason}")
    assert "\n" not in str(refused.value)


def test_offline_a_file_that_the_cache_lacks_is_a_line_and_a_dry_run_does_without(offline, capsys):
    name = f"hf:{REPOSITORY}/other.pth"
    with pytest.raises(InputError) as refused:
        local_file("--load_model", name)
    assert str(refused.value) == f"--load_model {name}: not in the Hub's cache on this machine, and the Hub can't be reached"
    shape = ["--n_layer", "2", "--n_embd", "64", "--vocab_size", "100"]
    train.main(["--dry_run", "1", "--load_model", name, "--data_type", "dummy", "--accelerator", "cpu", *shape])
    assert "peak" in capsys.readouterr().out


def test_a_dry_run_downloads_nothing(hub, data):
    with pytest.raises(InputError, match=f"--load_model {NAME}: no such file"):
        train.main(["--dry_run", "1", "--load_model", NAME, "--data_type", "dummy", "--accelerator", "cpu"])
    assert not [path for path in hub.rglob("*") if path.is_file()]


def test_without_the_package_the_line_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=f"--load_model {NAME} needs the package huggingface_hub: pip install huggingface_hub"):
        local_file("--load_model", NAME)


def test_a_run_is_known_by_what_is_in_the_file(offline, data, tmp_path, caplog):
    """The same command with the path of the same bytes is the same run; a report calls the checkpoint by its name."""
    given = functools.partial(runs.flags, data, tmp_path / "out", epoch_count=1)
    train.main(given(load_model=NAME))
    identity = read_identity(tmp_path / "out")
    assert identity.content["load_model"] == hashlib.sha256((data / "model.pth").read_bytes()).hexdigest()
    assert Path(identity.flags["load_model"]).is_relative_to(offline)
    caplog.set_level("INFO")
    train.main(given(load_model="DATA/model.pth"))
    assert "holds the end of this run" in caplog.text
    trained, report = str(tmp_path / "out" / "rwkv-final.pth"), tmp_path / "report.json"
    evaluate.main(["--load_model", NAME, trained, "--pairs", str(data / "valid.save"), "--device", "cpu", "--out", str(report)])
    assert [column["checkpoint"] for column in json.loads(report.read_text())] == [NAME, trained]


def test_every_other_command_takes_such_a_name(offline, tmp_path, monkeypatch):
    """As far as the file is looked for; what is done with its path is tested elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    export.main(["--load_model", NAME, "--out", "model.safetensors", "--wkv_backend", "reference"])
    assert (tmp_path / "model.safetensors").is_file()
    small = "vocabulary of 61"  # read from the file, and not the World's
    for main, flags in (
        (chat.main, ["--load_model", NAME, "--prompt", "?", "--device", "cpu"]),
        (blindtest.main, ["--load_model", NAME, "model.safetensors", "--terminal", "1", "--device", "cpu"]),
        (prepare_pairs.main, ["--source", "pairs.jsonl", "--load_model", NAME, "--device", "cpu"]),
    ):
        with pytest.raises(InputError, match=small):
            main(flags)
