"""Tasks for the tests of worker processes, in a module that is quickly imported there."""

import os
import signal

from scale.types import SourceError


def square(offset, job, report):
    """Report twice and return a number and the process that computed it."""
    report(job)
    report(1)
    return job * job + offset, os.getpid()


def refuse(offset, job, report):
    """Fail as a task with bad input does."""
    raise SourceError(f"file {job}: bad cell")


def die(offset, job, report):
    """End as a process does that the system has no memory for."""
    os.kill(os.getpid(), signal.SIGKILL)
