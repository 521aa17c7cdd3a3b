"""The page and its API, asked by a real client: votes are kept, strangers are refused, nothing is disclosed before the end."""

import asyncio
import json
import re
import socket
import threading
from contextlib import contextmanager

import aiohttp
import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.blind.ballot import Ballot
from rwkv_dpo.blind.cards import Question, deal
from rwkv_dpo.blind.result import result_of, shown
from rwkv_dpo.blind.server import TOKEN_HEADER, Site, listen, serving
from rwkv_dpo.blind.votes import open_votes

NAMES = ["zebra-model.pth", "yak-model.pth"]
QUESTIONS = [Question(f"Question {i}?", "chat", "en") for i in range(6)]
CARDS = deal(QUESTIONS, [[f"one {i}" for i in range(6)], [f"other {i}" for i in range(6)]], seed=1)


@contextmanager
def served(folder):
    with open_votes(folder, len(CARDS)) as votes:
        site = Site(Ballot(CARDS, votes, lambda: shown(result_of(NAMES, CARDS, votes.choices))))
        with serving(site, listen(0)) as address:
            yield site, address.rstrip("/"), votes


def talk(folder, *requests):
    """What comes of (method, path, JSON or bytes, headers) one after the other: status, headers, text."""
    async def ask(address, token):
        found = []
        async with aiohttp.ClientSession() as session:
            for method, path, given, headers in requests:
                data = given if isinstance(given, bytes) else json.dumps(given).encode()
                own = {TOKEN_HEADER: token, "Content-Type": "application/json", **headers}
                own = {name: value for name, value in own.items() if value is not None}
                async with session.request(method, address + path, data=None if method == "GET" else data, headers=own) as answer:
                    found.append((answer.status, dict(answer.headers), await answer.text()))
        return found

    with served(folder) as (site, address, votes):
        return asyncio.run(ask(address, site.token)), dict(votes.choices), votes.is_ended


def post(path, given=None, **headers):
    return "POST", path, given if given is not None else {}, headers


def vote(number, choice):
    return post("/api/vote", {"number": number, "choice": choice})


VIEW = ("GET", "/api/view", None, {})
PAGE = ("GET", "/", None, {})


def test_nothing_says_which_model_is_which_before_the_end(tmp_path):
    """Every route, in every phase, headers too; the order of sides is in nothing that is sent either."""
    asked = [PAGE, VIEW, ("GET", "/nothing", None, {}), post("/api/vote", b"{"), post("/api/undo")]
    for number, choice in zip(range(1, 7), "A=BBA=", strict=True):
        asked += [vote(number, choice), VIEW, PAGE, vote(number, "A")]
    asked += [post("/api/undo"), vote(6, "B"), VIEW]
    found, choices, is_ended = talk(tmp_path, *asked)
    assert not is_ended
    assert choices == {1: "A", 2: "=", 3: "B", 4: "B", 5: "A", 6: "B"}
    keys = set()
    for _, headers, text in found:
        told = (str(headers) + text).lower()
        assert not [word for word in ("zebra", "yak", ".pth", "sides", "chat", "model\"") if word in told]
        if headers["Content-Type"].startswith("application/json"):
            keys |= set(json.loads(text))
    assert keys == {"phase", "judged", "questions", "number", "prompt", "language", "A", "B"}
    found, _, is_ended = talk(tmp_path, post("/api/end"))
    assert is_ended
    assert json.loads(found[0][2])["result"]["models"] == NAMES


