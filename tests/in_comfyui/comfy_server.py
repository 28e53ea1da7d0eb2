"""A ComfyUI process with this pack, on models of its own, driven over HTTP as a browser does."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# conditioning and latent without a text encoder: what the in-process tests use
TEST_NODES = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]


class TestConditioning:
    RETURN_TYPES = ("CONDITIONING", "LATENT")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"architecture": ("STRING", {{}}), "seed": ("INT", {{}})}}}}

    def make(self, architecture, seed):
        import torch
        from architectures import ARCHITECTURES

        chosen = ARCHITECTURES[architecture]
        return chosen.conditioning(seed), {{"samples": torch.zeros(chosen.latent)}}


NODE_CLASS_MAPPINGS = {{"TestConditioning": TestConditioning}}
"""


def packed_files() -> list[str]:
    """What ``comfy node pack`` takes: the files that git knows, without those in ``.comfyignore``."""

    def listed(*options: str) -> set[str]:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", *options]
        return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")) - {""}

    return sorted(listed() - listed("-ci", f"--exclude-from={ROOT / '.comfyignore'}"))


def pack(folder: Path) -> None:
    """A copy of the pack as the registry hands it on."""
    for name in packed_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


class Server:
    """Started by the constructor, which returns when the server listens; ended by `stop`.

    Without `python` and `folder` it is the ComfyUI that the tests run in. With `packed` the pack is what the registry
    hands on, in a folder of another name; with `bare` there is none.

    Attributes:
        host: whose name its pages know it by.
    """

    host = ""

    def __init__(
        self, base: Path, python: Path | str = sys.executable, folder: Path | None = None, packed: bool = False,
        bare: bool = False,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        if packed:
            pack(base / "custom_nodes" / "GGUF with LoRAs-0.1.0")
        elif not bare:
            (base / "custom_nodes" / "graft").symlink_to(ROOT, target_is_directory=True)
        code = TEST_NODES.format(tests=str(ROOT / "tests"), here=str(Path(__file__).parent))
        (base / "custom_nodes" / "test_nodes.py").write_text(code)
        command = [
            str(python), "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(base),
            "--database-url", "sqlite:///:memory:", "--disable-auto-launch",
        ]  # fmt: skip
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")} | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, cwd=folder or os.environ["COMFYUI_PATH"], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.python = Path(python)
        self.log: list[str] = []
        self.output = base / "output"
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if "To see the GUI go to" in line:
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(self.log[-60:]))
        # what is not read would fill the pipe and stop the server
        threading.Thread(target=self._read_on, daemon=True).start()

    def _read_on(self) -> None:
        assert self.process.stdout is not None
        self.log.extend(self.process.stdout)

    def get(self, path: str) -> dict:
        return asyncio.run(self._get(path))

    async def _get(self, path: str) -> dict:
        import aiohttp  # ComfyUI brings it; whoever only opens the page does without

        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.port}{path}") as answer:
            return await answer.json()

    def fetch(self, path: str) -> tuple[int, dict, bytes]:
        """An answer as it comes: its status, headers and body. `path` is encoded already."""
        return asyncio.run(self._fetch(path))

    async def _fetch(self, path: str) -> tuple[int, dict, bytes]:
        import aiohttp
        import yarl

        address = yarl.URL(f"http://127.0.0.1:{self.port}{path}", encoded=True)
        async with aiohttp.ClientSession() as session, session.get(address) as answer:
            return answer.status, dict(answer.headers), await answer.read()

    def run(self, workflow: dict, drawn: dict | None = None) -> dict:
        """Queue a workflow in API format, wait for its end, and return its entry in the history.

        `drawn` is the same as people see it (UI format), which the front end sends along.
        """
        return asyncio.run(asyncio.wait_for(self._run(workflow, drawn), 240))

    def refused(self, workflow: dict) -> dict[str, str]:
        """What the host has against a prompt before anything runs: the classes of such nodes and their errors."""
        return asyncio.run(self._refused(workflow))

    async def _refused(self, workflow: dict) -> dict[str, str]:
        import aiohttp

        address = f"http://127.0.0.1:{self.port}/prompt"
        async with aiohttp.ClientSession() as session, session.post(address, json={"prompt": workflow}) as answer:
            errors = (await answer.json())["node_errors"].values()
        found: dict[str, list[str]] = {}
        for node in errors:
            found.setdefault(node["class_type"], []).extend(error["details"] for error in node["errors"])
        return {kind: "; ".join(details) for kind, details in found.items()}

    async def _run(self, workflow: dict, drawn: dict | None) -> dict:
        import aiohttp

        address = f"127.0.0.1:{self.port}"
        async with aiohttp.ClientSession() as session, session.ws_connect(f"ws://{address}/ws?clientId=test") as events:
            extra = {} if drawn is None else {"extra_pnginfo": {"workflow": drawn}}
            body = {"prompt": workflow, "client_id": "test", "extra_data": extra}
            async with session.post(f"http://{address}/prompt", json=body) as answer:
                queued = await answer.json()
                assert answer.status == 200, queued
            async for event in events:
                if event.type != aiohttp.WSMsgType.TEXT:
                    continue
                message = event.json()
                data = message.get("data", {})
                # the last message of a prompt, after its history has been written
                ended = message["type"] == "executing" and data.get("node") is None
                if ended and data.get("prompt_id") == queued["prompt_id"]:
                    break
        history = await self._get(f"/history/{queued['prompt_id']}")
        return history[queued["prompt_id"]]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
