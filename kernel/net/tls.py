"""TLS over any stream: what is sent is encrypted, and one knows whom one talks to.

The standard library's `ssl.SSLObject` knows the protocol and does no input or output. It takes what the peer has sent
out of one buffer in memory, and leaves what is to be sent in another. The stream here carries bytes between these
buffers and a *transport*, another stream:

    send_all     -> SSLObject.write -> _outgoing -> transport.send_all
    receive_some <- SSLObject.read  <- _incoming <- transport.receive_some

Either direction may need the other one: in a handshake each side speaks and listens by turns, and a handshake may be
asked for again later. So each call of the SSL object is made in a loop (`_call`): if it says that it wants to read,
send what it has left to be sent, or else receive, and call it again.

Rules:

* One task may send while another receives. Who receives never waits for who sends, else two peers that are both busy
  sending would wait for each other for ever: what it has to send meanwhile, the sender takes along.
* A wait may end with a cancellation, and whatever comes next can go on from there. A cancelled receive or handshake has
  lost nothing. A cancelled send has encrypted some bytes, and says how many; what did not get out of them goes out
  before anything else does, for the peer must see all of a record or nothing of what follows. This needs a transport
  whose errors say how many bytes it has sent (`bytes_sent`), as those of all our streams do. With another one, a send
  that is cancelled while it waits breaks the stream.
* The peer's `close_notify` is the end. Without it the connection may have been cut by somebody who wants us to believe
  that this was all. Then `receive_some` raises, save for `https_compatible`.
* Memory is bounded: data are encrypted `CHUNK` bytes at a time, and nothing is received before it is asked for.

A TLS 1.3 server ends its handshake with session tickets, which OpenSSL wants to send at once. They wait here for the
first send. A peer that only sends would never read them, and closing a TCP connection with something unread in it may
destroy what went the other way (openssl#7948, trio#819).
"""

from __future__ import annotations

import ssl
from collections.abc import Generator
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from ..abc import Listener, Stream
from ..core.errors import BrokenResourceError, BusyResourceError, Cancelled, ClosedResourceError
from ..core.nursery import open_nursery
from ..core.traps import checkpoint_if_cancelled, consume_budget, operation
from ..groups import raise_single
from ..parking import ParkingLot
from ..streams import aclose_forcefully
from .resolve import encode_hostname

__all__ = ["NeedHandshakeError", "SSLListener", "SSLStream"]

T_Stream = TypeVar("T_Stream", bound=Stream)

CHUNK: Final = 65536
"""Bytes of data that are encrypted, or decrypted, at a time: four TLS records, if those are full."""


class NeedHandshakeError(Exception):
    """What was asked for is known only after the handshake: call `do_handshake()`, or send or receive, first."""


def _forwarded(name: str, *, after_handshake: bool = False) -> Any:
    """A property that stands for the attribute or method `name` of the SSL object."""

    def get(self: SSLStream[Any]) -> Any:
        if after_handshake and not self._shaken:
            raise NeedHandshakeError(f"{name} is not known before the handshake: call do_handshake() first")
        return getattr(self._tls, name)

    return property(get, doc=f"`ssl.SSLObject.{name}`" + (", after the handshake." if after_handshake else "."))


