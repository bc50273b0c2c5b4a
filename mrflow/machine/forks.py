"""What a fork does not take along: the threads of OpenMP, and CUDA."""

import os

import torch

from mrflow.display.notes import note
from mrflow.errors import PlanError

_pid = os.getpid()


def check_process(device: torch.device) -> None:
    """Make a forked process fit to compute; in any other nothing happens.

    GNU's OpenMP waits forever for threads that the parent alone has, so a forked process computes with one thread.

    Raises:
        PlanError: the device is CUDA, which was initialised before the fork.
    """
    if os.getpid() == _pid:
        return
    if device.type == "cuda" and getattr(torch.cuda, "_is_in_bad_fork", bool)():
        raise PlanError(
            "CUDA was initialised before this process was forked, and does not work in it: start processes with "
            "multiprocessing.get_context('spawn'), or load models after the fork only"
        )
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        note(
            "this process was forked, and computes with one thread; start processes with "
            "multiprocessing.get_context('spawn') to use more"
        )
