"""One quick look at a hub, before anything is read: what it does not have, and a hub that cannot be reached."""

from __future__ import annotations

import os
from functools import cache

from fxprune.errors import FxpruneError

__all__ = ["check_hub"]

_CONFIG = "config.json"

_PATIENCE = 5.0
"""Seconds that a hub has to take a connection; HF_HUB_ETAG_TIMEOUT says otherwise."""

_NOT_HERE = "it is no folder here and in no cache"

_REMEDY = "Check the name and the connection, or name a folder that is here; HF_ENDPOINT names another hub"


@cache
def check_hub(model: str) -> None:
    """Refuse the id of a model that is in no cache and that its hub does not give.

    The package that fetches models tries a hub that cannot be reached over and over, for half a minute; this asks once.
    A hub that is slow to answer, or too busy, is left to that package.

    Args:
        model: an id.

    Raises:
        FxpruneError: the hub cannot be reached, is not to be asked, or refuses.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(model, _CONFIG), str):
        return
    patience = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _PATIENCE
    try:
        get_hf_file_metadata(hf_hub_url(model, _CONFIG), timeout=patience)
    except OfflineModeIsEnabled as error:
        what, remedy = f"{_NOT_HERE}, and hubs are not asked", "Unset HF_HUB_OFFLINE, or name a folder that is here"
        raise FxpruneError(what, where=model, remedy=remedy) from error
    except RepositoryNotFoundError as error:  # or it is not for everyone
        reason = str(error).strip().splitlines()[-1]
        raise FxpruneError(f"{constants.ENDPOINT} does not give it: {reason}", where=model, remedy=_REMEDY) from error
    except HfHubHTTPError:
        return
    except Exception as error:  # what a connection raises is up to the client of that package: httpx, or another
        if "ReadTimeout" in type(error).__name__:
            return
        what = f"{_NOT_HERE}, and {constants.ENDPOINT} cannot be reached: {error}"
        raise FxpruneError(what, where=model, remedy=_REMEDY) from error
