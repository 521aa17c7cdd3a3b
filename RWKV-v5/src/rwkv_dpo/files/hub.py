"""Files of the Hugging Face Hub, by names such as hf:BlinkDL/rwkv-7-world/RWKV-x070-World-0.1B.pth."""

import re
from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.base.libraries import check_package

PREFIX = "hf:"
_NAME = re.compile(r"hf:([^/]+/[^/]+)/(.*[^/])")


def local_file(flag: str, name: str, downloads: bool = True) -> str:
    """The path of what a flag names: of hf:OWNER/NAME/FILE in the Hub's cache on this machine, where it is put if it isn't there or the
    Hub has a newer one; any other name is a path already. downloads: False leaves a name as it is that the cache lacks. InputError
    where it can't be had."""
    if not name.startswith(PREFIX):
        return name
    found = _NAME.fullmatch(name)
    if found is None:
        refuse(f"{flag} {name}: a file on the Hub is named hf:OWNER/NAME/FILE")
    check_package("huggingface_hub", f"{flag} {name}")
    # Here, not above: it takes a while to import, and paths do without.
    from huggingface_hub import errors, hf_hub_download

    try:
        return hf_hub_download(*found.groups(), local_files_only=not downloads)
    # Beside its own exceptions, those of the client that it has for the network, and of the disk.
    except Exception as error:
        if not downloads and isinstance(error, errors.LocalEntryNotFoundError):
            return name
        raise InputError(f"{flag} {name}: {_reason(error, errors, found[1])}") from error


def _reason(error: Exception, errors: Any, repository: str) -> str:
    """In a line. The first of these that fits: some are kinds of others."""
    for kind, reason in (
        (errors.LocalEntryNotFoundError, "not in the Hub's cache on this machine, and the Hub can't be reached"),
        (errors.GatedRepoError, f"{repository} asks for an agreement: give it on its page, then `hf auth login`"),
        (errors.RepositoryNotFoundError, f"no {repository} on the Hub, or a private one, which takes `hf auth login`"),
        (errors.EntryNotFoundError, f"{repository} on the Hub has no such file"),
    ):
        if isinstance(error, kind):
            return reason
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
