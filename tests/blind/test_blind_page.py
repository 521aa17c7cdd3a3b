"""The page in a real browser: keys become votes in the file, and it fits a narrow screen."""

import asyncio
import json

import pytest
from browser import CHROMIUM, opened
from rwkv_dpo.blind.ballot import Ballot
from rwkv_dpo.blind.cards import Card, Question
from rwkv_dpo.blind.result import result_of, shown
from rwkv_dpo.blind.server import Site, listen, serving
from rwkv_dpo.blind.votes import open_votes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
LONG = "long" * 60
HOSTILE = "<img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"
CARDS = [Card(Question(f"Question {i}? {LONG} {HOSTILE}"), (f"first {i}\n{LONG}", HOSTILE), (i % 2, 1 - i % 2)) for i in range(1, 5)]
NAMES = [f"base/{LONG}.pth", f"tuned/{HOSTILE}.pth"]


def drive(folder, width, acts):
    """acts: a coroutine function of the tab and the votes."""
    async def run(address, votes):
        async with opened(address, folder / "browser", width) as tab:
            await tab.until("typeof view !== 'undefined' && view !== null")
            await acts(tab, votes)
            assert not tab.complaints

    with open_votes(folder, len(CARDS)) as votes:
        site = Site(Ballot(CARDS, votes, lambda: shown(result_of(NAMES, CARDS, votes.choices))))
        with serving(site, listen(0)) as address:
            asyncio.run(run(address, votes))
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]


async def press(tab, key, then):
    await tab.press(key)
    await tab.until(f"!busy && {then}")


def test_keys_alone_judge_a_test_from_its_start_to_the_result(tmp_path):
    async def acts(tab, votes):
        assert await tab.value("document.getElementById('A').textContent") == CARDS[0].side("A")
        await press(tab, "ArrowRight", "view.judged === 1")
        await press(tab, "u", "view.judged === 0")
        await press(tab, "ArrowLeft", "view.judged === 1")
        # Held down, or with ctrl, a key is none; paused, none votes.
        await tab.press("b", is_repeat=True)
        await tab.press("b", modifiers=2)
        await press(tab, "p", "paused")
        assert await tab.value("document.body.innerText.includes('Paused') && !document.body.innerText.includes('Question')")
        for key in ("ArrowLeft", " ", "u"):
            await tab.press(key)
        await press(tab, "p", "!paused")
        await press(tab, " ", "view.judged === 2")
        # By the buttons, as a reader of screens comes to them.
        await tab.value("document.querySelector('[data-do=B]').focus()")
        await press(tab, "Enter", "view.judged === 3")
        await press(tab, "=", "view.phase === 'judged'")
        await press(tab, "u", "view.judged === 3")
        await press(tab, "a", "view.phase === 'judged'")
        page = await tab.value("document.documentElement.outerHTML")
        assert "base/" not in page
        assert "tuned/" not in page
        await press(tab, "Enter", "view.phase === 'ended'")
        told = await tab.value("document.body.innerText")
        assert all(name in told for name in NAMES)
        assert "4 of 4 questions judged, 1 of them equal." in told
        assert await tab.value("document.title") == "Blind test"
        assert await tab.value("document.querySelectorAll('img').length") == 0

    assert drive(tmp_path, 1200, acts) == [
        {"question": 1, "choice": "B"}, {"undo": 1}, {"question": 1, "choice": "A"}, {"question": 2, "choice": "="},
        {"question": 3, "choice": "B"}, {"question": 4, "choice": "="}, {"undo": 4}, {"question": 4, "choice": "A"}, {"end": True},
    ]  # fmt: skip


def test_on_a_narrow_screen_nothing_stands_beyond_its_edge_and_the_test_may_end_early(tmp_path):
    async def acts(tab, votes):
        async def check():
            assert await tab.value("document.documentElement.scrollWidth <= innerWidth && innerWidth === 400")
            # What is to be pressed is on the screen without scrolling.
            boxes = await tab.value("[...document.querySelectorAll('button')].map(b => b.getBoundingClientRect()).filter(b => b.width)"
                                    ".map(b => [b.left, b.right, b.top, b.bottom])")  # fmt: skip
            assert all(min(left, top) >= 0 and right <= 400 and bottom <= 800 for left, right, top, bottom in boxes)

        await check()
        assert await tab.value("document.querySelector('article:nth-child(2)').offsetTop > document.querySelector('article').offsetTop")
        await tab.value("document.querySelector('[data-do=A]').click()")
        await tab.until("!busy && view.judged === 1")
        await tab.value("document.getElementById('pauses').click()")
        await check()
        await tab.value("document.getElementById('end').click()")
        await tab.until("view.phase === 'ended'")
        await check()

    assert drive(tmp_path, 400, acts) == [{"question": 1, "choice": "A"}, {"end": True}]
