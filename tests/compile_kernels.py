"""Compile every kernel for a GPU that need not be there; print registers and spilled bytes of each as JSON.

Run by itself, without TRITON_INTERPRET: python tests/compile_kernels.py 80 90
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mrflow.models.kernels import triton_code as code

HALF = (
    "x",
    "shift",
    "scale",
    "out",
    "gate",
    "change",
    "normed",
    "seen",
    "inner",
    "weight",
    "factor",
    "past",
    "bias",
    "gamma",
)
FLOAT = ("cos", "sin", "parts", "moments")
FLUX = {"eps": 1e-6, "block": 4096}
HEADS = {"eps": 1e-6, "some": code.HEADS, "half": 64}
TILE = {"width": 128, "groups": 32, "rows": code.TILE // 128}
KERNELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "norm": (code.norm_kernel, FLUX, 8),
    "gated": (code.gated_kernel, FLUX | {"norm": False}, 8),
    "gated_norm": (code.gated_kernel, FLUX | {"norm": True}, 8),
    "heads": (code.heads_kernel, HEADS | {"late": False}, 4),
    "heads_late": (code.heads_kernel, HEADS | {"late": True}, 4),
    "rms_scaled": (code.rms_kernel, FLUX | {"add": False}, 8),
    "rms_gated": (code.rms_kernel, FLUX | {"add": True}, 8),
    "moments": (code.moments_kernel, TILE | {"some": code.SOME}, 8),
    "together": (code.together_kernel, {"groups": 32, "some": code.PARTS}, 4),
    "group_silu": (code.group_silu_kernel, TILE | {"eps": 1e-6}, 8),
    "channel_silu": (code.channel_silu_kernel, {"rows": code.TILE // 2 // 128, "block": 128}, 8),
    "beside": (code.beside_kernel, {"block": code.COLUMNS}, 4),
}


def compiled(capability: int) -> dict[str, dict[str, int]]:
    """Registers and spills of each kernel, as ptxas says them."""
    tools = sorted(Path(triton.__file__).parent.rglob("bin/ptxas*"))  # one for each age of GPUs
    found = dict[str, dict[str, int]]()
    for name, (kernel, constants, warps) in KERNELS.items():
        kinds = dict.fromkeys(kernel.arg_names, "i32")
        kinds |= {a: "*bf16" for a in kinds if a in HALF} | {a: "*fp32" for a in kinds if a in FLOAT}
        kinds |= {"root": "fp32"} if "root" in kinds else {}
        kinds |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, kinds, constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.ptx"
            file.write_text(made.asm["ptx"])
            target = re.search(r"\.target (sm_\w+)", made.asm["ptx"])
            assert target is not None
            tries = [
                subprocess.run(
                    [tool, "-v", f"--gpu-name={target[1]}", str(file), "-o", f"{folder}/out"],
                    capture_output=True,
                    text=True,
                )
                for tool in tools
            ]
        said = next((t.stderr for t in tries if t.returncode == 0), None)
        assert said is not None, [t.stderr for t in tries]
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
        registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
        found[f"{name} {target[1]}"] = {"registers": registers, "spilled": spills}
    return found


if __name__ == "__main__":
    print(json.dumps({k: v for arch in sys.argv[1:] for k, v in compiled(int(arch)).items()}))
