"""The nodes in ComfyUI itself, headless on the CPU: `make test-comfyui COMFYUI=FOLDER`.

Its own Python, with what ComfyUI needs, is `COMFYUI_PYTHON` (default: this one). Nothing is written into its folder.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mrflow as mf
from tests.lora_files import low_rank, write_lora
from tests.sr_files import rrdb
from tests.test_comfyui import FOLDER, in_python, on_pocket
from tests.tiny import write_zimage_repo

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
    models: Path
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


def saved(result: mf.Result) -> np.ndarray:
    """Pictures as SaveImage writes them: (batch, height, width, 3) of 8 bits, cut and not rounded."""
    return result.pixels.permute(0, 2, 3, 1).mul(255).byte().numpy()


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
    found = Server(f"127.0.0.1:{port}", base / "models")
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
    assert len(first) == 2 and np.array_equal(first, saved(in_python([5, 6])))
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


def test_what_a_name_alone_says_is_found_in_comfyuis_folders_of_models(server: Server) -> None:
    nets, loras = server.models / "upscale_models", server.models / "loras"
    nets.mkdir(exist_ok=True)
    (loras / "of_mine").mkdir(parents=True, exist_ok=True)
    torch.save({"params_ema": rrdb()}, nets / "net.pth")
    changes = low_rank({"double_blocks.1.img_mlp.0": (768, 192), "final_layer.adaLN_modulation.1": (384, 192)}, seed=1)
    file = write_lora(loras / "of_mine" / "style.safetensors", changes, layout="comfyui", hidden=192)
    shutil.copy(file, loras / "plain.safetensors")
    workflow = on_pocket()
    workflow["1"]["inputs"] |= {"lora": "plain.safetensors:0.25"}
    workflow["2"]["inputs"] |= {"lora": "of_mine/style.safetensors:0.5"}
    workflow["4"]["inputs"] |= {"net": "net.pth"}

    chain = mf.recipes.paper(mf.load_upscaler(nets / "net.pth"), low=(64, 64), size=(128, 128))
    first, *rest = chain.stages
    assert isinstance(first, mf.Sample)
    chain = mf.Chain((replace(first, lora=mf.Lora(str(file), 0.5)), *rest))
    want = mf.run(chain, mf.load("pocket", lora=mf.Lora(str(file), 0.25)), "a big red circle", seed=[5, 6])
    got = server.pictures(workflow)
    assert np.array_equal(got, saved(want)) and not np.array_equal(got, saved(in_python([5, 6])))

    for node, name, word, room in (
        ("1", "where", "gone.safetensors", "checkpoints"),
        ("1", "vae", "gone.safetensors", "vae"),
        ("2", "lora", "gone.safetensors:0.5", "loras"),
        ("4", "net", "gone.pth", "upscale_models"),
    ):
        workflow = on_pocket()
        workflow[node]["inputs"][name] = word
        said = server.run(workflow)
        assert f"there is no file {word.split(':')[0]} in {COMFYUI}, " in said, name
        assert str(server.models / room) in said and "give its path" in said, name


def test_a_file_of_a_transformer_takes_its_autoencoder_and_text_encoders(server: Server, tmp_path: Path) -> None:
    repo = write_zimage_repo(tmp_path / "repo")
    for part, room in (("transformer", "diffusion_models"), ("vae", "vae")):
        (server.models / room).mkdir(exist_ok=True)
        (file,) = (repo / part).glob("*.safetensors")
        config = (repo / part / "config.json").read_text()
        save_file(load_file(file), server.models / room / f"z_{part}.safetensors", metadata={"config": config})
    workflow = on_pocket()
    files = {"where": "z_transformer.safetensors", "vae": "z_vae.safetensors", "text": str(repo)}
    workflow["1"]["inputs"] |= files
    want = mf.run(
        mf.recipes.paper(mf.Lanczos(2), low=(64, 64), size=(128, 128)), mf.load(repo, dtype=torch.float32),
        "a big red circle", seed=[5, 6],
    )  # fmt: skip
    assert np.array_equal(server.pictures(workflow), saved(want))


def test_the_queue_runs_on_after_an_error_and_reads_a_model_once(server: Server) -> None:
    wrong = on_pocket(seed=300, batch=1)
    wrong["2"]["inputs"]["height"] = 100
    assert "size 100x64 is not a multiple of 16; try 96x64" in server.run(wrong)
    ran: list[str | None] = []

    def hear(kind: str, data: Any) -> None:
        if kind == "executing":
            ran.append(data["node"])

    assert server.run(on_pocket(seed=300, batch=1)) == "execution_success"
    assert server.run(on_pocket(seed=300, batch=1, prompt="a big blue ring"), hear) == "execution_success"
    assert ran == ["9", "10", None]
    server.ask("/free", {"unload_models": True, "free_memory": True})
    server.ask("/prompt", {"prompt": on_pocket(seed=301, batch=1)})
    assert server.run(on_pocket(seed=301, batch=2)) == "execution_success"
