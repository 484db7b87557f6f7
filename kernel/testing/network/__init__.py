"""A network in memory: hosts, addresses, latency, loss, partitions and crashes, under a virtual clock.

    async def main():
        with Network(seed=1, latency=(0.001, 0.1), loss=0.01) as network:
            server, client = network.host("server"), network.host("client")
            async with open_nursery() as nursery:
                nursery.start_soon(server.run, serve_something)
                nursery.start_soon(client.run, ask_for_it, "server")
                await sleep(60)
                network.partition({server}, {client})
                ...

    run(main, clock=MockClock(autojump_threshold=0))

The programs are the ones written for real sockets, unchanged. While the `with` block lasts, `kernel.socket.socket` gets
its sockets from here (`set_custom_socket_factory`), and names are looked up here (`set_custom_hostname_resolver`). The
sockets have the standard library's non-blocking methods, and all of `SocketType`, the streams and the servers is the
real code above them. What takes time on the way is a timer of the kernel's, so a year goes by in the time its events
take, and a run with the same seed is the same to the byte. Inside `kernel.testing.explore`, where there is a choice of
fates, the schedule makes it.

What the model knows:

* TCP: connecting takes a round trip, accepting half of one more, and where nobody listens it is refused. Bytes arrive
  in order; what is lost on the way, or held up by a partition or a crash, is sent again after 0.2 s, then 0.4 s and so
  on, and after `give_up` seconds the connection fails (ETIMEDOUT). The receiver's buffer holds 64 KiB, and the sender
  stops when it is full. Closing sends the end; closing with unread bytes, sending to who has closed, or to a host that
  has crashed and come back, brings a reset.
* UDP: datagrams are lost, doubled, and overtake each other. Nobody is told; but a connected socket learns, by its next
  operation, that nobody listens there (ECONNREFUSED).
* Hosts have an IPv4 and an IPv6 address each, and their own loopback, which loses nothing and takes no time.
* A crash takes all that runs on a host. To the others it is as if a cable had been pulled.

It does not know: congestion, the speed of a line (the latency is that of each piece), keep-alives, routes, ancillary
data, urgent data, Unix sockets. An acknowledgement takes no time. A port is free again as soon as its socket is closed,
whatever connections came from it.

world.py has hosts and fate, sockets.py what all sockets have in common and UDP, tcp.py the rest.
"""

from .world import Host, Network

__all__ = ["Host", "Network"]
