"""Runs one program and its tests; started by `rewards.verify.PassesTests` as a process of its own.

Reads from standard input, as JSON: `program`, `tests`, `token`, `memory` (bytes), `seconds` (of CPU time), `network`. Writes to
standard output one line `<token> <number>` for each test that has passed, where the program cannot easily write itself:
its own output goes nowhere, and leaving early (`sys.exit()`) passes no test. Uses the standard library only, and little of it:
it is started for every completion.
"""

import json
import os
import resource
import signal
import sys
import traceback

NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # CLONE_NEWUSER, _NEWPID, _NEWNET (sched.h)
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG (prctl.h)
NO_NAMESPACE = 77
"""Exit status where the kernel does not let this user have a network of his own."""
MAX_FILE, MAX_PROCESSES = 16 << 20, 64


def isolate() -> None:
    """Leave the network, and go on as a process that takes all its descendants with it when it ends."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(NEW_USER | NEW_PROCESSES | NEW_NETWORK) != 0:
        os._exit(NO_NAMESPACE)
    # The first child is the new process namespace's init: when it ends, the kernel ends all the others.
    for _ in range(2):
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))


def limit(memory: int, seconds: int) -> None:
    """Bound what the process may use."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE, MAX_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Run what standard input says."""
    job = json.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    if not job["network"]:
        isolate()
    limit(job["memory"], job["seconds"])
    token, tests = job["token"], job["tests"]
    names = {"__name__": "__main__"}
    try:
        exec(compile(job["program"], "program", "exec"), names)
    except BaseException:  # SystemExit too
        traceback.print_exc()
        os._exit(1)
    for number, test in enumerate(tests):
        try:
            exec(compile(test, f"test {number}", "exec"), names)
        except BaseException:
            traceback.print_exc()
        else:
            os.write(verdict, f"{token} {number}\n".encode())
    os._exit(0)  # without waiting for threads that the program has left


if __name__ == "__main__":
    main()
