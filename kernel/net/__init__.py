"""The network: names, sockets, streams over them, TLS, and servers. `kernel` and `kernel.socket` are the doors."""
