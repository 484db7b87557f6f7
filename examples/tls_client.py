"""A TLS client: whom it believes, and whom it does not.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/pip install -e '.[examples]'
    .venv/bin/python examples/tls_client.py
    .venv/bin/python examples/tls_client.py example.org

Without an argument it makes a certificate authority of its own, starts a bakery's server on this machine with a
certificate for `localhost`, and asks it for the menu in four ways. One is answered. The second expects to find a bank
there, the third trusts other authorities only, and the fourth is cut off in the middle of the answer, as by somebody
who cannot read it, but can pull the plug.

With a host, it asks that one by HTTPS for its front page and prints the first line of the answer. There,
`https_compatible` is set: web servers often hang up without a goodbye, as HTTP says for itself how long an answer is.
"""

import ssl
import sys

import trustme

import kernel

MENU = "Rye, walnut, and the loaf of the day."


async def serve(stream: kernel.SSLStream[kernel.SocketStream]) -> None:
    """Answer one request."""
    try:
        async with stream:
            request = await stream.receive_some()
            await stream.send_all(MENU[:16].encode())
            if request == b"menu, please":
                await stream.send_all(MENU[16:].encode())
            else:
                await kernel.aclose_forcefully(stream.transport_stream)
    except kernel.BrokenResourceError:
        pass  # the client did not like our certificate


async def ask(port: int, question: bytes, context: ssl.SSLContext, name: str = "localhost") -> None:
    tcp_stream = await kernel.open_tcp_stream("127.0.0.1", port)
    async with kernel.SSLStream(tcp_stream, context, server_hostname=name) as stream:
        try:
            await stream.do_handshake()  # not needed, but here is the place to look at the certificate
            print(f"  {stream.version()}, certified for {stream.getpeercert()['subjectAltName'][0][1]}")
            await stream.send_all(question)
            answer = b""
            async for chunk in stream:
                answer += chunk
            print(f"  the whole answer: {answer.decode()}")
        except kernel.BrokenResourceError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                print(f"  refused: {error.__cause__.verify_message}")
            else:
                print(f"  not to be relied on, as there was no goodbye: {answer.decode()}")


async def bakery() -> None:
    authority = trustme.CA()
    for_the_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(for_the_server)
    for_clients = ssl.create_default_context()
    authority.configure_trust(for_clients)

    async with kernel.open_nursery() as nursery:
        listeners = await nursery.start(kernel.serve_ssl_over_tcp, serve, 0, for_the_server)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        print("As it should be")
        await ask(port, b"menu, please", for_clients)
        print("Is this the bank?")
        await ask(port, b"my password is...", for_clients, name="bank.example")
        print("Who says that this is the bakery?")
        await ask(port, b"menu, please", ssl.create_default_context())
        print("Cut off")
        await ask(port, b"menu, but cut me off", for_clients)
        nursery.cancel_scope.cancel()


async def front_page(host: str) -> None:
    stream = await kernel.open_ssl_over_tcp_stream(host, 443, https_compatible=True)
    async with stream:
        await stream.send_all(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        async for chunk in stream:
            answer += chunk
        print(f"{stream.version()}, {stream.cipher()[0]}, {len(answer):,} bytes")
        print(answer.partition(b"\r\n")[0].decode())


if __name__ == "__main__":
    if sys.argv[1:]:
        kernel.run(front_page, sys.argv[1])
    else:
        kernel.run(bakery)
