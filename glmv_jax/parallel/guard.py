"""The guard of one of several processes: a program of its own, which the end of that process does not take along.

`peers` starts it, by its path and without this package, so it costs 10 MB and 30 ms. It holds a connection to the guard
of process 0 on which nothing is said. However a process ends, its guard sees its pipe closed; a guard that ends with
its machine answers no probe of TCP. So an end is known within LOST seconds, and a compilation that takes minutes is not
mistaken for one, as it would be if processes had to give a sign.

    guard.py PID MINE COUNT                   of process 0: prints "PORT WORD", where and with which word others come
    guard.py PID MINE COUNT HOST PORT WORD    of another one

On standard input: "done" when the process needs the others no longer; without it, its end is one that others are told.
On standard output: "joined" once process 0 knows this one, "alone" where it cannot be reached; "gone" when another has
ended, of which standard error has been told already.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import time

LOST = 25  # seconds without an answer of another machine: less than `multihost.SILENCE`, so before JAX aborts
PATIENCE = 20  # seconds that a process has to end by itself once another one has
LONGEST = 1000  # bytes of a line


def main(pid: int, mine: int, count: int, host: str = "", port: str = "", word: str = "") -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all of a job; the process decides
        signal.signal(number, signal.SIG_IGN)
    me = f"process {mine} of {count} ({socket.gethostname()}, pid {pid})"
    guard = _Guard(pid, me, word or secrets.token_hex(16))
    if mine == 0:
        guard.listen(count)
    elif guard.join(host, int(port), f"process 0 of {count} ({host})"):
        print("joined", flush=True)
    else:
        return print("alone", flush=True)
    guard.watch()


class _Guard:
    """pid: of the process that is guarded.   me: that in words.   word: known to guards of this run alone."""

    def __init__(self, pid: int, me: str, word: str) -> None:
        self._pid, self._me, self._word = pid, me, word
        self._names: dict[socket.socket, str] = {}  # of those at the other ends, "" for one that has not said it
        self._rest: dict[socket.socket, bytes] = {}  # of a line that has not come whole
        self._ready = selectors.DefaultSelector()
        self._ready.register(0, selectors.EVENT_READ)
        self._server: socket.socket | None = None
        self._done = False  # this process needs the others no longer

    def listen(self, count: int) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=count)
        self._ready.register(self._server, selectors.EVENT_READ)
        print(self._server.getsockname()[1], self._word, flush=True)

    def join(self, host: str, port: int, first: str) -> bool:
        try:
            connection = socket.create_connection((host, port), timeout=30)
            connection.sendall(f"{self._word} {self._me}\n".encode())
            while (said := connection.recv(1)) != b"\n":  # a welcome
                if not said:
                    raise ConnectionResetError("it ends")
        except OSError as error:
            why = error.strerror or error
            _shout(
                f"{self._me} cannot reach port {port} of {host} ({why}); it will hear of others' ends from JAX alone"
            )
            return False
        self._add(connection, first)
        return True

    def watch(self) -> None:
        """Until this process has ended, or another one has."""
        while True:
            ready = [key.fileobj for key, _ in self._ready.select()]
            if 0 in ready:  # first: this process may be the cause of what else has happened
                said = os.read(0, LONGEST).strip()
                if not said:
                    return None if self._done else self._ended()
                self._done = True
                self._tell("done")
            for end in ready:
                if end is self._server:
                    self._add(self._server.accept()[0], "")
                elif end in self._names and (who := self._heard(end)) and not self._done:
                    self._tell(f"gone {who}")
                    return self._end(who)

    def _ended(self) -> None:
        """This process has. JAX ends one as soon as process 0 has ended: was it that?"""
        self._tell(f"gone {self._me}")
        for first in self._names if self._server is None else ():
            first.settimeout(2.0)
            if (who := self._heard(first)) and who != self._me:
                _shout(_words(who))

    def _heard(self, end: socket.socket) -> str:
        """Who has ended, by what the other end says, or as it is closed; "" for nobody."""
        try:
            said = end.recv(LONGEST)
        except TimeoutError:
            return ""
        except OSError:
            said = b""
        *lines, rest = (self._rest.get(end, b"") + said).split(b"\n")
        self._rest[end] = rest[:LONGEST]
        for line in lines:
            if not self._names[end] and line.startswith(self._word.encode() + b" "):
                self._names[end] = line.decode(errors="replace").partition(" ")[2]
                _say(end, "welcome")
                if self._done:
                    _say(end, "done")
            elif self._names[end] and line.startswith(b"gone "):
                return line.decode(errors="replace").partition(" ")[2]
            else:  # it ends as it should, or is a stranger
                return self._drop(end)
        return "" if said else self._names[end] or self._drop(end)

    def _drop(self, end: socket.socket) -> str:
        self._ready.unregister(end)
        self._names.pop(end)
        end.close()
        return ""

    def _end(self, who: str) -> None:
        """Says it, and sees to it that this process ends."""
        _shout(_words(who))
        print("gone", flush=True)
        end = time.monotonic() + PATIENCE
        while os.getppid() == self._pid and time.monotonic() < end:
            time.sleep(0.1)
        if os.getppid() == self._pid:
            os.kill(self._pid, signal.SIGKILL)

    def _tell(self, line: str) -> None:
        for end, name in self._names.items():
            if name:
                _say(end, line)

    def _add(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", (LOST - 10) // 5)):
            if hasattr(socket, option):  # not all of them on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._names[connection] = name
        self._ready.register(connection, selectors.EVENT_READ)


def _words(who: str) -> str:
    return (
        f"{who} has ended before the run did; what it said last tells why. This process ends too, as it would wait for "
        "ever: start all of them again with the same command, and the run goes on from its last checkpoint"
    )


def _shout(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\nglmv: {message}\n".encode())


def _say(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # the other end is gone
        connection.sendall(f"{line}\n".encode())


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        pid, mine, count = (int(word) for word in sys.argv[1:4])
        main(pid, mine, count, *sys.argv[4:])
