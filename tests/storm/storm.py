#!/usr/bin/python3
"""Reads the image it runs in, cold each time, and says what it has read.

storm.py MODE ROUNDS     one line per round: the mode and a digest of everything read. ROUNDS 0: until SIGTERM.
The last line is DONE and a JSON document: rounds, reads; in seconds the longest that one of them took (worst), what 99 of 100 took at most (p99),
and how much later than it wanted a process woke that only sleeps (waited): what the machine itself does to programs.
"""
import hashlib
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time

LIBRARY = os.path.dirname(os.__file__)
# What the runtime puts into every container, and what this program writes.
NOT_OF_THE_IMAGE = {"/proc", "/sys", "/dev", "/tmp", "/run", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"}
BLOCK = 65536

stats = {"rounds": 0, "reads": 0, "worst": 0.0, "p99": 0.0, "waited": 0.0}
times = []
stopping = False


def stop(*_):
    global stopping
    stopping = True


def timed(call, *arguments):
    start = time.monotonic()
    result = call(*arguments)
    times.append(time.monotonic() - start)
    stats["reads"] += 1
    return result


def watch_the_machine():
    """A process beside this one, and where it writes what it sees. (A thread would need a library that is in no layer.)"""
    place, worst = mmap.mmap(-1, 8), 0.0
    child = os.fork()
    while child == 0:
        start = time.monotonic()
        time.sleep(0.005)
        worst = max(worst, time.monotonic() - start - 0.005)
        place[:] = struct.pack("d", worst)
    return child, place


def cold(path):
    """The file, opened, without what the kernel has kept of it."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return handle


def content(path, digest):
    handle = cold(path)
    try:
        while chunk := timed(os.read, handle, 1 << 17):
            digest.update(chunk)
    finally:
        os.close(handle)


def tree(top):
    for directory, directories, files in os.walk(top, onerror=fail):
        directories[:] = sorted(d for d in directories if os.path.join(directory, d) not in NOT_OF_THE_IMAGE)
        for name in sorted(files):
            path = os.path.join(directory, name)
            if path not in NOT_OF_THE_IMAGE:
                yield path


def fail(error):
    raise error


def whole_image():
    digest = hashlib.sha256()
    for path in tree("/"):
        status = os.lstat(path)
        digest.update(f"{path} {status.st_mode:o} {status.st_size}\n".encode())
        if os.path.islink(path):
            digest.update(os.readlink(path).encode())
        elif os.path.isfile(path):
            content(path, digest)
    return digest.hexdigest()


IMPORTS = """
import argparse, ast, asyncio, base64, bisect, calendar, cgi, cmd, codecs, collections, configparser, contextlib, copy, csv, dataclasses
import datetime, decimal, difflib, dis, email.message, email.parser, enum, fractions, ftplib, functools, getopt, gettext, glob, gzip, heapq
import html.parser, http.client, http.cookies, http.server, imaplib, inspect, ipaddress, json, locale, logging.config, mailbox, mimetypes
import numbers, optparse, pathlib, pdb, pickle, pickletools, plistlib, pprint, queue, random, sched, shelve, shlex, shutil, smtplib, socketserver
import statistics, string, subprocess, tarfile, tempfile, textwrap, threading, timeit, tokenize, traceback, types, typing, unittest.mock
import urllib.request, urllib.robotparser, uuid, wave, weakref, xml.dom.minidom, xml.etree.ElementTree, xmlrpc.client, zipfile
import hashlib, sys
digest = hashlib.sha256()
for name, module in sorted(sys.modules.items()):
    path = getattr(module, "__file__", None)
    if path:
        digest.update(name.encode())
        digest.update(open(path, "rb").read())
print(digest.hexdigest())
"""

BUILD = """
import hashlib, os, py_compile, sys
digest = hashlib.sha256()
for package in ("asyncio", "concurrent", "email", "html", "http", "importlib", "json", "logging", "unittest", "urllib", "xml"):
    for directory, directories, files in os.walk(os.path.join(sys.argv[1], package)):
        directories.sort()
        for name in sorted(f for f in files if f.endswith(".py")):
            out = py_compile.compile(os.path.join(directory, name), cfile=f"/tmp/out-{os.getpid()}", doraise=True,
                                     invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
            digest.update(open(out, "rb").read())
            os.unlink(out)
print(digest.hexdigest())
"""


def program(text):
    """A fresh interpreter, whose modules have to be read again."""
    for path in tree(LIBRARY):
        os.close(cold(path))
    environment = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = timed(lambda: subprocess.run([sys.executable, "-c", text, LIBRARY], env=environment, capture_output=True))
    if done.returncode != 0:
        raise RuntimeError(f"it ended with {done.returncode}: {done.stderr.decode()}")
    return done.stdout.decode().strip()


def blocks():
    """Blocks of the files below /data in random order, past the page cache."""
    sums = dict(sums_of_blocks)
    places = list(sums)
    random.shuffle(places)
    buffer = mmap.mmap(-1, BLOCK)
    for path, offset in places[:64]:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            length = timed(os.preadv, handle, [buffer], offset)
        finally:
            os.close(handle)
        found = hashlib.sha256(buffer[:length]).hexdigest()
        if found != sums[(path, offset)]:
            raise RuntimeError(f"{length} bytes of {path} at {offset} are {found}, not {sums[(path, offset)]}")
    return "as written"


def read_sums():
    with open("/data/sums") as lines:
        for line in lines:
            path, offset, digest = line.split()
            yield (path, int(offset)), digest


MODES = {"hash": whole_image, "import": lambda: program(IMPORTS), "build": lambda: program(BUILD), "random": blocks}

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    mode, rounds = sys.argv[1], int(sys.argv[2])
    sums_of_blocks = dict(read_sums())
    watcher, waited = watch_the_machine()
    print("READY", flush=True)
    while not stopping and (rounds == 0 or stats["rounds"] < rounds):
        print(mode, MODES[mode](), flush=True)
        stats["rounds"] += 1
    # A whole program is no single read.
    if mode not in ("import", "build"):
        times.sort()
        stats["worst"], stats["p99"] = times[-1], times[len(times) * 99 // 100]
    os.kill(watcher, signal.SIGKILL)
    stats["waited"] = struct.unpack("d", waited[:])[0]
    print("DONE", json.dumps(stats), flush=True)
