"""Failures that no retry in the same process mends: the device was lost."""

from mrflow.errors import DeviceLostError
from mrflow.machine.failures import words_of

LOST = (
    "cuda error:", "hip error:", "device-side assert", "illegal memory access", "illegal address", "uncorrectable ecc",
    "unspecified launch failure", "device is lost", "device lost", "gpu is lost", "cudnn_status_execution_failed",
    "cublas_status_execution_failed", "cudnn_status_internal_error",
)  # fmt: skip
NOT_LOST = ("out of memory", "no kernel image", "invalid configuration argument", "invalid device ordinal")


def is_device_lost(error: BaseException) -> bool:
    """Whether an exception, or one behind it, says that the device can do nothing more in this process."""
    behind: BaseException | None = error
    seen = set[int]()
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        text = words_of(behind).lower()
        if isinstance(behind, DeviceLostError):
            return True
        if isinstance(behind, RuntimeError) and any(words in text for words in LOST):
            return not any(words in text for words in NOT_LOST)
        behind = behind.__cause__ or behind.__context__
    return False
