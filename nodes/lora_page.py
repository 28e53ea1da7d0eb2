"""What the page asks the server about a row of LoRA Stack: what its file says of itself, and the picture beside it.

Only files that the node lists are answered for: a name that is none of these has no path.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from ..kernels import GraftError
from ..ops.files.lora_info import lora_info
from .lora import lora_file, lora_files

INFO, PICTURE = "/graft/lora", "/graft/lora/picture"

PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
"""What is shown, by the ending of a file that is called as the LoRA is, with or without ``.preview``."""


def listed_path(name: str) -> Path | None:
    """Where a file of the node's list lies; None for any other name."""
    path = lora_file(name).path if name in lora_files() else None
    return None if path is None else Path(path)


def picture_of(path: Path) -> Path | None:
    """The picture beside a LoRA, as Civitai's helpers and LoRA Manager save it."""
    stem = os.path.splitext(path)[0]
    beside = (Path(f"{stem}{middle}{ending}") for middle in (".preview", "") for ending in PICTURES)
    return next((picture for picture in beside if picture.is_file()), None)


def told(path: Path) -> dict[str, Any]:
    """What the page shows of a file; of one that cannot be read, why."""
    has_picture = picture_of(path) is not None
    try:
        info = lora_info(path)
    except GraftError as error:
        return {"problem": str(error), "words": [], "notes": [], "picture": has_picture}
    return {"words": info.words, "notes": info.notes, "picture": has_picture}


async def answer_info(request: Any) -> Any:
    from server import web

    path = listed_path(request.query.get("name", ""))
    return web.Response(status=404) if path is None else web.json_response(await asyncio.to_thread(told, path))


async def answer_picture(request: Any) -> Any:
    from server import web

    path = listed_path(request.query.get("name", ""))
    picture = None if path is None else picture_of(path)
    if picture is None:
        return web.Response(status=404)
    # nosniff: a file that is no picture stays none
    headers = {"Content-Type": PICTURES[picture.suffix], "X-Content-Type-Options": "nosniff"}
    return web.FileResponse(picture, headers=headers)


def register_addresses() -> None:
    """Offer both to the page, where ComfyUI runs as a server, which brings what answers requests (`web`)."""
    try:
        from server import PromptServer
    except ImportError:
        return
    routes = getattr(getattr(PromptServer, "instance", None), "routes", None)
    if routes is not None:
        routes.get(INFO)(answer_info)
        routes.get(PICTURE)(answer_picture)
