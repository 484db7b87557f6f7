"""SSLStream and SSLListener over streams in memory, both ends ours. Other implementations are in test_tls_peers."""

from __future__ import annotations

import gc
import os
import ssl
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from tls_contexts import HOST, TLS_1_2, TLS_1_3, VERSIONS, authority, certificate, client_context, server_context

import kernel
from kernel import BrokenResourceError, BusyResourceError, Cancelled, ClosedResourceError, gather, open_nursery
from kernel.net import tls
from kernel.net.tls import NeedHandshakeError, SSLListener, SSLStream
from kernel.testing import (
    assert_checkpoints,
    cancel_target,
    check_two_way_stream,
    explore,
    explore_cancellation,
    lockstep_stream_pair,
    memory_stream_pair,
    memory_stream_pump,
    wait_all_tasks_blocked,
)

MUCH = bytes(range(256)) * 2048  # half a megabyte: eight chunks
SCHEDULES = 2000 if os.environ.get("KERNEL_TEST_LONG") else 30
Pair = tuple[SSLStream[Any], SSLStream[Any]]

each_version = pytest.mark.parametrize("version", VERSIONS, ids=["TLSv1.2", "TLSv1.3"])


def pair(
    version: ssl.TLSVersion | None = None,
    over: Callable[[], tuple[Any, Any]] = memory_stream_pair,
    *,
    client: ssl.SSLContext | None = None,
    server: ssl.SSLContext | None = None,
    host: str | bytes | None = HOST,
    https: bool = False,
) -> Pair:
    """A client and a server, not yet shaken hands."""
    here, there = over()
    client = client or client_context(version)
    return (
        SSLStream(here, client, server_hostname=host, https_compatible=https),
        SSLStream(there, server or server_context(version), server_side=True, https_compatible=https),
    )


async def shake(client: SSLStream[Any], server: SSLStream[Any]) -> None:
    await gather(client.do_handshake, server.do_handshake)


async def connected(version: ssl.TLSVersion | None = None, *args: Any, **kwargs: Any) -> Pair:
    client, server = pair(version, *args, **kwargs)
    await shake(client, server)
    return client, server


async def receive_exactly(stream: Any, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        chunk = await stream.receive_some(size - len(got))
        assert chunk, f"the end came after {len(got)} bytes"
        got += chunk
    return bytes(got)


async def receive_all(stream: Any) -> bytes:
    return b"".join([chunk async for chunk in stream])


async def outcome_of(log: list[str], name: str, call: Callable[[], Awaitable[Any]]) -> None:
    try:
        log.append(f"{name}: {await call()!r}")
    except Exception as error:
        log.append(f"{name}: {type(error).__name__}")


def narrow_stream_pair() -> tuple[Any, Any]:
    """No buffer at all, and what is sent arrives in pieces."""
    streams = lockstep_stream_pair()
    for stream in streams:
        receiver: Any = stream.receive_stream
        receiver.receive_some = lambda max_bytes, receive=receiver.receive_some: receive(max_bytes or 5000)
    return streams


def sent_on(stream: SSLStream[Any]) -> bytearray:
    """What goes out on a memory stream, noted as it does."""
    sender, noted = stream.transport_stream.send_stream, bytearray()
    original = sender.send_all

    async def send_all(data: bytes) -> None:
        noted.extend(data)
        await original(data)

    sender.send_all = send_all
    return noted


# ---- it is a stream ------------------------------------------------------------------------------------


@each_version
def test_it_keeps_the_promises_of_a_stream(version: ssl.TLSVersion) -> None:
    async def make() -> Pair:
        return pair(version)

    async def make_clogged() -> Pair:
        return await connected(version, lockstep_stream_pair)

    kernel.run(check_two_way_stream, make, make_clogged)


@each_version
@pytest.mark.parametrize("size", [1, 16384, 16385, tls.CHUNK, tls.CHUNK + 1, len(MUCH)])
def test_what_is_sent_is_received_and_then_comes_the_end(version: ssl.TLSVersion, size: int) -> None:
    async def main() -> None:
        client, server = pair(version, lockstep_stream_pair)

        async def send() -> None:
            async with client:
                await client.send_all(MUCH[:size])

        async with server:
            _, got = await gather(send, partial(receive_all, server))
            assert got == MUCH[:size]
            assert await server.receive_some() == b""

    kernel.run(main)


@each_version
def test_a_transport_that_drips_byte_by_byte_will_do(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = pair(version)
        for sender, receiver in ((client, server), (server, client)):

            async def drip(s: Any = sender.transport_stream, r: Any = receiver.transport_stream) -> None:
                while memory_stream_pump(s.send_stream, r.receive_stream, max_bytes=1):
                    await wait_all_tasks_blocked()

            sender.transport_stream.send_stream.send_all_hook = drip
        _, got = await gather(partial(client.send_all, b"hello"), partial(receive_exactly, server, 5))
        assert got == b"hello"

    kernel.run(main)


def test_a_view_of_larger_items_is_sent_as_bytes() -> None:
    async def main() -> None:
        client, server = await connected()
        await client.send_all(memoryview(b"12345678").cast("I"))
        await client.send_all(bytearray(b"9"))
        assert await receive_exactly(server, 9) == b"123456789"

    kernel.run(main)


def test_receiving_less_than_was_sent_leaves_the_rest() -> None:
    async def main() -> None:
        client, server = await connected()
        await client.send_all(b"123456")
        assert await server.receive_some(4) == b"1234"
        assert server.pending() == 2
        assert await server.receive_some(10**15) == b"56"
        for wrong, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), ("1", TypeError)):
            with pytest.raises(error, match="max_bytes"):
                await server.receive_some(wrong)

    kernel.run(main)


def test_generator_style_works() -> None:
    client, server = pair()

    def main() -> Any:
        yield from gather(client.do_handshake, server.do_handshake)
        yield from client.send_all(b"hello")
        yield from client.aclose()
        chunk = yield from server.receive_some()
        yield from server.aclose()
        return chunk

    assert kernel.run(main) == b"hello"


