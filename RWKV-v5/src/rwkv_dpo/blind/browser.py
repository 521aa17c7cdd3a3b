"""Votes on the page, in a browser that this machine may have."""

import os
import socket
import threading
import webbrowser

from rwkv_dpo.blind.ballot import Ballot
from rwkv_dpo.blind.server import Site, serving


def judge(ballot: Ballot, listener: socket.socket, opens: bool) -> None:
    """Until the result has been shown. opens: opens a browser, where there is one."""
    site = Site(ballot)
    with serving(site, listener) as address:
        print(f"{address} asks for votes; Ctrl-C ends this, and the same command continues where it was", flush=True)
        if opens:
            # From another thread: some browsers keep their caller waiting.
            threading.Thread(target=open_browser, args=(address,), daemon=True).start()
        site.ended.wait()


def open_browser(address: str) -> None:
    """Or says that there is none."""
    try:
        browser = webbrowser.get()
        # One of the terminal would take it away, and runs no scripts.
        is_open = (type(browser) is not webbrowser.GenericBrowser or "BROWSER" in os.environ) and browser.open(address)
    except (webbrowser.Error, OSError):
        is_open = False
    if not is_open:
        print("no browser opens here; open the address yourself, or vote with --terminal 1", flush=True)
