"""What only some machines have, taken away: the rest goes on, and says the same."""

import ast
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import pytest
import torch

import mrflow as mf
from mrflow import runner
from mrflow.cli import parsing
from mrflow.machine import hardware
from mrflow.records import files, publish
from mrflow.sweep import leases, limits, rows
from mrflow.upscalers import network
from tests.mps import MPS, Mps, move

ROOT = Path(mf.__file__).parent
POSIX_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "syslog"}
POSIX_NAMES = {
    "os": "fork forkpty getuid geteuid getgid getpgid setsid uname sysconf pread pwrite killpg nice chown fchown "
    "fchmod statvfs getloadavg sched_getaffinity mkfifo posix_fadvise sync wait4 WNOHANG O_NOFOLLOW O_NONBLOCK "
    "O_CLOEXEC O_SYNC O_DIRECTORY link kill",
    "signal": "SIGALRM SIGPIPE SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGCHLD setitimer ITIMER_REAL alarm pause pthread_kill",
    "time": "tzset clock_gettime CLOCK_MONOTONIC",
    "socket": "AF_UNIX",
}


def unguarded(source: str) -> Iterator[str]:
    """Uses of what Windows lacks, in functions that ask nothing and catch nothing."""
    names = {module: set(words.split()) for module, words in POSIX_NAMES.items()}

    def look(node: ast.AST, guarded: bool) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            guarded = bool(words & {"hasattr", "POSIX", "AttributeError", "ImportError"})
        if isinstance(node, ast.Attribute) and not guarded:
            room = ast.unparse(node.value)
            if node.attr in names.get(room, ()):
                yield f"{room}.{node.attr}"
        if isinstance(node, ast.Import | ast.ImportFrom) and not guarded:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            yield from (f"import {m}" for m in modules if m in POSIX_MODULES)
        if isinstance(node, ast.Constant) and str(node.value).startswith(("/proc", "/sys", "/dev")) and not guarded:
            yield str(node.value)
        for child in ast.iter_child_nodes(node):
            inside = guarded or (isinstance(node, ast.Try | ast.With) and catches(node))
            yield from look(child, inside)

    yield from look(ast.parse(source), guarded=False)


def catches(node: ast.Try | ast.With) -> bool:
    """Whether a block goes on where something is not there."""
    text = " ".join(ast.unparse(h.type) for h in node.handlers if h.type) if isinstance(node, ast.Try) else ""
    text += "".join(ast.unparse(i.context_expr) for i in node.items) if isinstance(node, ast.With) else ""
    return "OSError" in text


def test_what_only_posix_has_is_asked_for_first() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in sorted(ROOT.rglob("*.py"))
        if (names := sorted(set(unguarded(path.read_text("utf-8")))))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("import os\ndef f():\n    os.pread(1, 2, 3)", ["os.pread"]),
        ("import signal\nsignal.SIGALRM", ["signal.SIGALRM"]),
        ("import resource", ["import resource"]),
        ("def f():\n    return open('/proc/stat')", ["/proc/stat"]),
        ("def f():\n    try:\n        import resource\n    except ImportError:\n        pass", []),
        ("def f():\n    with suppress(OSError):\n        open('/proc/stat')", []),
        ("def f():\n    return hasattr(os, 'pread') and os.pread(1, 2, 3)", []),
    ],
)
def test_the_guard_sees_what_it_should(source: str, want: list[str]) -> None:
    assert list(unguarded(source)) == want


@pytest.mark.parametrize("how", ["no such function", *("EPERM", "ENOTSUP", "EXDEV", "EINVAL")])
def test_names_are_given_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def refused(*_: object) -> None:
        raise OSError(getattr(errno, how), "no links here")

    if how == "no such function":
        monkeypatch.delattr(os, "link")
    else:
        monkeypatch.setattr(os, "link", refused)
    taken, free = tmp_path / "a", tmp_path / "b"
    publish.publish({free: b"1"})
    taken.write_bytes(b"mine")
    with pytest.raises(publish.TakenError):
        publish.publish({taken: b"2"})
    assert (free.read_bytes(), taken.read_bytes()) == (b"1", b"mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without /proc."""
    told = {"read_text": Path.read_text, "readlink": os.readlink}

    def read(self: Path, *how: object, **more: object) -> str:
        if str(self).startswith("/proc"):
            raise FileNotFoundError(str(self))
        return told["read_text"](self, *how, **more)  # type: ignore[arg-type]

    def link(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "readlink", link)
    for each in (leases.boot, hardware.machine):
        each.cache_clear()


@pytest.mark.parametrize("posix", [True, False])
def test_leases_hold_without_proc_and_without_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, posix: bool
) -> None:
    """As on macOS and Windows: a row is one process's, a dead one's is taken over, and nobody is signalled."""
    no_proc(monkeypatch)
    asked: list[int] = []
    monkeypatch.setattr(leases, "POSIX", posix)
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append(pid))
    monkeypatch.setattr(os, "supports_fd", set[object]())
    monkeypatch.setattr(leases, "BEAT", 0.02)
    a, b = leases.Leases(tmp_path), leases.Leases(tmp_path)
    assert a.claim("k", calm=False, wanted=lambda: True) is not None
    a.doing(["k"], "alone")
    assert b.claim("k", calm=False, wanted=lambda: True) is None
    assert asked == ([os.getpid()] if posix else [])
    old = time.time() - 10 * leases.STALE
    os.utime(a.path("k"), (old, old))
    until = time.monotonic() + 30
    while a.path("k").stat().st_mtime == old and time.monotonic() < until:
        time.sleep(0.02)
    assert a.path("k").stat().st_mtime > old  # its heart beats without handles
    a.abandon()
    taken = b.claim("k", calm=False, wanted=lambda: True)
    assert taken is not None and taken.deaths == 1
    b.close()
    assert not list(tmp_path.iterdir())
    leases.boot.cache_clear()