def test_a_foreign_stream_of_coroutines_will_do_as_transport() -> None:
    class Foreign(kernel.abc.Stream):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def send_all(self, data: Any) -> None:
            await self.inner.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            await self.inner.wait_send_all_might_not_block()

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            return bytes(await self.inner.receive_some(max_bytes))

        async def aclose(self) -> None:
            await self.inner.aclose()

    def foreign_pair() -> tuple[Foreign, Foreign]:
        here, there = memory_stream_pair()
        return Foreign(here), Foreign(there)

    async def main() -> None:
        client, server = await connected(None, foreign_pair)
        await client.wait_send_all_might_not_block()
        await client.send_all(b"hello")
        await client.aclose()
        assert await receive_all(server) == b"hello"

    kernel.run(main)


def test_generic_aliases() -> None:
    assert SSLStream[Any].__origin__ is SSLStream  # type: ignore[attr-defined]
    assert SSLListener[Any].__origin__ is SSLListener  # type: ignore[attr-defined]


def test_a_forgotten_stream_is_freed_without_the_garbage_collector() -> None:
    async def main() -> None:
        client, server = await connected()
        await client.send_all(b"x")
        await server.receive_some()
        dead = [weakref.ref(client), weakref.ref(server)]
        gc.disable()
        try:
            del client, server
            assert [ref() for ref in dead] == [None, None]
        finally:
            gc.enable()

    kernel.run(main)


def test_memory_is_bounded_whatever_is_sent_at_a_time() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        most = 0
        async with open_nursery() as nursery:
            nursery.start_soon(client.send_all, bytes(3_000_000))
            got = 0
            while got < 3_000_000:
                got += len(await server.receive_some())
                most = max(most, len(client._unsent) + client._outgoing.pending, server._incoming.pending)
        assert tls.CHUNK < most < tls.CHUNK + 1000

    kernel.run(main)


@each_version
def test_several_records_that_are_there_are_received_at_once(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        for word in (b"one ", b"two ", b"three"):
            await client.send_all(word)
        assert await server.receive_some(6) == b"one tw"
        assert await server.receive_some() == b"o three"
        await client.send_all(MUCH[: tls.CHUNK + 1])
        await client.aclose()
        chunks = [chunk async for chunk in server]
        assert list(map(len, chunks)) == [tls.CHUNK, 1]
        assert await server.receive_some() == b""

    kernel.run(main)


# ---- what can be asked of it ---------------------------------------------------------------------------

AFTER_HANDSHAKE = (
    "version", "cipher", "shared_ciphers", "compression", "session_reused", "getpeercert", "get_channel_binding",
    "selected_alpn_protocol", "selected_npn_protocol",
)  # fmt: skip


def test_what_is_not_known_before_the_handshake_says_so() -> None:
    client, _ = pair()
    for name in AFTER_HANDSHAKE:
        with pytest.raises(NeedHandshakeError, match=f"{name} .* do_handshake"):
            getattr(client, name)
    with pytest.raises(AttributeError):
        client.nonsense  # type: ignore[attr-defined]
    assert {*AFTER_HANDSHAKE, "context", "session", "server_side", "server_hostname", "pending"} <= set(dir(client))


@each_version
def test_what_is_known_after_the_handshake(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        contexts = client_context(version), server_context(version)
        contexts[0].set_alpn_protocols(["h2", "http/1.1"])
        contexts[1].set_alpn_protocols(["http/1.1"])
        client, server = pair(client=contexts[0], server=contexts[1])
        assert (client.context, server.context) == contexts
        assert (client.server_side, server.server_side) == (False, True)
        assert (client.server_hostname, server.server_hostname) == (HOST, None)
        assert client.pending() == 0
        await shake(client, server)
        name = "TLSv1.2" if version is TLS_1_2 else "TLSv1.3"
        assert client.version() == server.version() == name
        assert client.cipher() == server.cipher()
        assert client.cipher()[0] in [cipher for cipher, *_ in server.shared_ciphers()]
        assert client.compression() is None
        assert client.getpeercert()["subjectAltName"] == (("DNS", HOST),)
        assert client.getpeercert(binary_form=True)[:1] == b"\x30"
        assert server.getpeercert() is None
        assert client.selected_alpn_protocol() == server.selected_alpn_protocol() == "http/1.1"
        if version is TLS_1_2:
            assert client.get_channel_binding("tls-unique") is not None
            assert client.get_channel_binding("tls-unique") == server.get_channel_binding("tls-unique")
        with pytest.warns(DeprecationWarning, match="NPN"):
            assert client.selected_npn_protocol() is None
        with pytest.raises(AttributeError):
            client.server_side = True

    kernel.run(main)


@each_version
def test_a_client_may_take_up_a_former_session(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        contexts = {"client": client_context(version), "server": server_context(version)}
        session = None
        for reused in (False, True):
            client, server = pair(**contexts)  # type: ignore[arg-type]
            if session is not None:
                client.session = session
            await shake(client, server)
            assert client.session_reused is server.session_reused is reused
            await server.send_all(b"with it come the tickets of TLS 1.3")
            await client.receive_some()
            session = client.session
            await client.aclose()
            await server.aclose()

    kernel.run(main)


def test_a_server_may_choose_its_certificate_by_the_name_that_the_client_asks_for() -> None:
    async def main() -> None:
        asked = []
        other = server_context(None, "other.test")

        def choose(tls_object: ssl.SSLObject, name: str, context: ssl.SSLContext) -> None:
            asked.append(name)
            tls_object.context = other

        context = server_context()
        context.sni_callback = choose  # type: ignore[assignment]
        client, server = await connected(server=context, host="other.test")
        assert asked == ["other.test"]
        assert server.context is other
        assert client.getpeercert()["subjectAltName"] == (("DNS", "other.test"),)

    kernel.run(main)


def test_the_context_can_be_set() -> None:
    client, server = pair()
    server.context = other = server_context()
    assert server.context is other
    assert client.context is not other


@pytest.mark.parametrize(
    ("certified", "asked"),
    [
        (HOST, HOST.encode()),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("xn--strae-oqa.test", "straße.test"),  # which IDNA 2003 takes for strasse.test
        ("*.example.test", "any.example.test"),
    ],
)
def test_names_and_addresses_are_checked(certified: str, asked: str | bytes) -> None:
    async def main() -> None:
        client, _ = await connected(server=server_context(None, certified), host=asked)
        assert client.getpeercert()["subjectAltName"]

    kernel.run(main)


def test_wrong_arguments_are_refused() -> None:
    stream, _ = memory_stream_pair()
    for hostname in (None, "", b""):
        with pytest.raises(ValueError, match="server_hostname="):
            SSLStream(stream, client_context(), server_hostname=hostname)
    for context in (None, HOST, ssl.SSLContext):
        with pytest.raises(TypeError, match="create_default_context"):
            SSLStream(stream, context)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="create_default_context"):
            SSLListener(stream, context)  # type: ignore[arg-type]
    with pytest.raises(ssl.SSLError, match="PROTOCOL_TLS_SERVER"):
        SSLStream(stream, server_context())
    with pytest.raises(ssl.SSLError, match="PROTOCOL_TLS_CLIENT"):
        SSLStream(stream, client_context(), server_side=True)
    unverified = client_context()
    unverified.check_hostname = False
    SSLStream(stream, unverified)


def test_repr_names_the_transport() -> None:
    client, _ = pair()
    assert repr(client) == f"<SSLStream over {client.transport_stream!r}>"
    assert repr(SSLListener(client, server_context())) == f"<SSLListener over {client!r}>"  # type: ignore[arg-type]


# ---- whom to trust -------------------------------------------------------------------------------------


async def failed_handshake(client: SSLStream[Any], server: SSLStream[Any]) -> tuple[str, str]:
    """Both sides fail. The texts of their errors."""
    texts = {}

    async def fail(stream: SSLStream[Any]) -> None:
        with pytest.raises(BrokenResourceError) as caught:
            await stream.do_handshake()
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        texts[stream] = str(caught.value)
        for call in (partial(stream.send_all, b"x"), stream.receive_some, stream.do_handshake, stream.unwrap):
            with pytest.raises(BrokenResourceError, match="broke before"):
                await call()
        with pytest.raises(NeedHandshakeError):
            stream.getpeercert()
        await stream.aclose()
        with pytest.raises(ClosedResourceError):
            await stream.receive_some()

    await gather(partial(fail, client), partial(fail, server))
    return texts[client], texts[server]


@each_version
@pytest.mark.parametrize("over", [memory_stream_pair, lockstep_stream_pair])
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("unknown authority", "unable to get local issuer certificate"),
        ("other name", f"Hostname mismatch, certificate is not valid for '{HOST}'"),
        ("expired", "certificate has expired"),
    ],
)
def test_a_server_that_is_not_to_be_trusted_is_not(version: ssl.TLSVersion, over: Any, fault: str, text: str) -> None:
    async def main() -> None:
        client = ssl.create_default_context() if fault == "unknown authority" else client_context(version)
        client.minimum_version = client.maximum_version = version
        names = ("other.test",) if fault == "other name" else ()
        server = server_context(version, *names, expired=fault == "expired")
        ours, theirs = await failed_handshake(*pair(over=over, client=client, server=server))
        assert text in ours
        assert "alert" in theirs

    kernel.run(main)


