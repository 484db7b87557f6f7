"""An HTTP/1.1 server: h11 knows the protocol, the kernel knows how to wait, and this file brings them together.

Run it from the root of the checkout; it needs the package h11, which `pip install -e '.[examples]'` brings:

    .venv/bin/python examples/http_server.py

It serves itself, asks itself a few questions with the standard library's client in a thread, prints the answers and
ends. With a port as an argument it serves until Ctrl-C, to be tried with `curl -v localhost:8000/time`.

h11 does no input and no output: bytes go in, events come out, and the other way round. So a connection is a loop around
one question, "what is the next event?", and who cannot answer it receives some more bytes. What is the server's own
business here:

* A connection serves one request after the other, for as long as both sides want.
* A client that says nothing for `PATIENCE` seconds is let go; one that sends nonsense is told so, with status 400.
* When the server is told to end, requests that are being served have `DRAIN` seconds to be finished.
"""

import sys
from email.utils import formatdate
from http import HTTPStatus
from http.client import HTTPConnection

import h11

import kernel

PATIENCE = 20.0  # seconds without a byte from the client
DRAIN = 5.0  # seconds that a request may take when the server is to end
LARGEST = 1_000_000  # bytes in the body of a request
Response = tuple[HTTPStatus, str, bytes]  # status, content type, body


class Connection:
    """One client: h11's state of the conversation, and the stream it goes over."""

    def __init__(self, stream: kernel.SocketStream) -> None:
        self.stream = kernel.TimeoutStream(stream, PATIENCE)
        self.h11 = h11.Connection(h11.SERVER)

    async def next_event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            if self.h11.they_are_waiting_for_100_continue:
                await self.send(h11.InformationalResponse(status_code=100, headers=[]))
            event = self.h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            self.h11.receive_data(await self.stream.receive_some())

    async def send(self, event: h11.Event) -> None:
        data = self.h11.send(event)
        if data:
            await self.stream.send_all(data)

    async def answer(self, response: Response, method: bytes = b"GET") -> None:
        status, content_type, body = response
        headers = [
            ("Date", formatdate(usegmt=True)),
            ("Server", "trapkernel example"),
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
        ]
        await self.send(h11.Response(status_code=status, reason=status.phrase, headers=headers))
        if method != b"HEAD":
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())


async def serve_client(stream: kernel.SocketStream) -> None:
    connection = Connection(stream)
    try:
        while await serve_one_request(connection):
            connection.h11.start_next_cycle()
    except h11.RemoteProtocolError as error:
        if connection.h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = HTTPStatus(error.error_status_hint)
            await connection.answer((status, "text/plain", f"{error}\n".encode()))


async def serve_one_request(connection: Connection) -> bool:
    """Returns whether there may be another request after this one."""
    request = await connection.next_event()
    if not isinstance(request, h11.Request):
        return False  # the client has closed the connection, as it may between two requests
    body = bytearray()
    while isinstance(event := await connection.next_event(), h11.Data):
        body += event.data
        if len(body) > LARGEST:
            await connection.answer((HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "text/plain", b"that is too much\n"))
            return False
    if not isinstance(event, h11.EndOfMessage):
        return False
    await connection.answer(await respond(request, bytes(body)), request.method)
    return connection.h11.our_state is h11.DONE and connection.h11.their_state is h11.DONE


async def respond(request: h11.Request, body: bytes) -> Response:
    """The program behind the protocol. It may wait as long as it likes: other clients have tasks of their own."""
    match request.method, request.target:
        case b"GET" | b"HEAD", b"/":
            return HTTPStatus.OK, "text/plain", b"hello\n"
        case b"GET", b"/slow":
            await kernel.sleep(0.05)
            return HTTPStatus.OK, "text/plain", b"at last\n"
        case b"POST", b"/upper":
            return HTTPStatus.OK, "application/octet-stream", body.upper()
        case _, b"/" | b"/slow" | b"/upper":
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"not in this way\n"
        case _:
            return HTTPStatus.NOT_FOUND, "text/plain", b"there is no such thing\n"


def ask(port: int) -> None:
    """A client of the standard library's, which blocks: three requests on one connection, and one on another."""
    client = HTTPConnection("127.0.0.1", port, timeout=10)
    for method, path, body in (("GET", "/", None), ("POST", "/upper", b"shout"), ("GET", "/nowhere", None)):
        client.request(method, path, body)
        response = client.getresponse()
        print(f"{method} {path}: {response.status} {response.reason}, {response.read()!r}")
    client.close()
    client.request("DELETE", "/")
    response = client.getresponse()
    print(f"DELETE /: {response.status} {response.reason}, {response.read()!r}")
    client.close()


async def nonsense(port: int) -> None:
    """A client that does not speak HTTP."""
    async with await kernel.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"what is this?\r\n\r\n")
        answer = b"".join([chunk async for chunk in stream])
        print("nonsense:", answer.split(b"\r\n")[0].decode())


async def last_request(port: int, server: kernel.CancelScope) -> None:
    """The server is told to end while it works on this one."""
    async with await kernel.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"GET /slow HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        await kernel.sleep(0.01)
        server.cancel("closing time")
        answer = b"".join([chunk async for chunk in stream])
        print("GET /slow, while the server ends:", answer.split(b"\r\n\r\n")[1])


async def main() -> None:
    async with kernel.open_nursery() as nursery:
        async with kernel.open_nursery() as servers:
            listeners = await servers.start(serve, 0)
            port = listeners[0].socket.getsockname()[1]
            await kernel.to_thread.run_sync(ask, port)
            await nonsense(port)
            nursery.start_soon(last_request, port, servers.cancel_scope)
        print("the server has ended")


async def serve(
    port: int, *, task_status: kernel.TaskStatus[list[kernel.SocketListener]] = kernel.TASK_STATUS_IGNORED
) -> None:
    await kernel.serve_tcp(
        serve_client, port, host="127.0.0.1", drain=DRAIN, max_connections=1000, handler_errors="log",
        task_status=task_status,
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kernel.run(serve, int(sys.argv[1]))
    else:
        kernel.run(main)