class SSLStream(Stream, Generic[T_Stream]):
    """A stream that encrypts what goes over another one, its transport.

    The handshake happens when it is first needed, or in `do_handshake`. One task at a time may send, and one receive.

    The context says whom to trust; `ssl.create_default_context()` makes one for clients which verifies the certificate
    and the host name, and `ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)` one for servers, which needs
    `load_cert_chain`.

    Args:
        transport_stream: the stream to go over. Nobody else should use it from now on. Its methods may be coroutines or
            operations.
        ssl_context: an `ssl.SSLContext`.
        server_hostname: whom a client wants to talk to. The server learns it (SNI), and its certificate must be for
            that name.
        server_side: whether this is the server.
        https_compatible: do without `close_notify` on both sides: `receive_some` takes any end for the end, and
            `aclose` only closes. HTTPS needs it, since few peers there care, and can afford it, since HTTP itself says
            how long a message is.

    Raises:
        TypeError: `ssl_context` is no context.
        ValueError: the context checks host names and this client has none.
        ssl.SSLError: the context is for the other side.

    Attributes:
        transport_stream: the transport; None after `unwrap`.

    The attributes and methods of `ssl.SSLObject` that tell about the connection are here, too: `context` and `session`
    (settable), `server_side`, `server_hostname`, `pending`; and `version`, `cipher`, `shared_ciphers`, `compression`,
    `session_reused`, `getpeercert`, `get_channel_binding`, `selected_alpn_protocol`, `selected_npn_protocol`, which
    raise NeedHandshakeError before the handshake.
    """

    # fmt: off
    __slots__ = (
        "__weakref__",
        "transport_stream", "_https_compatible",  # set once
        "_tls", "_incoming", "_outgoing",         # the SSL object and its buffers
        "_tickets",              # ciphertext to be sent with whatever is sent next
        "_unsent",               # the rest of what a cancelled task had begun to send. After it, _tickets and _outgoing
        "_owed",                 # whether the peer waits for something in there, so that receiving is no use until then
        "_shaken", "_ended",     # the handshake is done; the peer's close_notify has come
        "_first_bytes",          # the first that came, to tell a peer that does not speak TLS at all
        "_over",                 # the error of all that is tried from now on, as class and text, or None
        "_shaking", "_sending", "_receiving",  # a task is in the handshake, in send_all or the like, in receive_some
        "_flushing", "_feeding",               # a task is in transport.send_all, in transport.receive_some
        "_others",               # where tasks wait for another one to leave one of these
    )
    # fmt: on

    def __init__(
        self,
        transport_stream: T_Stream,
        ssl_context: ssl.SSLContext,
        *,
        server_hostname: str | bytes | None = None,
        server_side: bool = False,
        https_compatible: bool = False,
    ) -> None:
        check_context(ssl_context)
        if ssl_context.check_hostname and not server_side and not server_hostname:
            raise ValueError(
                "SSLStream() needs server_hostname=, the name of the server one wants to talk to: the context has "
                "check_hostname set, and without the name any valid certificate of anybody would do"
            )
        if isinstance(server_hostname, str) and server_hostname:
            server_hostname = encode_hostname(server_hostname)
        self.transport_stream = transport_stream
        self._https_compatible = https_compatible
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = ssl_context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._tickets = self._unsent = self._first_bytes = b""
        self._owed = self._shaken = self._ended = False
        self._over: tuple[type[Exception], str] | None = None
        self._shaking = self._sending = self._receiving = self._flushing = self._feeding = False
        self._others = ParkingLot("what another task is doing on the same SSLStream")

    server_side = _forwarded("server_side")
    server_hostname = _forwarded("server_hostname")
    pending = _forwarded("pending")
    version = _forwarded("version", after_handshake=True)
    cipher = _forwarded("cipher", after_handshake=True)
    shared_ciphers = _forwarded("shared_ciphers", after_handshake=True)
    compression = _forwarded("compression", after_handshake=True)
    session_reused = _forwarded("session_reused", after_handshake=True)
    getpeercert = _forwarded("getpeercert", after_handshake=True)
    get_channel_binding = _forwarded("get_channel_binding", after_handshake=True)
    selected_alpn_protocol = _forwarded("selected_alpn_protocol", after_handshake=True)
    selected_npn_protocol = _forwarded("selected_npn_protocol", after_handshake=True)

    @property
    def context(self) -> ssl.SSLContext:
        """`ssl.SSLObject.context`. Settable before the handshake, for servers with several certificates."""
        return self._tls.context

    @context.setter
    def context(self, context: ssl.SSLContext) -> None:
        self._tls.context = context

    @property
    def session(self) -> ssl.SSLSession | None:
        """`ssl.SSLObject.session`. Settable before the handshake: a client that sets it to a former one saves time."""
        return self._tls.session

    @session.setter
    def session(self, session: ssl.SSLSession) -> None:
        self._tls.session = session

    # ---- what a stream does -------------------------------------------------------------------------

    @operation
    def do_handshake(self) -> Generator[Any, Any, None]:
        """Have the handshake done: agree on keys, and verify the peer's certificate.

        Not needed, as sending and receiving do it. Done already, it does nothing; if another task is at it, it waits
        for that one. Always a cancel point; a schedule point if it waits. After a cancellation it may be called again,
        and goes on from where it was.

        Raises:
            BrokenResourceError: the peer was not to be trusted, did not trust us, wants what we have not, does not
                speak TLS, or is gone. `__cause__` is the `ssl.SSLError`, if there was one.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
        """
        self._check()
        yield from consume_budget()
        if not self._shaken:
            yield from self._handshake()

    @operation
    def send_all(self, data: bytes | bytearray | memoryview) -> Generator[Any, Any, None]:
        """Encrypt `data` and send it.

        Always a cancel point, before anything is done; a schedule point if it waits. What this raises, `Cancelled`
        included, has an attribute `bytes_sent`: so many bytes of `data` were encrypted. If the stream is still in
        order, as after a cancellation, they have gone out or will go out before anything else: to go on, send the rest,
        which may be nothing. If it is broken, the peer has had so many at most.

        Raises:
            BusyResourceError: another task is sending.
            BrokenResourceError: the handshake has failed, or the connection is broken.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
        """
        self._start_sending()
        sent = 0
        try:
            yield from checkpoint_if_cancelled()
            if not self._shaken:
                yield from self._handshake()
            with memoryview(data).cast("B") as view:
                if not view:
                    yield from self._flush() if self._unsent or self._outgoing.pending else consume_budget()
                while sent < len(view):
                    sent += yield from self._call(self._tls.write, view[sent : sent + CHUNK], in_turn=True)
                    yield from self._flush()
                    while self._outgoing.pending:  # the receiver has left something to be taken along
                        yield from self._flush()
        except BaseException as error:
            error.bytes_sent = sent  # type: ignore[attr-defined]
            raise
        finally:
            self._sending = False

    @operation
    def wait_send_all_might_not_block(self) -> Generator[Any, Any, None]:
        """Wait until the transport might take some bytes. Checkpoints and errors are the transport's.

        Raises:
            BusyResourceError: another task is sending.
        """
        self._start_sending()
        try:
            while self._flushing:
                yield from self._others.park()
            yield from self.transport_stream.wait_send_all_might_not_block()  # type: ignore[misc]  # as in _flush
        finally:
            self._sending = False

    @operation
    def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, bytes]:
        """Receive bytes and decrypt them: at least one and at most `max_bytes`, or 65,536; `b""` at the end.

        Always a cancel point, and then no byte is lost; a schedule point if it waits. Also sends, if the peer asks for
        an answer.

        Raises:
            BusyResourceError: another task is receiving.
            BrokenResourceError: the handshake has failed; the connection is broken; or has ended without the peer
                having said so, when what was received so far may not be all. With `https_compatible`, that is `b""`.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
            TypeError, ValueError: `max_bytes` is not a whole number from 1 up.
        """
        if max_bytes is None:
            max_bytes = CHUNK
        elif not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")
        elif max_bytes < 1:
            raise ValueError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")
        else:
            max_bytes = min(max_bytes, CHUNK)  # so much memory is taken
        self._start_receiving()
        try:
            if not self._shaken:
                yield from self._handshake()
            if self._incoming.pending or self._outgoing.pending or self._owed or self._ended or self._tls.pending():
                yield from consume_budget()
            else:  # it would only say that it wants to read, by an exception that takes 1.5 us
                yield from self._feed()
            data: bytes = yield from self._call(self._tls.read, max_bytes)
            self._ended = not data
            if self._incoming.pending and 0 < len(data) < max_bytes:
                data += yield from self._read_on(max_bytes - len(data))
            return data
        except BrokenResourceError as error:
            if self._https_compatible and isinstance(error.__cause__, ssl.SSLEOFError):
                return b""
            raise
        finally:
            self._receiving = False

    @operation
    def __anext__(self) -> Generator[Any, Any, bytes]:
        chunk = yield from self.receive_some()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    @operation
    def unwrap(self) -> Generator[Any, Any, tuple[T_Stream, bytes]]:
        """End the encryption in good order, to go on in the clear: send `close_notify` and wait for the peer's.

        The peer must do the same. What it has sent before must have been received. This stream is closed then.

        Always a cancel point; a schedule point if it waits. After a cancellation it may be called again, and data may
        still be received, but no longer sent.

        Returns:
            the transport, and what was received from it that comes after the encrypted part, and is therefore the first
            that the peer has sent in the clear.

        Raises:
            BusyResourceError: another task is sending or receiving.
            BrokenResourceError: the connection is broken, or the peer went on sending, or left without `close_notify`.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
        """
        self._start_sending()
        try:
            self._start_receiving()
            try:
                yield from checkpoint_if_cancelled()
                if not self._shaken:
                    yield from self._handshake()
                yield from self._call(self._tls.unwrap)
                yield from self._flush()  # ours, if the peer's had come before
            finally:
                self._receiving = False
        finally:
            self._sending = False
        transport, self.transport_stream = self.transport_stream, None  # type: ignore[assignment]
        self._over = (ClosedResourceError, "this stream was unwrapped: use the transport")
        return transport, self._incoming.read()

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Say goodbye (`close_notify`), so that the peer knows that this was all, and close the transport, in any case.

        The peer's own goodbye is not waited for, and it does not matter if it is gone. There is no goodbye if this
        stream is `https_compatible` or broken, nor if something is still being sent: by another task, which wakes with
        ClosedResourceError; or by nobody any more, after a cancelled send. (`send_all(b"")` sends the rest of that.) If
        there was no handshake yet, there is one now, or the peer could not know.

        Always a cancel point; a schedule point if it waits. Cancelled, it closes the transport without more ado.
        """
        if self.transport_stream is None:
            yield from consume_budget()
            return
        polite = not (self._over or self._https_compatible or self._shaking or self._unsent)
        another = not polite and self._over == _CLOSED
        self._over = _CLOSED
        try:
            yield from checkpoint_if_cancelled()
            if polite:
                yield from self._say_goodbye().__await__()
            while another and (self._flushing or self._shaking):  # it is closing, and the last words are on their way
                yield from self._others.park()
        except BaseException:
            yield from aclose_forcefully(self.transport_stream)
            raise
        yield from self.transport_stream.aclose()  # type: ignore[misc]  # as in _flush

    # ---- how it is done -----------------------------------------------------------------------------

    def _check(self) -> None:
        if self._over is not None:
            error, text = self._over
            raise error(text)

    def _start_sending(self) -> None:
        if self._sending:
            raise BusyResourceError(f"another task is sending on {self!r}: put a lock around it")
        self._check()
        self._sending = True

    def _start_receiving(self) -> None:
        if self._receiving:
            raise BusyResourceError(f"another task is receiving from {self!r}: put a lock around it")
        self._check()
        self._receiving = True

    @operation
    def _call(self, method: Any, *args: Any, in_turn: bool = False) -> Generator[Any, Any, Any]:
        """Call a method of the SSL object, again and again, until it no longer wants to read. Return what it returns.

        Between a call and the wait that it leads to nothing else happens, so the one is still true in the other. With
        `in_turn` it is called when nobody is sending, so that what it leaves in the buffer can be sent at once.
        """
        while True:
            while in_turn and self._flushing:
                yield from self._others.park()
            try:
                return method(*args)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                return b""  # the end, if we have said goodbye before
            except ssl.SSLError as error:
                raise (yield from self._failure(error)) from error
            if self._outgoing.pending:
                self._owed = True
            if self._owed and not self._flushing:
                yield from self._flush()  # and call again before receiving: another task may have received meanwhile
            else:
                yield from self._feed()

    def _read_on(self, max_bytes: int) -> Generator[Any, Any, bytes]:
        """Read the records that are here already. One at a time would take a tenth off the throughput."""
        chunks: list[bytes] = []
        try:
            while max_bytes and self._incoming.pending and not self._ended:
                chunks.append(self._tls.read(max_bytes))
                max_bytes -= len(chunks[-1])
                self._ended = not chunks[-1]
        except ssl.SSLWantReadError:
            pass  # the last one is not complete
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError as error:
            yield from self._failure(error)  # which the next call will raise
        return b"".join(chunks)

    @operation
    def _flush(self) -> Generator[Any, Any, None]:
        """Send the ciphertext that there is. What remains of it if this is cancelled goes out first next time."""
        while self._flushing:
            yield from self._others.park()
        ciphertext = self._unsent + self._tickets + self._outgoing.read()  # mostly empty but for the last: no copy
        if not ciphertext:  # a cancellation may come when all has just been sent
            self._owed = False
            return
        self._flushing = True
        self._unsent, self._tickets = ciphertext, b""
        try:
            # A coroutine or an operation; in an operation one can delegate to both.
            yield from self.transport_stream.send_all(ciphertext)  # type: ignore[misc]
        except BaseException as error:
            sent = getattr(error, "bytes_sent", None)
            if sent is None:
                self._break(f"its transport has not said how much it sent before {error!r}")
            else:
                self._unsent = ciphertext[sent:]
            raise
        else:
            self._unsent = b""
            self._owed = False
        finally:
            self._flushing = False
            self._wake_others()

    @operation
    def _feed(self) -> Generator[Any, Any, None]:
        """Receive more ciphertext. If another task is at it already, wait for that one."""
        if self._feeding:
            yield from self._others.park()
            return
        self._feeding = True
        try:
            ciphertext = yield from self.transport_stream.receive_some()  # type: ignore[misc]  # as in _flush
        finally:
            self._feeding = False
            self._wake_others()
        if not ciphertext:
            raise self._truncated()
        self._incoming.write(ciphertext)
        if not self._shaken and len(self._first_bytes) < 5:
            self._first_bytes += ciphertext[:16]

    def _wake_others(self) -> None:
        if self._others:
            self._others.unpark_all()

    @operation
    def _handshake(self) -> Generator[Any, Any, None]:
        """Have the handshake done, by this task if no other is at it. One that was given up is taken up again."""
        while not self._shaken:
            self._check()
            if self._shaking:
                yield from self._others.park()
            else:
                yield from self._shake()

    @operation
    def _shake(self) -> Generator[Any, Any, None]:
        self._shaking = True
        try:
            yield from self._call(self._tls.do_handshake)
            if self._tls.server_side and self._tls.version() == "TLSv1.3":
                self._tickets = self._outgoing.read()
            else:
                yield from self._flush()
            self._shaken = True
        finally:
            self._shaking = False
            self._wake_others()

    async def _say_goodbye(self) -> None:
        try:
            if not self._shaken:
                await self._shake()
            try:
                self._tls.unwrap()
            except ssl.SSLWantReadError:
                pass  # it would wait for the peer's goodbye
            with raise_single():
                async with open_nursery() as nursery:
                    nursery.start_soon(self._drain)
                    await self._flush()
                    nursery.cancel_scope.cancel()
        except (BrokenResourceError, BusyResourceError, ClosedResourceError, ssl.SSLError):
            pass  # nobody is there any more

    @operation
    def _drain(self) -> Generator[Any, Any, None]:
        """Throw away what comes. Else two peers that close while much is on its way both ways would wait for ever."""
        with suppress(BrokenResourceError, BusyResourceError, ClosedResourceError):
            while (yield from self.transport_stream.receive_some()):  # type: ignore[misc]  # as in _flush
                pass

    # ---- what can go wrong --------------------------------------------------------------------------

    def _break(self, text: str) -> None:
        if self._over is None:
            self._over = (BrokenResourceError, f"this TLS stream broke before: {text}")

    @operation
    def _failure(self, error: ssl.SSLError) -> Generator[Any, Any, BrokenResourceError]:
        """The SSL object has failed, for good. Tell the peer, if that can be done, and return what to raise."""
        text = self._explain(error)
        self._break(text)
        if self._outgoing.pending and not self._flushing:  # an alert
            try:
                yield from self._flush()
            except (Exception, Cancelled):
                pass  # the failure counts more; a cancellation will be raised again at the next cancel point
        return BrokenResourceError(text)

    def _explain(self, error: ssl.SSLError) -> str:
        first = self._first_bytes
        if not self._shaken and first and not (first[0] in _RECORD_TYPES and first[1:2] in (b"", b"\3")):
            return f"the peer does not speak TLS: its first bytes were {first[:16]!r}"
        return f"{'TLS' if self._shaken else 'the TLS handshake'} has failed: {error}"

    def _truncated(self) -> BrokenResourceError:
        """The transport has ended, and OpenSSL wanted more: so close_notify has not come."""
        if not self._shaken:
            text = "the peer has closed the connection in the middle of the TLS handshake"
        else:
            text = (
                "the connection has ended, but the peer did not say that this was all (close_notify). What was "
                "received may have been cut short. Where that is usual, as in HTTPS, pass https_compatible=True"
            )
        if not self._https_compatible:
            self._break(text)
        broken = BrokenResourceError(text)
        broken.__cause__ = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol")
        return broken

    def __repr__(self) -> str:
        return f"<SSLStream over {self.transport_stream!r}>"


_CLOSED: Final = (ClosedResourceError, "this stream was closed before")
_RECORD_TYPES: Final = range(20, 25)  # the first byte of every TLS record; the second is 3


class SSLListener(Listener[SSLStream[T_Stream]], Generic[T_Stream]):
    """Takes connections from another listener, and makes each an `SSLStream` of a server.

    The handshake is left to the first send or receive, so that a slow client does not hold up those after it.

    Args:
        transport_listener: where the connections come from.
        ssl_context: an `ssl.SSLContext` for servers, with a certificate.
        https_compatible: passed on to each `SSLStream`.

    Raises TypeError if `ssl_context` is no context.

    Attributes:
        transport_listener: as given.
    """

    __slots__ = ("__weakref__", "_https_compatible", "_ssl_context", "transport_listener")

    def __init__(
        self,
        transport_listener: Listener[T_Stream],
        ssl_context: ssl.SSLContext,
        *,
        https_compatible: bool = False,
    ) -> None:
        check_context(ssl_context)
        self.transport_listener = transport_listener
        self._ssl_context = ssl_context
        self._https_compatible = https_compatible

    @operation
    def accept(self) -> Generator[Any, Any, SSLStream[T_Stream]]:
        """Wait for the next connection. Checkpoints and errors are those of the transport listener.

        Raises:
            ssl.SSLError: the context is one for clients.
        """
        transport = yield from self.transport_listener.accept()  # type: ignore[misc]  # as in SSLStream._flush
        try:
            return SSLStream(transport, self._ssl_context, server_side=True, https_compatible=self._https_compatible)
        except BaseException:
            yield from aclose_forcefully(transport)
            raise

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close the transport listener."""
        yield from self.transport_listener.aclose()  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<SSLListener over {self.transport_listener!r}>"


def check_context(ssl_context: object) -> None:
    """Raise TypeError if this is no context: better than an error inside a connection."""
    if not isinstance(ssl_context, ssl.SSLContext):
        raise TypeError(
            f"ssl_context must be an ssl.SSLContext, not {ssl_context!r}: ssl.create_default_context() makes one"
        )