def test_time_limits_hold_without_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIGALRM", "setitimer", "ITIMER_REAL"):
        monkeypatch.delattr(signal, name)
    with pytest.raises(limits.RowTimeoutError), limits.time_limit(0.05, stuck=lambda: None):
        while True:
            time.sleep(0.01)
    with limits.time_limit(60, stuck=lambda: None):
        pass


def test_memory_and_processor_are_told_where_the_system_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert runner._peak(cpu) > 0 and (network.free_memory(cpu) or 0) > 0
    no_proc(monkeypatch)

    def closed(*_: object) -> None:
        raise OSError("no /proc here")

    monkeypatch.setitem(network.__dict__, "open", closed)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert runner._peak(cpu) == 0 and network.free_memory(cpu) is None
    assert "processor, " in hardware.machine(cpu)
    hardware.machine.cache_clear()
    result = mf.run(mf.Sample(16, 16, mf.Linear(2)) >> mf.Decode(), mf.toy(), "a")
    assert result.record()["peak_bytes"] == 0


def test_paths_may_have_drive_letters_and_backslashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = r"C:\loras\ink.safetensors"
    assert (parsing.parse_lora(lora).path, parsing.parse_lora(lora).strength) == (lora, 1.0)
    assert (parsing.parse_lora(f"{lora}:0.8").path, parsing.parse_lora(f"{lora}:0.8").strength) == (lora, 0.8)
    with pytest.raises(mf.PlanError, match="file.py:name, got"):
        parsing.load_chain(r"C:\chains.py")
    asked: list[Path] = []
    monkeypatch.setattr(parsing, "load_file", lambda file: asked.append(file) or {"a": mf.Decode()})
    assert len(parsing.load_chain(r"C:\work\chains.py:a")) == 1 and asked == [Path(r"C:\work\chains.py")]
    monkeypatch.setattr(os.path, "basename", lambda path: PureWindowsPath(path).name)
    row = {"key": "ab", "status": "failed"}
    (tmp_path / r"C:\sweep\rows\ab.json").write_text(json.dumps(row))
    seen: list[object] = []
    monkeypatch.setattr(rows, "_NEEDED", {"key"})
    monkeypatch.setattr(rows, "Row", lambda **known: seen.append(known) or known)
    assert rows.read_row(str(tmp_path / r"C:\sweep\rows\ab.json")) == row


def test_files_are_read_as_bytes_where_text_is_another_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    opened = os.open
    monkeypatch.setattr(os, "O_BINARY", 1 << 30, raising=False)
    monkeypatch.setattr(os, "open", lambda path, flags: asked.append(flags) or opened(path, flags & ~(1 << 30)))
    (tmp_path / "a").write_bytes(b"\r\n\x1a\n")
    assert files.read_regular(tmp_path / "a", most=9) == b"\r\n\x1a\n" and asked[0] & (1 << 30)


CHAINS = {
    "paper": mf.recipes.paper(mf.Lanczos(2), low=(16, 16), size=(32, 32), steps=3),
    "heun, guided": mf.Sample(16, 16, mf.Karras(3), solver=mf.Heun(), guidance=mf.CFG(2)) >> mf.Decode(),
    "multistep": mf.Sample(16, 16, mf.Shifted(4), solver=mf.DPMpp2M()) >> mf.Decode(),
    "adaptive": mf.Sample(16, 16, mf.Linear(2), solver=mf.BogackiShampine(0.1)) >> mf.Decode(),
    "latents": mf.Sample(16, 16, mf.Linear(2)) >> mf.Lift((32, 32)) >> mf.Reinject(0.3) >> mf.Refine() >> mf.Decode(),
    "cubic": mf.Sample(16, 16, mf.Linear(1)) >> mf.Decode() >> mf.Upscale(mf.Interpolate(2, "bicubic")),
    "selflift": mf.recipes.selflift(low=16, size=32, steps=(2, 2)),
    "speed": mf.recipes.speed(sizes=(16, 32), steps=(2, 2)),
    "ralu": mf.recipes.ralu(size=32, steps=(2, 2, 2)),
    "jit": mf.SampleAnchors(32, 32, (2, 2, 2)) >> mf.Decode(),
    "fresco": mf.SampleConverged(32, 32, (2, 2, 2)) >> mf.Decode(),
    "tiles": mf.Sample(16, 24, mf.Linear(2))
    >> mf.Lift((32, 48))
    >> mf.Reinject(0.5)
    >> mf.Refine(tiles=mf.Tiles(8, 4))
    >> mf.Decode(),
}


