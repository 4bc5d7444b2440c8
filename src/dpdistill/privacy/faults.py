"""Numbered points at which a test kills the process, to prove that a crash loses and repeats nothing.

Inert unless the environment names a point: DPDISTILL_KILL_AT=7 kills the process (SIGKILL) at the seventh point it passes;
DPDISTILL_POINTS=FILE appends each point's name to FILE.
"""

import os
import signal

_passed = 0


def point(name: str) -> None:
    """Passes a numbered point."""
    global _passed
    _passed += 1
    listing = os.environ.get("DPDISTILL_POINTS")
    if listing:
        with open(listing, "a") as file:
            file.write(name + "\n")
    if os.environ.get("DPDISTILL_KILL_AT") == str(_passed):
        os.kill(os.getpid(), signal.SIGKILL)
