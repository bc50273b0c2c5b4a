"""What pictures are made on: for people, and what its instructions are good for."""

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from mrflow.display.notes import counted


@cache
def machine(device: torch.device) -> str:
    """Processor or GPU, threads, system, Python: `AMD EPYC, 2 threads, Linux x86_64, Python 3.11.8`; part of no key."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = counted(torch.get_num_threads(), "thread")
        name = f"{'' if device.type == 'cpu' else f'{device.type}, '}{_processor()}, {threads}"
    return f"{name}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _processor() -> str:
    with suppress(OSError, ValueError):  # Linux
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "processor"


def has_bfloat16() -> bool:
    """Whether this processor's bfloat16 products are not emulated: by torch value by value, by oneDNN with AVX-512.

    oneDNN calls bfloat16 supported wherever there is AVX-512; without AVX512-BF16 or AMX its products take longer than
    those of float32. What ONEDNN_MAX_CPU_ISA keeps it from counts as missing, as it does for torch below AVX-512.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in ("AVX512_CORE", "AVX512_CORE_VNNI")
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    emulated = torch.cpu._is_avx512_supported() and not (instructions and allowed)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not emulated
