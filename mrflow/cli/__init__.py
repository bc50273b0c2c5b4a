"""The command line: one file a group of verbs, parsing, and what is shown."""

import os
import signal
import sys
import threading

from mrflow.machine.interrupts import GRACE, SIGNALS, end_at_once


def main() -> None:
    """The entry point. Ctrl-C ends it with 130 and SIGTERM with 143, also while it begins and ends."""

    def ended(number: int, frame: object) -> None:
        sys.stdout.flush()
        sys.stderr.write("stopped\n")
        end_at_once(number)

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # a shell closed it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for number in SIGNALS:
        signal.signal(number, ended)
    from mrflow.cli.app import run_app as run  # here, so that Ctrl-C is heard while it loads

    try:
        run()
    except SystemExit as end:
        if end.code in (130, 143):  # Python waits for threads, such as downloads
            left = threading.Timer(GRACE, end_at_once, (int(end.code) - 128,))
            left.daemon = True
            left.start()
        raise
