"""The load of `echo_load.c` in Python, for where there is no C compiler: the same arguments, the same report.

It is slower than a good server, so it is the limit where the server should be. Read the C for what it does and why.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import socket
import sys
import time
from collections.abc import Iterator
from select import EPOLLET, EPOLLIN, EPOLLOUT, epoll

PLACES = 4096  # where in the block of random bytes a message may begin
FIRST_PORT = 1024
SLICE = 0.05  # seconds
SILENCE = 10.0  # seconds without an echo after which the server is taken to be stuck


class Load:
    """So many connections, each with a message under way."""

    def __init__(self, port: int, reconnects: bool, connections: int, size: int) -> None:
        self.server = ("127.0.0.1", port)
        self.reconnects = reconnects
        self.size = size
        self.block = memoryview(random.Random(1).randbytes(size + PLACES))
        self.poller = epoll()
        self.sources = sources()
        self.connections: dict[int, Connection] = {}
        self.requests = 0
        self.waiting = 0  # messages whose echo is not complete
        self.alive = time.perf_counter()
        self.stopping = False
        for number in range(connections):
            self.connect(number * 7919 % PLACES)

    def connect(self, place: int) -> None:
        connection = Connection(self, place)
        self.connections[connection.socket.fileno()] = connection
        # Edge-triggered, so that the registration never has to be changed.
        self.poller.register(connection.socket.fileno(), EPOLLIN | EPOLLOUT | EPOLLET)
        connection.next_message()

    def spin(self, until: float) -> None:
        """Serve the connections until the time is up; if stopping, until all that was sent has come back."""
        seen, now = self.requests, time.perf_counter()
        while self.waiting if self.stopping else now < until:
            for fd, _ in self.poller.poll(0):
                self.connections[fd].turn()
            now = time.perf_counter()
            if self.requests != seen:
                seen, self.alive = self.requests, now
            elif now - self.alive > SILENCE:
                sys.exit(f"echo_load: no echo for {SILENCE:.0f} seconds")


class Connection:
    def __init__(self, load: Load, place: int) -> None:
        self.load = load
        self.place = place
        self.sent = self.received = 0
        for _ in range(1000):
            self.socket = socket.socket()
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self.socket.bind(next(load.sources))
                self.socket.connect(load.server)
                break
            except OSError as error:  # the address is in use, or was a short while ago
                last = error
                self.socket.close()
        else:
            raise last
        self.socket.setblocking(False)

    def next_message(self) -> None:
        self.sent = self.received = 0
        self.place = (self.place + 1031) % PLACES
        self.message = self.load.block[self.place : self.place + self.load.size]
        self.load.waiting += 1
        self.send_more()

    def send_more(self) -> None:
        try:
            while self.sent < self.load.size:
                self.sent += self.socket.send(self.message[self.sent :])
        except BlockingIOError:
            pass

    def receive_more(self) -> None:
        """Take in what has come. A byte more than is due is asked for, so as to see it if the server sends too much."""
        try:
            while self.received < self.sent:
                data = self.socket.recv(self.load.size + 1 - self.received)
                end = self.received + len(data)
                if not data:
                    sys.exit("echo_load: the server has closed a connection")
                if end > self.sent:
                    sys.exit("echo_load: the server has sent more than it got")
                if data != self.message[self.received : end]:
                    sys.exit("echo_load: what came back is not what was sent")
                self.received = end
        except BlockingIOError:
            pass

    def turn(self) -> None:
        load = self.load
        if self.received == load.size:
            return  # the last message is over: this says that there is room to write, which we know
        self.send_more()
        self.receive_more()
        if self.received < load.size:
            return
        load.requests += 1
        load.waiting -= 1
        if load.reconnects:
            del load.connections[self.socket.fileno()]
            self.socket.close()
            if not load.stopping:
                load.connect(self.place)
        elif not load.stopping:
            self.next_message()


def sources() -> Iterator[tuple[str, int]]:
    """Addresses of our own, each once. Counted from the time in units of 10 us, so that the next run has others."""
    for number in itertools.count(int(time.time() * 1e5)):
        host, port = divmod(number, 65536 - FIRST_PORT)
        host = 2 + host % 0xFFFFF0
        yield f"127.{host >> 16}.{host >> 8 & 255}.{host & 255}", FIRST_PORT + port


def waited(pid: int) -> float:
    """Seconds in which the process was ready to run, but did not; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/schedstat") as stat:
            return int(stat.read().split()[1]) / 1e9
    except OSError:
        return 0.0


def main(port: int, kind: str, connections: int, size: int, seconds: float, pid: int) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    load = Load(port, kind == "connect", connections, size)
    load.spin(time.perf_counter() + 0.05 + seconds / 10)

    cpu = ~pid << 3 | 2  # what clock_getcpuclockid() returns
    report = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end - SLICE / 2:
        load.requests = 0
        used, delay = time.clock_gettime(cpu), waited(pid) + waited(os.getpid())
        load.spin(start + SLICE)
        used = time.clock_gettime(cpu) - used
        delay = waited(pid) + waited(os.getpid()) - delay
        report.append(f"{load.requests} {time.perf_counter() - start:.6f} {used:.6f} {delay:.6f}")

    load.stopping = True
    load.spin(0)
    for connection in load.connections.values():
        connection.socket.close()
    print("\n".join(report))


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, str, int, int, float, int), sys.argv[1:], strict=True)))
