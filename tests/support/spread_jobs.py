"""Jobs for other processes, in a module that these can import."""

import os
import signal
import time


def identity(job):
    time.sleep(0.05)
    return job


def end_of_worker(job):
    os.kill(os.getpid(), signal.SIGKILL)


def broken(job):
    raise ValueError(f"job {job} is broken")


def process_of(job):
    time.sleep(0.05)
    return os.getpid()
