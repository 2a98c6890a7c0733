"""Hostile names and files that are none, for tests of what users hand over."""

import os
import re
import signal
import socket
from contextlib import contextmanager

import pytest

# What may not reach a terminal or a program that reads the output.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
EVIL = "\x1b[2J\x9b31m\x07\u202e\r\nerror: none"
NO_TEXT = os.fsdecode(b"ab\xff")


@contextmanager
def in_time(seconds=30):
    """Fail instead of waiting for ever."""

    def late(*_):
        pytest.fail(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pipe(path):
    os.mkfifo(path)


def listener(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # for the names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def endless(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path.name)


def giant(path):
    with open(path, "wb") as file:
        file.truncate(2**40)
