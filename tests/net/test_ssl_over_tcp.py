"""TLS over TCP in one call: what is passed on, and real connections on loopback."""

from __future__ import annotations

import inspect
import logging
import ssl
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from tls_contexts import client_context, server_context

import kernel
from kernel import BrokenResourceError, open_nursery
from kernel.net import tcp
from kernel.net.ssl_over_tcp import open_ssl_over_tcp_listeners, open_ssl_over_tcp_stream, serve_ssl_over_tcp
from kernel.net.streams import SocketListener, SocketStream
from kernel.net.tls import SSLListener, SSLStream

LOOPBACK = "127.0.0.1"


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return client_context(), server_context(None, LOOPBACK)


def port_of(listeners: list[SSLListener[Any]]) -> int:
    port: int = listeners[0].transport_listener.socket.getsockname()[1]  # type: ignore[attr-defined]
    return port


async def echo(stream: Any) -> None:
    async with stream:
        async for chunk in stream:
            await stream.send_all(chunk)


def test_a_client_and_a_server() -> None:
    async def main() -> None:
        ours, theirs = contexts()
        async with open_nursery() as nursery:
            serve = partial(serve_ssl_over_tcp, host=LOOPBACK)
            listeners = await nursery.start(serve, echo, 0, theirs)
            assert [type(listener) for listener in listeners] == [SSLListener]
            assert type(listeners[0].transport_listener) is SocketListener
            stream = await open_ssl_over_tcp_stream(LOOPBACK, port_of(listeners), ssl_context=ours)
            assert (type(stream), type(stream.transport_stream)) == (SSLStream, SocketStream)
            async with stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                assert stream.getpeercert()["subjectAltName"] == (("IP Address", LOOPBACK),)
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_a_client_without_a_context_of_its_own_trusts_whom_the_system_trusts() -> None:
    async def main() -> None:
        _, theirs = contexts()
        async with open_nursery() as nursery:
            serve = partial(serve_ssl_over_tcp, host=LOOPBACK, handler_errors="log")
            listeners = await nursery.start(serve, echo, 0, theirs)
            async with await open_ssl_over_tcp_stream(LOOPBACK.encode(), port_of(listeners)) as stream:
                with pytest.raises(BrokenResourceError, match="certificate verify failed"):
                    await stream.do_handshake()
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_a_client_that_speaks_no_tls_and_one_that_says_nothing_disturb_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        ours, theirs = contexts()
        async with open_nursery() as nursery:
            serve = partial(serve_ssl_over_tcp, host=LOOPBACK, handler_errors="log")
            port = port_of(await nursery.start(serve, echo, 0, theirs))
            async with await kernel.open_tcp_stream(LOOPBACK, port):
                async with await kernel.open_tcp_stream(LOOPBACK, port) as plain:
                    await plain.send_all(b"GET / HTTP/1.1\r\n\r\n")
                    with suppress(BrokenResourceError):  # a reset, or else the end, perhaps behind an alert
                        while await plain.receive_some():
                            pass
                async with await open_ssl_over_tcp_stream(LOOPBACK, port, ssl_context=ours) as stream:
                    await stream.send_all(b"hello")
                    assert await stream.receive_some() == b"hello"
            nursery.cancel_scope.cancel()

    with caplog.at_level(logging.WARNING):
        kernel.run(main)
    assert "the peer does not speak TLS: its first bytes were b'GET / HTTP/1.1" in caplog.text


@pytest.mark.parametrize("https", [False, True])
def test_https_compatible_is_passed_on(https: bool) -> None:
    seen = []

    async def handler(stream: SSLStream[Any]) -> None:
        seen.append(stream._https_compatible)
        await echo(stream)

    async def main() -> None:
        ours, theirs = contexts()
        async with open_nursery() as nursery:
            serve = partial(serve_ssl_over_tcp, host=LOOPBACK, https_compatible=https)
            port = port_of(await nursery.start(serve, handler, 0, theirs))
            stream = await open_ssl_over_tcp_stream(LOOPBACK, port, ssl_context=ours, https_compatible=https)
            async with stream:
                seen.append(stream._https_compatible)
                await stream.send_all(b"x")
                await stream.receive_some()
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert seen == [https, https]


def test_what_is_no_context_is_refused_before_anything_is_opened() -> None:
    async def main() -> None:
        for call in (
            partial(open_ssl_over_tcp_stream, LOOPBACK, 1, ssl_context=3),
            partial(open_ssl_over_tcp_listeners, 0, None),
            partial(serve_ssl_over_tcp, echo, 0, "certificate.pem"),
        ):
            with pytest.raises(TypeError, match="create_default_context"):
                await call()

    kernel.run(main)


def test_a_connection_that_cannot_be_wrapped_is_closed() -> None:
    async def main() -> None:
        _, theirs = contexts()
        async with open_nursery() as nursery:
            listeners = await open_ssl_over_tcp_listeners(0, theirs, host=LOOPBACK)

            async def accept() -> None:
                async with listeners[0], await listeners[0].transport_listener.accept() as raw:
                    assert await raw.receive_some() == b""

            nursery.start_soon(accept)
            with pytest.raises(ssl.SSLError):  # a server's context, in a client
                await open_ssl_over_tcp_stream(LOOPBACK, port_of(listeners), ssl_context=theirs)

    kernel.run(main)


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (open_ssl_over_tcp_stream, tcp.open_tcp_stream),
        (open_ssl_over_tcp_listeners, tcp.open_tcp_listeners),
        (serve_ssl_over_tcp, tcp.serve_tcp),
    ],
)
def test_they_take_all_that_their_plain_counterparts_take(ours: Any, plain: Any) -> None:
    known, expected = inspect.signature(ours).parameters, inspect.signature(plain).parameters
    for name, parameter in expected.items():
        assert (known[name].default, known[name].kind) == (parameter.default, parameter.kind)
    assert known.keys() - expected.keys() == {"ssl_context", "https_compatible"}


def test_what_is_given_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []

    async def note(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return []

    for name in ("open_tcp_stream", "open_tcp_listeners", "serve_listeners"):
        monkeypatch.setattr(f"kernel.net.ssl_over_tcp.{name}", note)

    async def main() -> None:
        ours, theirs = contexts()
        await open_ssl_over_tcp_stream(
            "host", 1, ssl_context=ours, happy_eyeballs_delay=2.0, local_address="local"
        )  # fmt: skip
        assert seen.pop() == (("host", 1), {"happy_eyeballs_delay": 2.0, "local_address": "local"})
        await serve_ssl_over_tcp(
            echo, 1, theirs, host="host", backlog=2, reuse_port=True, max_connections=3, drain=4.0,
            handler_errors="log", task_status="status", handler_nursery="nursery",
        )  # fmt: skip
        assert seen == [
            ((1,), {"host": "host", "backlog": 2, "reuse_port": True}),
            (
                (echo, []),
                {
                    "max_connections": 3, "drain": 4.0, "handler_errors": "log", "task_status": "status",
                    "handler_nursery": "nursery",
                },
            ),
        ]  # fmt: skip

    kernel.run(main)
