"""The process that `sandbox` starts: makes namespaces, starts the program in them, kills it in time. Not imported.

Runs with `python -I -S jail.py`, a job as JSON on its standard input; needs the standard library only. Two processes:

    the keeper    of the caller's world; waits for the other one, and kills it when its wall time is over
    the program   pid 1 of a world of its own, so that whatever it starts dies with it

A program can write what it likes to the pipe of results. That is no hole: results are compared outside, so a forged
one has to be right.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
CAPABILITY_VERSION, LAST_CAPABILITY = 0x20080522, 63

libc = ctypes.CDLL(None, use_errno=True)


def check(returned: int, doing: str) -> None:
    if returned < 0:
        raise OSError(ctypes.get_errno(), doing)


def unshare() -> None:
    """Own network, processes, mounts, names; a user namespace first where that is what gives the right to them."""
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        check(libc.unshare(NEWUSER), "user namespace")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    check(libc.unshare(NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET), "namespaces")


def close_doors(job: dict, superuser: bool) -> None:
    """No files, no rights, no processes, little time and memory: from here on nothing can be opened again."""
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    check(libc.mount(b"none", b"/tmp", b"tmpfs", flags, b"size=4k,nr_inodes=2"), "empty root")
    os.chroot("/tmp")
    os.chdir("/")
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those that this kernel does not have
    if superuser:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    none = (ctypes.c_uint32 * 6)()
    check(libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), none), "capabilities")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death of the keeper")  # another user forgets it
    seconds = max(1, int(job["seconds"] + 0.999))
    for limit, value in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, job["memory"]), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, 8 << 20), (resource.RLIMIT_MSGQUEUE, 0), (resource.RLIMIT_MEMLOCK, 0),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))


def play(job: dict, results: int) -> None:
    """The program, then its function on every input; one line each."""
    import builtins

    scope: dict = {"__name__": "program", "__builtins__": builtins}
    exec(compile(job["program"], "program", "exec"), scope)
    function = scope[job["entry"]]
    dumps, write = json.dumps, os.write
    for arguments in job["inputs"]:
        try:
            line = "=" + dumps(function(*arguments), sort_keys=True)
        except Exception:  # of the program's own; the next input may do
            line = "!"
        write(results, (line + "\n").encode())


def program(job: dict, superuser: bool) -> None:
    """Pid 1 of the new world; never returns."""
    code = 3
    try:
        results = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.close(nothing)
        for name in job["modules"]:
            __import__(name)
        close_doors(job, superuser)
        code = 1
        play(job, results)
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    superuser = os.geteuid() == 0
    try:
        unshare()
    except OSError as error:
        print(f"#no {error.strerror}: {os.strerror(error.errno or 0)}", flush=True)
        return
    ours = {signal.SIGALRM, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ours)  # until there is something to kill, and a handler that does
    child = os.fork()
    if child == 0:
        program(job, superuser)
    expired = []

    def stop(*_: object) -> None:
        expired.append(True)
        os.kill(child, signal.SIGKILL)

    for each in ours:
        signal.signal(each, stop)
    signal.setitimer(signal.ITIMER_REAL, job["wall"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    reason = "time" if expired or killed else {1: "program", 3: "the doors do not close"}.get(status >> 8, "died")
    os.write(1, f"\n#{reason}\n".encode() if status else b"#\n")


if __name__ == "__main__":
    main()
