"""The nodes in ComfyUI itself, headless on the CPU: `make test-comfyui COMFYUI=FOLDER`.

Its own Python, with what ComfyUI needs, is `COMFYUI_PYTHON` (default: this one). Nothing is written into its folder.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.test_comfyui import FOLDER, in_python, on_pocket

COMFYUI = Path(os.environ.get("COMFYUI") or "/nonexistent")
PATIENCE = 600.0
PREVIEWS = (1, 4)  # binary messages: an image, an image with its metadata

pytestmark = pytest.mark.skipif(
    not (COMFYUI / "main.py").is_file(), reason="no ComfyUI here: make test-comfyui COMFYUI=FOLDER"
)


@dataclass
class Server:
    """A ComfyUI that runs, and one client of it."""

    address: str
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def ask(self, path: str, data: Any = None) -> Any:
        """The JSON answer to a GET, or with `data` to a POST."""
        body = None if data is None else json.dumps(data).encode()
        with urllib.request.urlopen(f"http://{self.address}{path}", body, timeout=PATIENCE) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def run(self, workflow: dict[str, Any], hear: Callable[[str, Any], None] | None = None) -> str:
        """Queue a workflow and listen until it ends; `hear` is told of each message. Gives how it ended."""
        return self.recorded(workflow, hear)[0]

    def recorded(
        self, workflow: dict[str, Any], hear: Callable[[str, Any], None] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """`run`, and what ComfyUI's history says of it: written after the message of success, before the last one."""
        from websocket import create_connection

        how = ""
        wire = create_connection(f"ws://{self.address}/ws?clientId={self.name}", timeout=PATIENCE)
        try:
            wanted = self.ask("/prompt", {"prompt": workflow, "client_id": self.name})["prompt_id"]
            while True:
                said = wire.recv()
                if isinstance(said, bytes):
                    kind, data = f"binary {struct.unpack('>I', said[:4])[0]}", said[4:]
                else:
                    message = json.loads(said)
                    kind, data = message["type"], message["data"]
                if hear is not None:
                    hear(kind, data)
                ends = kind in ("execution_success", "execution_error", "execution_interrupted")
                if ends and data["prompt_id"] == wanted:
                    how = kind if kind != "execution_error" else f"{kind}: {data['exception_message']}"
                if kind == "executing" and data["node"] is None and data["prompt_id"] == wanted:
                    return how, self.ask(f"/history/{wanted}")[wanted]
        finally:
            wire.close()

    def pictures(self, workflow: dict[str, Any]) -> list[np.ndarray]:
        """What a workflow saves, as (height, width, 3) of 8 bits."""
        how, record = self.recorded(workflow)
        assert how == "execution_success"
        found = []
        for image in record["outputs"]["10"]["images"]:
            place = f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
            with urllib.request.urlopen(f"http://{self.address}{place}", timeout=PATIENCE) as answer:
                found.append(np.asarray(Image.open(BytesIO(answer.read())).convert("RGB")))
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with our nodes alone, and folders of its own."""
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "output", "models", "user", "temp"):
        (base / name).mkdir()
    (base / "custom_nodes" / "mrflow").symlink_to(FOLDER, target_is_directory=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ.get("COMFYUI_PYTHON") or sys.executable
    words = (
        f"main.py --cpu --listen 127.0.0.1 --port {port} --base-directory {base} --disable-auto-launch "
        "--disable-api-nodes --database-url sqlite:///:memory:"
    )
    path = os.pathsep.join(filter(None, (str(FOLDER.parents[1]), os.environ.get("PYTHONPATH"))))
    said = base / "said.txt"
    with said.open("wb") as out:
        process = subprocess.Popen(
            [python, *words.split()], cwd=COMFYUI, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": path}
        )
    found = Server(f"127.0.0.1:{port}")
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                found.ask("/system_stats")
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, said.read_text("utf-8", "replace")[-3000:]
                time.sleep(0.5)
        yield found
    finally:
        process.terminate()
        process.wait(60)


def test_the_nodes_load_with_their_inputs(server: Server) -> None:
    known = server.ask("/object_info")
    ours = {name: each for name, each in known.items() if name.startswith("Mrflow")}
    assert set(ours) == {entry["class_type"] for entry in on_pocket().values()} - {"SaveImage"}
    for number, entry in on_pocket().items():
        inputs = known[entry["class_type"]]["input"]
        assert set(entry["inputs"]) <= set(inputs["required"]) | set(inputs.get("optional", {})), number
        assert set(inputs["required"]) <= set(entry["inputs"]), number


def test_the_workflow_draws_what_python_draws_and_seeds_tell_pictures_apart(server: Server) -> None:
    first = server.pictures(on_pocket())
    want = in_python([5, 6]).pixels.permute(0, 2, 3, 1).mul(255).byte().numpy()  # SaveImage cuts, it does not round
    assert len(first) == 2 and all(np.array_equal(a, b) for a, b in zip(first, want, strict=True))
    (second,) = server.pictures(on_pocket(seed=6, batch=1))
    off = np.abs(second.astype(int) - first[1]).max()
    assert off <= 1 and np.abs(second.astype(int) - first[0]).max() > 50


def test_progress_counts_every_step_and_previews_come_when_asked_for(server: Server) -> None:
    for every, shown in ((0, 0), (4, 3)):
        counted, seen = [], []

        def hear(kind: str, data: Any, counted: list[Any] = counted, seen: list[Any] = seen) -> None:
            if kind == "progress" and data["node"] == "9":
                counted.append((data["value"], data["max"]))
            elif kind in [f"binary {each}" for each in PREVIEWS]:
                seen.append(Image.open(BytesIO(data[data.index(b"\xff\xd8") :])).size)

        assert server.run(on_pocket(seed=10 + every, batch=1, previews=every), hear) == "execution_success"
        assert counted == [(i, 13) for i in range(1, 14)]
        assert seen == [(512, 512)] * shown  # as large as ComfyUI shows them


def test_cancel_interrupts_between_two_steps_and_the_next_run_is_whole(server: Server) -> None:
    counted = []

    def hear(kind: str, data: Any) -> None:
        if kind == "progress" and data["node"] == "9":
            counted.append(data["value"])
            if data["value"] == 2:
                server.ask("/interrupt", {})

    assert server.run(on_pocket(seed=77, batch=1), hear) == "execution_interrupted"
    assert counted[-1] < 13
    assert server.run(on_pocket(seed=77, batch=1)) == "execution_success"


def test_mistakes_reach_the_user_in_words(server: Server) -> None:
    workflow = on_pocket()
    workflow["2"]["inputs"]["solver"] = "heun"
    assert "did you mean Heun" in server.run(workflow)