@pytest.mark.parametrize("name", CHAINS)
def test_nothing_is_float64_on_apples_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    want = mf.run(CHAINS[name], mf.toy(positions=True), "a red circle", seed=3).data
    with Mps() as device:
        model = mf.toy(positions=True)
        model._device = MPS
        result = mf.run(CHAINS[name], model, "a red circle", seed=3)
        assert result.data.device == MPS and device.computed > 20
    torch.testing.assert_close(result.data.as_subclass(torch.Tensor), want)


CACHES = {
    "TeaCache": mf.caches.TeaCache(0.1),
    "TaylorSeer": mf.caches.TaylorSeer(),
    "DMD": mf.caches.DMD(1.0, front=1, warmup=4, limit=2),
    "SeaCache": mf.caches.SeaCache(),
    "Spectrum": mf.caches.Spectrum(),
}


@pytest.mark.parametrize("name", CACHES)
def test_no_cache_is_float64_on_apples_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    model, chain = mf.load("pocket"), mf.Sample(64, 64, mf.Shifted(9), cache=CACHES[name]) >> mf.Decode()
    want = mf.run(chain, model, "a red circle", seed=3).data
    with Mps():
        move(model)
        found = mf.run(chain, model, "a red circle", seed=3).data
        assert found.device == MPS
    # an extrapolation in float32 differs by its rounding (1e-7), of which nine evaluations make more
    torch.testing.assert_close(found.as_subclass(torch.Tensor), want, rtol=0, atol=1e-4)


def test_no_metric_is_float64_on_apples_gpu() -> None:
    a, b = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = mf.toy()
    want = [f(a, b) for f in (mf.metrics.psnr, mf.metrics.ssim, mf.metrics.power_ratio)]
    decoder = mf.linear_decoder(model, a)
    model._device = MPS
    with Mps():
        x, y = a.to(MPS), b.to(MPS)
        found = [f(x, y) for f in (mf.metrics.psnr, mf.metrics.ssim, mf.metrics.power_ratio)]
        assert mf.metrics.sharpness(x).device == MPS
        assert mf.linear_decoder(model, a) == decoder
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: torch.zeros(2, device="mps") + torch.zeros(2),
        lambda: torch.stack((torch.zeros(2), torch.zeros(2, device="mps"))),
        lambda: torch.zeros(2)[torch.zeros(2, device="mps").long()],
        lambda: torch.where(torch.zeros(2, device="mps") > 0, torch.zeros(2), 0.0),
    ],
)
def test_the_stand_in_refuses_two_devices_in_one_computation(wrong: "object") -> None:
    with Mps():
        there = torch.zeros(2, device="mps")
        assert (there + torch.tensor(1.0) + 1 + torch.zeros(2).to(there))[torch.tensor([0])].device == MPS
        with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
            wrong()  # type: ignore[operator]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: torch.zeros(2, device="mps").double(),
        lambda: torch.zeros(2, device="mps", dtype=torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64).to("mps"),
        lambda: torch.zeros(2, dtype=torch.float64).to(MPS),
        lambda: torch.zeros(2, device="mps").sum(dtype=torch.float64),
        lambda: (torch.zeros(2, device="mps") + 1).to(torch.float64),
    ],
)  # fmt: skip
def test_the_stand_in_refuses_float64(wrong: "object") -> None:
    with Mps():
        assert torch.zeros(2, device="mps").cpu().double().dtype == torch.float64
        with pytest.raises(TypeError, match="doesn't support float64"):
            wrong()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("onednn", "avx512", "instructions", "capped", "native"),
    [
        (False, False, False, "", False),  # AVX2: torch's own loops
        (True, True, False, "", False),  # Skylake, Cascade Lake: oneDNN emulates
        (True, True, True, "", True),  # Cooper Lake and later, Zen 4
        (True, True, True, "avx512_core", False),
        (True, True, True, "AVX512_CORE_BF16", True),
        (True, False, False, "", True),  # Arm with bf16, x86 with AVX-NE-CONVERT
    ],
)
@pytest.mark.parametrize("instruction", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bfloat16_that_is_emulated_is_not_the_processors(
    onednn: bool,
    avx512: bool,
    instructions: bool,
    capped: str,
    native: bool,
    instruction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda each=each: instructions and each == instruction)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", capped)
    assert hardware.has_bfloat16() == native
