"""A workflow as a file: as ComfyUI saves it, or as it exports it for its API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...kernels import GraftError
from .prompts import prompt_of, use_ours_in_prompt, use_theirs_in_prompt
from .swap import Choose, Swapped, sign, use_ours, use_theirs


def read_workflow(path: Path) -> Any:
    """What the file holds.

    Raises:
        GraftError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise GraftError(f"the workflow cannot be read: {error.strerror} ({path})") from error
    except (ValueError, RecursionError) as error:
        raise GraftError(f"this is no JSON: export the workflow from ComfyUI again ({path})") from error


def swapped(data: Any, choose_for: Callable[[str], Choose], version: str, back: bool = False) -> list[Swapped]:
    """Put our loaders into a workflow or prompt, or those back that they took the place of.

    Args:
        data: is changed.
        choose_for: for a class of loaders, what finds the file that a name means.
        version: of this pack, for a recipient.

    Raises:
        GraftError: it is no workflow, or one that no ComfyUI would open.
    """
    prompt = prompt_of(data)
    if prompt is None and not (isinstance(data, dict) and isinstance(data.get("nodes"), list)):
        raise GraftError("this is no workflow of ComfyUI")
    try:
        if prompt is not None:
            return (use_theirs_in_prompt if back else use_ours_in_prompt)(prompt, choose_for)
        done = (use_theirs if back else use_ours)(data, choose_for)
        sign(data, version)
        return done
    # its parts hang together in too many ways to look at all of them before
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise GraftError("this workflow is damaged: open it in ComfyUI and save it again") from error