def test_votes_are_taken_once_and_none_after_the_result(tmp_path):
    asked = [vote(1, "B"), vote(1, "A"), vote(3, "A"), vote(2, "X"), vote("2", "A"), post("/api/vote", [2]), post("/api/vote", b"\xff"),
             post("/api/undo"), vote(1, "="), post("/api/end"), vote(2, "A"), post("/api/undo"), VIEW]  # fmt: skip
    found, choices, _ = talk(tmp_path, *asked)
    assert [status for status, _, _ in found] == [200, 409, 409, 409, 409, 409, 409, 200, 200, 200, 409, 409, 200]
    assert choices == {1: "="}
    # Each answer is the view that follows.
    assert [json.loads(text)["judged"] for _, _, text in found] == [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert json.loads(found[-1][2])["phase"] == "ended"
    assert [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()] == [
        {"question": 1, "choice": "B"}, {"undo": 1}, {"question": 1, "choice": "="}, {"end": True}
    ]  # fmt: skip


def test_strangers_are_refused(tmp_path):
    asked = [
        post("/api/vote", {"number": 1, "choice": "A"}, Host="evil.example:80"), ("GET", "/", None, {"Host": "evil.example"}),
        post("/api/vote", {"number": 1, "choice": "A"}, **{TOKEN_HEADER: "guess"}),
        post("/api/vote", {"number": 1, "choice": "A"}, **{TOKEN_HEADER: None}), ("GET", "/api/view", None, {TOKEN_HEADER: None}),
        post("/api/vote", {"number": 1, "choice": "A"}, **{"Content-Type": "text/plain"}),
        post("/api/end", **{"Content-Type": "text/plain"}),
        post("/api/vote", b" " * 5000), ("GET", "/", None, {"Host": "localhost:9"}), ("GET", "/", None, {"Host": "127.0.0.1"}),
        ("GET", "/api/end", None, {}),
    ]  # fmt: skip
    found, choices, is_ended = talk(tmp_path, *asked)
    assert [status for status, _, _ in found] == [403, 403, 403, 403, 403, 415, 415, 413, 200, 200, 405]
    assert not choices
    assert not is_ended


def test_the_page_needs_nothing_but_itself_and_runs_nothing_but_its_own(tmp_path):
    ((_, headers, page), (_, other, _)), _, _ = talk(tmp_path, PAGE, VIEW)
    policy = headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]{20,})'", policy)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert page.count(f'nonce="{nonce}"') == 2 == len(re.findall("<(?:script|style)[ >]", page))
    assert "{" + "nonce}" not in page
    assert "{" + "token}" not in page
    assert not re.search(r"https?:|//[a-z]|@import|url\(|style=| on[a-z]+=", page)
    assert other["Cache-Control"] == headers["Cache-Control"] == "no-store"


def test_it_listens_on_this_machine_alone_and_a_port_that_is_taken_is_named(tmp_path):
    with served(tmp_path) as (_, address, _):
        port = int(address.rpartition(":")[2])
        assert address == f"http://127.0.0.1:{port}"
        with pytest.raises(InputError, match=f"^--port {port}: another program has it; --port 0 takes any free one$"):
            listen(port)
    with listen(port) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        # What is bound to 127.0.0.1 is not met at another address of the same machine.
        with socket.socket() as stranger, pytest.raises(ConnectionRefusedError):
            stranger.connect(("127.0.0.2", port))


def test_a_disk_without_room_is_told_to_the_page_and_the_vote_can_be_cast_again(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        ((status, _, text),), choices, _ = talk(tmp_path, vote(1, "A"))
    assert status == 500
    assert json.loads(text)["error"].endswith("votes.jsonl: cannot be written: No space left on device")
    assert not choices
    assert talk(tmp_path, vote(1, "A"))[1] == {1: "A"}


def test_the_result_arrives_although_the_server_stops_then(tmp_path):
    """As the script does it: it waits for `ended` in another thread, and stops at once."""
    async def end(address, token):
        async with aiohttp.ClientSession() as session, session.post(
            f"{address}/api/end", json={}, headers={TOKEN_HEADER: token}
        ) as answer:  # fmt: skip
            return await answer.json()

    with served(tmp_path) as (site, address, _):
        got = []
        thread = threading.Thread(target=lambda: got.append(asyncio.run(end(address, site.token))))
        thread.start()
        site.ended.wait()
    thread.join()
    assert got[0]["phase"] == "ended"
