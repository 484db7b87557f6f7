"""Certificates and contexts for the tests of TLS, from an authority of their own. Made once."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from functools import cache

import trustme

HOST = "example.test"
TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
VERSIONS = (TLS_1_2, TLS_1_3)


@cache
def authority() -> trustme.CA:
    return trustme.CA()


@cache
def certificate(*names: str, expired: bool = False) -> trustme.LeafCert:
    long_ago = datetime.now(UTC) - timedelta(days=2)
    return authority().issue_cert(*names, not_after=long_ago if expired else None)


def server_context(version: ssl.TLSVersion | None = None, *names: str, expired: bool = False) -> ssl.SSLContext:
    """For servers, with a certificate for `names`, by default HOST."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate(*(names or (HOST,)), expired=expired).configure_cert(context)
    return _only(context, version)


def client_context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """For clients that trust the authority, and verify all that can be verified."""
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return _only(context, version)


def _only(context: ssl.SSLContext, version: ssl.TLSVersion | None) -> ssl.SSLContext:
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context