def test_nothing_is_sent_to_a_server_that_is_not_to_be_trusted() -> None:
    async def main() -> None:
        client, server = pair(server=server_context(None, "other.test"))
        async with open_nursery() as nursery:
            for call in (partial(client.send_all, b"secret"), client.receive_some):
                nursery.start_soon(outcome_of, log, "client", call)
            nursery.start_soon(outcome_of, log, "server", server.receive_some)

    log: list[str] = []
    kernel.run(main)
    assert sorted(log) == ["client: BrokenResourceError"] * 2 + ["server: BrokenResourceError"]


@each_version
def test_a_client_without_the_certificate_that_is_demanded_is_sent_away(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        server_side = server_context(version)
        server_side.verify_mode = ssl.CERT_REQUIRED
        authority().configure_trust(server_side)
        client, server = pair(version, server=server_side)
        async with open_nursery() as nursery:
            nursery.start_soon(outcome_of, log, "server", server.do_handshake)
            # In TLS 1.3 the client has finished when the server looks at its certificate.
            with pytest.raises(BrokenResourceError, match="alert"):
                await client.receive_some()

    log: list[str] = []
    kernel.run(main)
    assert log == ["server: BrokenResourceError"]


@each_version
def test_a_client_with_the_certificate_that_is_demanded_is_known(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        server_side, client_side = server_context(version), client_context(version)
        server_side.verify_mode = ssl.CERT_REQUIRED
        authority().configure_trust(server_side)
        certificate("ann@example.test").configure_cert(client_side)
        client, server = await connected(server=server_side, client=client_side)
        assert server.getpeercert()["subjectAltName"] == (("email", "ann@example.test"),)
        await gather(partial(server.send_all, b"hello"), client.receive_some)

    kernel.run(main)


def test_versions_that_have_nothing_in_common() -> None:
    async def main() -> None:
        ours, theirs = await failed_handshake(*pair(client=client_context(TLS_1_3), server=server_context(TLS_1_2)))
        assert "alert protocol version" in ours
        assert "unsupported protocol" in theirs

    kernel.run(main)


# ---- a peer that does not speak TLS, or badly -----------------------------------------------------------


def with_raw_peer(*, server_side: bool, https: bool = False) -> tuple[SSLStream[Any], Any]:
    client, server = pair(https=https)
    return (server, client.transport_stream) if server_side else (client, server.transport_stream)


@pytest.mark.parametrize(
    ("words", "server_side"),
    [
        (b"GET / HTTP/1.1\r\nHost: example.test\r\n\r\n", True),
        (b"HELO example.test\r\n", True),
        (bytes(100), True),
        (bytes(range(100, 200)), True),
        (b"220 mail.example.test ESMTP\r\n", False),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"\x16GET /", True),
    ],
)
def test_a_peer_that_does_not_speak_tls_is_told_apart(words: bytes, server_side: bool) -> None:
    async def main() -> None:
        stream, raw = with_raw_peer(server_side=server_side)
        await raw.send_all(words)
        with pytest.raises(BrokenResourceError) as caught:
            await stream.receive_some()
        assert str(caught.value) == f"the peer does not speak TLS: its first bytes were {words[:16]!r}"
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        await stream.aclose()
        await receive_all(raw)  # comes to an end; whether there is an alert in it is OpenSSL's choice

    kernel.run(main)


def test_garbage_that_looks_like_tls_is_an_error() -> None:
    async def main() -> None:
        for garbage in (
            b"\x16\x03\x01\x00\x10" + bytes(16),
            b"\x17\x03\x03\x00\x10" + bytes(16),
            b"\x16\x03\xff\xff\xff",
        ):
            stream, raw = with_raw_peer(server_side=True)
            await raw.send_all(garbage)
            await raw.aclose()
            with pytest.raises(BrokenResourceError) as caught:
                await stream.do_handshake()
            assert "TLS handshake" in str(caught.value)

    kernel.run(main)


@pytest.mark.parametrize("server_side", [False, True])
def test_a_handshake_that_is_cut_off_anywhere_is_an_error(server_side: bool) -> None:
    async def main() -> None:
        client, server = pair(TLS_1_2)
        flight = sent_on(client if server_side else server)
        await shake(client, server)
        for size in {0, 1, 4, 5, 6, 100, len(flight) // 2, len(flight) - 1}:
            stream, raw = with_raw_peer(server_side=server_side)
            stream.context = (server_context if server_side else client_context)(TLS_1_2)
            await raw.send_all(flight[:size])
            await raw.aclose()
            with pytest.raises(BrokenResourceError):
                await stream.do_handshake()
            with pytest.raises(BrokenResourceError):
                await stream.send_all(b"x")
            await stream.aclose()

    kernel.run(main)


def test_a_handshake_that_is_cut_off_says_so() -> None:
    async def main() -> None:
        for https in (False, True):
            for server_side in (False, True):
                stream, raw = with_raw_peer(server_side=server_side, https=https)
                await raw.aclose()
                # The client finds out when it sends its hello, and that is the transport's to tell.
                text = "in the middle of the TLS handshake" if server_side else "the other end is closed"
                with pytest.raises(BrokenResourceError, match=text) as caught:
                    await stream.do_handshake()
                assert isinstance(caught.value.__cause__, ssl.SSLEOFError) is server_side

    kernel.run(main)


@each_version
def test_what_comes_before_a_forged_record_is_received(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        await client.send_all(b"pay 100")
        await client.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
        assert await server.receive_some() == b"pay 100"
        for call in (server.receive_some, partial(server.send_all, b"x")):
            with pytest.raises(BrokenResourceError, match=r"broke before: TLS has failed.*(?i:bad record mac)"):
                await call()
        with pytest.raises(BrokenResourceError, match=r"(?i)alert bad record mac"):
            await client.receive_some()

    kernel.run(main)


@each_version
def test_a_forged_record_breaks_the_stream(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        noted = sent_on(client)

        async def forge() -> None:
            data = server.transport_stream.receive_stream
            memory_stream_pump(client.transport_stream.send_stream, data)
            data._buffer._data[-1] ^= 1

        client.transport_stream.send_stream.send_all_hook = forge
        await client.send_all(b"pay 100")
        assert noted
        with pytest.raises(BrokenResourceError, match=r"TLS has failed.*(?i:bad record mac)"):
            await server.receive_some()
        for call in (server.receive_some, partial(server.send_all, b"x")):
            with pytest.raises(BrokenResourceError, match="broke before"):
                await call()
        with pytest.raises(BrokenResourceError, match=r"(?i)alert bad record mac"):
            await client.receive_some()

    kernel.run(main)


def test_a_failure_counts_more_than_a_cancellation_while_the_peer_is_being_told() -> None:
    async def main() -> None:
        client, server = pair(TLS_1_2, lockstep_stream_pair, server=server_context(TLS_1_2, "other.test"))
        raw = server.transport_stream
        async with open_nursery() as nursery:
            nursery.start_soon(outcome_of, log, "client", client.do_handshake)
            with suppress(ssl.SSLWantReadError):
                server._incoming.write(await raw.receive_some())
                server._tls.do_handshake()
            await raw.send_all(server._outgoing.read())
            await wait_all_tasks_blocked()
            assert client._flushing  # an alert, to which nobody listens
            nursery.cancel_scope.cancel()

    log: list[str] = []
    kernel.run(main)
    assert log == ["client: BrokenResourceError"]


# ---- how it ends ---------------------------------------------------------------------------------------


@each_version
def test_an_end_without_goodbye_is_a_broken_stream(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        for cut_inside_a_record in (False, True):
            client, server = await connected(version)
            await client.send_all(b"all of it")
            assert await server.receive_some() == b"all of it"
            if cut_inside_a_record:
                await client.transport_stream.send_all(b"\x17\x03\x03\x01")
            await client.transport_stream.aclose()
            with pytest.raises(BrokenResourceError, match=r"close_notify.*https_compatible") as caught:
                await server.receive_some()
            assert isinstance(caught.value.__cause__, ssl.SSLEOFError)
            with pytest.raises(BrokenResourceError, match="broke before"):
                await server.receive_some()

    kernel.run(main)


def test_an_end_without_goodbye_is_seen_even_if_openssl_is_told_to_ignore_it() -> None:
    async def main() -> None:
        lenient = client_context()
        lenient.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
        client, server = await connected(client=lenient)
        await server.transport_stream.aclose()
        with pytest.raises(BrokenResourceError, match="close_notify"):
            await client.receive_some()

    kernel.run(main)


@each_version
def test_https_takes_any_end_for_the_end_and_says_no_goodbye(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version, https=True)
        await client.send_all(b"all of it")
        sent = sent_on(client)
        await client.aclose()
        assert sent == b""
        assert [await server.receive_some() for _ in range(3)] == [b"all of it", b"", b""]
        await server.aclose()

    kernel.run(main)


def test_https_takes_the_end_before_the_handshake_for_the_end() -> None:
    async def main() -> None:
        stream, raw = with_raw_peer(server_side=True, https=True)
        await raw.aclose()
        assert await stream.receive_some() == b""

    kernel.run(main)


def test_https_does_not_take_a_reset_or_a_forgery_for_the_end() -> None:
    async def main() -> None:
        stream, raw = with_raw_peer(server_side=True, https=True)
        await raw.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(BrokenResourceError, match="does not speak TLS"):
            await stream.receive_some()
        _, server = await connected(https=True)

        async def reset() -> None:
            raise BrokenResourceError("reset")

        server.transport_stream.receive_stream.receive_some_hook = reset
        with pytest.raises(BrokenResourceError, match="reset"):
            await server.receive_some()

    kernel.run(main)


@each_version
def test_goodbye_is_said_even_if_the_peer_is_gone(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        for handshake in (False, True):
            client, server = pair(version)
            if handshake:
                await shake(client, server)
            await server.transport_stream.aclose()
            with assert_checkpoints():
                await client.aclose()
            with pytest.raises(ClosedResourceError):
                await client.transport_stream.send_all(b"x")

    kernel.run(main)


@each_version
def test_closing_does_not_wait_for_the_peers_goodbye(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        await client.aclose()
        assert await server.receive_some() == b""
        await server.aclose()

    kernel.run(main)


@each_version
def test_after_the_peers_goodbye_one_may_still_send(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        with suppress(ssl.SSLWantReadError):
            client._tls.unwrap()
        await client._flush()
        assert await server.receive_some() == b""
        await server.send_all(b"one more thing")
        assert await client.receive_some() == b"one more thing"

    kernel.run(main)


def test_a_stream_that_nobody_used_shakes_hands_to_say_goodbye() -> None:
    async def main() -> None:
        client, server = pair()
        _, got = await gather(client.aclose, server.receive_some)
        assert got == b""

    kernel.run(main)


def test_a_cancelled_aclose_closes_at_once() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(client.aclose)  # nobody receives what it has to say
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(ClosedResourceError):
            await client.transport_stream.send_all(b"x")
        with pytest.raises(BrokenResourceError):
            await server.receive_some()

    kernel.run(main)


def test_closing_while_another_task_sends_cuts_it_short_and_says_no_goodbye() -> None:
    log: list[str] = []

    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(outcome_of, log, "sender", partial(client.send_all, MUCH))
            nursery.start_soon(outcome_of, log, "receiver", client.receive_some)
            await receive_exactly(server, 1000)
            await wait_all_tasks_blocked()
            await client.aclose()
        with pytest.raises(BrokenResourceError, match="close_notify"):
            await receive_all(server)

    kernel.run(main)
    assert sorted(log) == ["receiver: ClosedResourceError", "sender: ClosedResourceError"]


@each_version
def test_closing_while_another_task_receives_says_goodbye_and_wakes_it(version: ssl.TLSVersion) -> None:
    log: list[str] = []

    async def main() -> None:
        client, server = await connected(version)
        async with open_nursery() as nursery:
            nursery.start_soon(outcome_of, log, "receiver", client.receive_some)
            await wait_all_tasks_blocked()
            await client.aclose()
        assert await server.receive_some() == b""

    kernel.run(main)
    assert log == ["receiver: ClosedResourceError"]


def test_goodbye_is_said_to_a_peer_that_cannot_be_heard_any_more() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)

        async def reset(max_bytes: int | None = None) -> bytes:
            raise BrokenResourceError("reset")

        client.transport_stream.receive_stream.receive_some = reset
        async with open_nursery() as nursery:
            nursery.start_soon(client.aclose)
            await wait_all_tasks_blocked()
            assert await server.receive_some() == b""

    kernel.run(main)


def test_a_broken_stream_closes_without_a_word() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        await server.transport_stream.send_stream.aclose()
        with pytest.raises(BrokenResourceError):
            await client.receive_some()
        await client.aclose()  # the server does not listen

    kernel.run(main)


def test_a_closed_stream_stays_closed_even_if_it_breaks_as_well() -> None:
    log: list[str] = []

    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(outcome_of, log, "receiver", client.receive_some)
            await wait_all_tasks_blocked()
            nursery.start_soon(client.aclose)  # waits: nobody receives what it has to say
            await wait_all_tasks_blocked()
            await server.transport_stream.send_stream.aclose()
            await wait_all_tasks_blocked()
            with pytest.raises(ClosedResourceError):
                await client.receive_some()
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert log == ["receiver: BrokenResourceError"]


def test_closing_in_the_middle_of_another_tasks_handshake_ends_it() -> None:
    log: list[str] = []

    async def main() -> None:
        client, _ = pair()
        async with open_nursery() as nursery:
            for name, call in (
                ("first", client.do_handshake), ("second", client.do_handshake),
                ("sender", partial(client.send_all, b"x")),
            ):  # fmt: skip
                nursery.start_soon(outcome_of, log, name, call)
            await wait_all_tasks_blocked()
            await client.aclose()

    kernel.run(main)
    assert sorted(log) == [f"{name}: ClosedResourceError" for name in ("first", "second", "sender")]


def test_who_closes_second_waits_until_the_first_has_said_goodbye() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(client.aclose)
            await wait_all_tasks_blocked()
            nursery.start_soon(client.aclose)
            await wait_all_tasks_blocked()
            for call in (partial(client.send_all, b"x"), client.receive_some, client.unwrap, client.do_handshake):
                with pytest.raises(ClosedResourceError):
                    await call()
            assert await server.receive_some() == b""
        await server.aclose()

    kernel.run(main)


def test_who_closes_forcefully_does_not_wait() -> None:
    async def main() -> None:
        client, _ = await connected(None, lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(client.aclose)
            await wait_all_tasks_blocked()
            await kernel.aclose_forcefully(client)

    kernel.run(main)


def test_two_peers_that_close_while_neither_receives_do_not_wait_for_each_other() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        await gather(client.aclose, server.aclose)

    kernel.run(main)


@each_version
def test_unwrapped_it_goes_on_in_the_clear(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        await client.send_all(b"secret")
        assert await server.receive_some() == b"secret"
        raw = client.transport_stream, server.transport_stream

        async def unwrap_and_say(stream: SSLStream[Any]) -> tuple[Any, bytes]:
            transport, trailing = await stream.unwrap()
            await transport.send_all(b"in the clear")
            return transport, trailing

        (one, trailing_one), (two, trailing_two) = await gather(
            partial(unwrap_and_say, client), partial(unwrap_and_say, server)
        )
        assert (one, two) == raw
        assert trailing_one + await receive_exactly(one, 12 - len(trailing_one)) == b"in the clear"
        assert trailing_two + await receive_exactly(two, 12 - len(trailing_two)) == b"in the clear"
        assert client.transport_stream is None
        for call in (partial(client.send_all, b"x"), client.receive_some, client.unwrap, client.do_handshake):
            with pytest.raises(ClosedResourceError, match="unwrapped"):
                await call()
        with assert_checkpoints():
            await client.aclose()
        await one.send_all(b"x")  # the transport is not ours any more to close

    kernel.run(main)


@each_version
def test_unwrapping_at_once_shakes_hands_first(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = pair(version)
        raw = client.transport_stream, server.transport_stream
        assert await gather(client.unwrap, server.unwrap) == [(raw[0], b""), (raw[1], b"")]

    kernel.run(main)


@each_version
def test_what_comes_in_the_clear_right_behind_is_not_lost(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        client.transport_stream.send_stream.send_all_hook = None  # held back until all is there
        async with open_nursery() as nursery:

            async def end() -> None:
                transport, _ = await client.unwrap()
                await transport.send_all(b"in the clear")
                memory_stream_pump(transport.send_stream, server.transport_stream.receive_stream)

            nursery.start_soon(end)
            await wait_all_tasks_blocked()
            with suppress(ssl.SSLWantReadError):
                server._tls.unwrap()
            await server._flush()
            await wait_all_tasks_blocked()
            _, trailing = await server.unwrap()
            assert trailing == b"in the clear"

    kernel.run(main)


def test_unwrapping_while_the_peer_goes_on_or_is_gone_is_a_broken_stream() -> None:
    async def main() -> None:
        client, server = await connected()
        await server.send_all(b"and another thing")
        with pytest.raises(BrokenResourceError, match=r"(?i)application data after close notify"):
            await client.unwrap()
        client, server = await connected()
        await server.transport_stream.aclose()
        with pytest.raises(BrokenResourceError):
            await client.unwrap()

    kernel.run(main)


@each_version
def test_a_cancelled_unwrap_may_be_taken_up_again(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        with kernel.CancelScope() as scope:
            async with open_nursery() as nursery:
                nursery.start_soon(client.unwrap)
                await wait_all_tasks_blocked()
                for call in (client.receive_some, partial(client.send_all, b"x"), client.unwrap):
                    with pytest.raises(BusyResourceError):
                        await call()
                scope.cancel()
        await gather(client.unwrap, server.unwrap)

    kernel.run(main)


@each_version
def test_after_a_cancelled_unwrap_one_may_receive_up_to_the_end(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = await connected(version)
        async with open_nursery() as nursery:
            nursery.start_soon(client.unwrap)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await server.send_all(b"one more thing")
        await server.aclose()
        assert [await client.receive_some() for _ in range(3)] == [b"one more thing", b"", b""]
        with pytest.raises(BrokenResourceError, match=r"(?i)protocol is shutdown"):
            await client.send_all(b"x")

    kernel.run(main)


def test_who_cannot_send_any_more_may_still_receive() -> None:
    """As with a server that answers and closes without reading all of the question."""

    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(outcome_of, log, "client", partial(client.send_all, MUCH))
            await wait_all_tasks_blocked()
            await server.transport_stream.receive_stream.aclose()
            nursery.start_soon(server.send_all, b"413 too large")
            assert await client.receive_some() == b"413 too large"
        await client.aclose()

    log: list[str] = []
    kernel.run(main)
    assert log == ["client: BrokenResourceError"]


# ---- two tasks, two directions -------------------------------------------------------------------------


@each_version
def test_both_may_send_much_at_once_without_any_room_in_between(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = pair(version, lockstep_stream_pair)
        _, _, *got = await gather(
            partial(client.send_all, MUCH),
            partial(server.send_all, MUCH[::-1]),
            partial(receive_exactly, server, len(MUCH)),
            partial(receive_exactly, client, len(MUCH)),
        )
        assert got == [MUCH, MUCH[::-1]]

    kernel.run(main)


@pytest.mark.parametrize("given_up", [False, True])
def test_who_finds_another_one_receiving_waits_for_that_one_and_receives_nothing(given_up: bool) -> None:
    """A sender does, in a renegotiation. It looks then whether it still needs something."""

    async def main() -> None:
        client, server = await connected(TLS_1_2)
        async with open_nursery() as nursery:
            first = nursery.spawn(client._feed)
            await wait_all_tasks_blocked()
            second = nursery.spawn(client._feed)
            await wait_all_tasks_blocked()
            assert not second.done
            if given_up:
                first.cancel()
            else:
                await server.send_all(b"x")
            await second
        if not given_up:
            assert await client.receive_some() == b"x"

    kernel.run(main)


def test_the_session_tickets_of_a_server_wait_for_its_first_send() -> None:
    async def main() -> None:
        client, server = await connected(TLS_1_3, lockstep_stream_pair)
        assert server._tickets
        # A client that only sends: the server must be able to receive it without being listened to.
        await gather(partial(client.send_all, b"hello"), server.receive_some)
        with assert_checkpoints():
            await server.send_all(b"")
        assert server._tickets
        await gather(partial(server.send_all, b"with tickets"), client.receive_some)
        assert not server._tickets
        assert client.session.has_ticket

    kernel.run(main)


def post_handshake_contexts() -> dict[str, ssl.SSLContext]:
    client, server = client_context(TLS_1_3), server_context(TLS_1_3)
    certificate("ann@example.test").configure_cert(client)
    client.post_handshake_auth = server.post_handshake_auth = True
    server.verify_mode = ssl.CERT_OPTIONAL
    authority().configure_trust(server)
    return {"client": client, "server": server}


async def with_request_for_a_certificate(over: Any) -> Pair:
    """A server that has not asked for a certificate in the handshake, and will ask with what it sends next."""
    client, server = await connected(None, over, **post_handshake_contexts())
    server._tls._sslobj.verify_client_post_handshake()
    return client, server


@pytest.mark.parametrize("over", [memory_stream_pair, lockstep_stream_pair])
def test_who_receives_answers_what_the_peer_asks_for_after_the_handshake(over: Any) -> None:
    async def main() -> None:
        client, server = await with_request_for_a_certificate(over)

        async def ask() -> None:
            await server.send_all(b"who are you?")
            assert await server.receive_some() == b"ann"

        async def answer() -> None:
            assert await client.receive_some() == b"who are you?"
            async with open_nursery() as nursery:
                nursery.start_soon(client.receive_some)
                await wait_all_tasks_blocked()
                await client.send_all(b"ann")
                nursery.cancel_scope.cancel()

        await gather(ask, answer)
        assert server.getpeercert()["subjectAltName"] == (("email", "ann@example.test"),)

    kernel.run(main)


def test_an_answer_that_was_cancelled_is_sent_by_who_receives_next() -> None:
    async def main() -> None:
        client, server = await with_request_for_a_certificate(lockstep_stream_pair)

        async with open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"?")
            assert await client.receive_some() == b"?"
            nursery.start_soon(client.receive_some)  # answers, and waits, for the server does not listen
            await wait_all_tasks_blocked()
            assert client._flushing
            nursery.cancel_scope.cancel()
        assert client._owed
        async with open_nursery() as nursery:
            nursery.start_soon(client.receive_some)
            nursery.start_soon(server.receive_some)
            await wait_all_tasks_blocked()
            assert server.getpeercert()["subjectAltName"] == (("email", "ann@example.test"),)
            assert not client._owed
            nursery.cancel_scope.cancel()

    kernel.run(main)


@pytest.mark.parametrize("size", [tls.CHUNK, len(MUCH)])
def test_who_receives_never_waits_for_who_sends_and_leaves_its_answer_to_be_taken_along(size: int) -> None:
    async def main() -> None:
        client, server = await with_request_for_a_certificate(lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(client.send_all, MUCH[:size])  # waits: the server does not listen yet
            await wait_all_tasks_blocked()

            async def receive() -> None:
                assert await receive_exactly(client, len(MUCH)) == MUCH
                assert client._outgoing.pending
                await client.receive_some(1)

            nursery.start_soon(receive)
            await server.send_all(MUCH)  # arrives, although the answer to what comes before it cannot go out
            await wait_all_tasks_blocked()
            assert await receive_exactly(server, size) == MUCH[:size]
            nursery.start_soon(server.receive_some)
            await wait_all_tasks_blocked()
            assert server.getpeercert()["subjectAltName"] == (("email", "ann@example.test"),)
            assert not client._outgoing.pending
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_who_sends_or_waits_to_send_lets_an_answer_go_first_that_is_on_its_way() -> None:
    async def main() -> None:
        client, server = await with_request_for_a_certificate(lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"?")
            assert await client.receive_some() == b"?"
            nursery.start_soon(client.receive_some)  # answers, and waits, for the server does not listen
            await wait_all_tasks_blocked()
            assert client._flushing
            for call in (client.wait_send_all_might_not_block, partial(client.send_all, b"")):
                waiter = nursery.spawn(call)
                await wait_all_tasks_blocked()
                assert not waiter.done
                waiter.cancel()
                await wait_all_tasks_blocked()
            nursery.start_soon(client.send_all, b"ann")
            await wait_all_tasks_blocked()
            assert await server.receive_some() == b"ann"
            assert server.getpeercert()["subjectAltName"] == (("email", "ann@example.test"),)
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_who_receives_does_not_finish_what_another_task_has_given_up_sending() -> None:
    async def main() -> None:
        client, server = await with_request_for_a_certificate(lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(client.send_all, b"my name is")
            await wait_all_tasks_blocked()
            nursery.start_soon(server.send_all, b"?")
            assert await client.receive_some() == b"?"
            nursery.start_soon(client.receive_some)  # leaves its answer to the sender
            await wait_all_tasks_blocked()
            nursery.start_soon(server.receive_some)
            await wait_all_tasks_blocked()
            nursery.start_soon(server.receive_some)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert not client._outgoing.pending
        async with open_nursery() as nursery:
            nursery.start_soon(client.send_all, MUCH)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await gather(partial(server.send_all, b"x"), client.receive_some)  # the server does not listen

    kernel.run(main)


# ---- handshakes and several tasks -----------------------------------------------------------------------


@each_version
def test_all_wait_for_one_handshake(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = pair(version, lockstep_stream_pair)
        await gather(
            client.do_handshake, client.do_handshake, server.do_handshake, partial(client.send_all, b"x"),
            server.receive_some, server.do_handshake
        )  # fmt: skip
        for stream in (client, server):
            with assert_checkpoints():
                await stream.do_handshake()

    kernel.run(main)


@each_version
def test_a_handshake_that_its_task_gives_up_is_taken_up_by_the_next(version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client, server = pair(version)
        async with open_nursery() as nursery:
            with kernel.CancelScope() as scope:
                async with open_nursery() as inner:
                    inner.start_soon(client.do_handshake)
                    await wait_all_tasks_blocked()
                    nursery.start_soon(client.do_handshake)
                    await wait_all_tasks_blocked()
                    scope.cancel()
            await server.do_handshake()
        await gather(partial(client.send_all, b"x"), server.receive_some)

    kernel.run(main)


def test_if_the_handshake_fails_all_who_wait_for_it_get_to_know() -> None:
    log: list[str] = []

    async def main() -> None:
        client, raw = with_raw_peer(server_side=False)

        async def shake_hands() -> None:
            with pytest.raises(BrokenResourceError) as caught:
                await client.do_handshake()
            log.append(str(caught.value))

        async with open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(shake_hands)
            await wait_all_tasks_blocked()
            await raw.send_all(b"220 mail.example.test ESMTP\r\n")

    kernel.run(main)
    failure = "the peer does not speak TLS: its first bytes were b'220 mail.example'"
    assert log == [failure] + [f"this TLS stream broke before: {failure}"] * 2


# ---- cancellation --------------------------------------------------------------------------------------


async def insist_on_sending(stream: SSLStream[Any], data: bytes) -> None:
    """Send `data`; if cancelled, go on from where the error says."""
    view = memoryview(data)
    while True:
        with cancel_target():
            try:
                await stream.send_all(view)
            except Cancelled as cancelled:
                view = view[cancelled.bytes_sent :]  # type: ignore[attr-defined]
                raise
            return


async def insist(call: Callable[[], Awaitable[Any]]) -> Any:
    while True:
        with cancel_target():
            return await call()


@each_version
@pytest.mark.parametrize("over", [memory_stream_pair, lockstep_stream_pair, narrow_stream_pair])
def test_cancelled_anywhere_and_taken_up_again_it_loses_nothing(version: ssl.TLSVersion, over: Any) -> None:
    data = MUCH[: tls.CHUNK + 1000]
    contexts = {"client": client_context(version), "server": server_context(version)}

    async def receive(stream: SSLStream[Any], size: int) -> None:
        got = bytearray()
        while len(got) < size:
            got += await insist(partial(stream.receive_some, 40_000))
        assert got == data[:size]

    async def end(stream: SSLStream[Any], *, first: bool) -> None:
        if not first:  # without any room in between, one must listen while the other says goodbye
            assert await insist(stream.receive_some) == b""
        transport, trailing = await insist(stream.unwrap)
        assert trailing == b""
        await transport.aclose()

    async def program() -> None:
        client, server = pair(over=over, **contexts)  # type: ignore[arg-type]
        await gather(partial(insist, client.do_handshake), partial(insist, server.do_handshake))
        await gather(
            partial(insist_on_sending, client, data), partial(receive, server, len(data)),
            partial(insist_on_sending, server, data[:10]), partial(receive, client, 10),
        )  # fmt: skip
        await gather(partial(end, client, first=True), partial(end, server, first=False))

    found = explore_cancellation(program, cancel="targets")
    assert found.cancelled is not None
    assert found.cancelled > 30
    explore(program, strategy="random", schedules=SCHEDULES, cancel="targets")


@each_version
def test_a_handshake_that_is_part_of_a_cancelled_send_or_receive_loses_nothing(version: ssl.TLSVersion) -> None:
    contexts = {"client": client_context(version), "server": server_context(version)}

    async def program() -> None:
        client, server = pair(over=lockstep_stream_pair, **contexts)  # type: ignore[arg-type]
        _, got = await gather(partial(insist_on_sending, client, b"hello"), partial(insist, server.receive_some))
        assert got == b"hello"

    assert explore_cancellation(program, cancel="targets").cancelled


@each_version
def test_cancelled_anywhere_it_closes_both_transports(version: ssl.TLSVersion) -> None:
    contexts = {"client": client_context(version), "server": server_context(version)}
    transports: list[Any] = []

    async def program() -> None:
        client, server = pair(over=lockstep_stream_pair, **contexts)  # type: ignore[arg-type]
        transports.clear()

        async def talk() -> None:
            async with client:
                transports.append(client.transport_stream)
                await client.send_all(b"hello")
                assert await client.receive_some() in (b"hello", b"")

        async def answer() -> None:
            async with server:
                transports.append(server.transport_stream)
                async for chunk in server:
                    await server.send_all(chunk)

        await gather(talk, answer)

    def all_closed() -> bool:
        states = [state for t in transports for state in (t.send_stream._state, t.receive_stream._state)]
        return not any(state.sender_open or state.receiver_open for state in states)

    explore_cancellation(program, check=all_closed)
    explore_cancellation(
        program, cancel="tasks", check=all_closed, may_raise=(BrokenResourceError, kernel.TaskCancelled)
    )


def test_a_cancelled_send_says_how_many_bytes_it_has_encrypted() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        sent = []

        async def send() -> None:
            try:
                await client.send_all(MUCH)
            except Cancelled as cancelled:
                sent.append(cancelled.bytes_sent)  # type: ignore[attr-defined]
                raise

        async with open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        async with open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.cancel_scope.cancel()
        assert sent == [tls.CHUNK, 0]
        async with open_nursery() as nursery:  # the rest of the chunk is still to come
            got = nursery.spawn(receive_exactly, server, tls.CHUNK)
            await client.send_all(b"")
            assert await got == MUCH[: tls.CHUNK]

    kernel.run(main)


def test_a_failed_send_says_how_many_bytes_it_has_encrypted() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        async with open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(BrokenResourceError) as caught:
                    await client.send_all(MUCH)
                assert caught.value.bytes_sent == tls.CHUNK  # type: ignore[attr-defined]
                for _ in range(2):
                    with pytest.raises(BrokenResourceError, match="the other end is closed"):
                        await client.send_all(b"x")

            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            await server.transport_stream.aclose()

    kernel.run(main)


def test_a_send_that_was_given_up_is_no_reason_to_wait_at_the_end() -> None:
    async def main() -> None:
        client, server = await connected(None, lockstep_stream_pair)
        async with open_nursery() as nursery:
            nursery.start_soon(client.send_all, MUCH)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await client.aclose()  # the server does not listen
        with pytest.raises(BrokenResourceError):
            await server.receive_some()

    kernel.run(main)


def test_a_transport_that_does_not_say_how_much_it_has_sent_is_broken_by_a_cancelled_send() -> None:
    class Mute(kernel.abc.SendStream):
        async def send_all(self, data: Any) -> None:
            await kernel.sleep_forever()

        async def wait_send_all_might_not_block(self) -> None:
            pass

        async def aclose(self) -> None:
            pass

    async def main() -> None:
        client, _ = await connected()
        client.transport_stream.send_stream = Mute()
        async with open_nursery() as nursery:
            nursery.start_soon(client.send_all, b"x")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(BrokenResourceError, match="has not said how much it sent before <Cancelled"):
            await client.send_all(b"x")
        await client.aclose()  # without a word

    kernel.run(main)


# ---- SSLListener ---------------------------------------------------------------------------------------


class OneConnection(kernel.abc.Listener[Any]):
    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.closed = False

    async def accept(self) -> Any:
        await kernel.lowlevel.checkpoint()
        return self.stream

    async def aclose(self) -> None:
        self.closed = True
        await kernel.lowlevel.checkpoint()


@pytest.mark.parametrize("https", [False, True])
def test_a_listener_makes_servers_of_connections(https: bool) -> None:
    async def main() -> None:
        here, there = memory_stream_pair()
        listener = OneConnection(there)
        async with SSLListener(listener, server_context(), https_compatible=https) as ssl_listener:
            assert ssl_listener.transport_listener is listener
            server = await ssl_listener.accept()
            client = SSLStream(here, client_context(), server_hostname=HOST)
            assert server.transport_stream is there
            assert server.server_side is True
            await shake(client, server)
            sent = sent_on(server)
            await server.aclose()
            assert bool(sent) is not https
        assert listener.closed

    kernel.run(main)


def test_a_connection_that_cannot_be_wrapped_is_closed() -> None:
    async def main() -> None:
        here, there = memory_stream_pair()
        with pytest.raises(ssl.SSLError, match="PROTOCOL_TLS_CLIENT"):
            await SSLListener(OneConnection(there), client_context()).accept()
        assert await here.receive_some() == b""

    kernel.run(main)
