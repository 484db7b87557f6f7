"""The pytest plugin: tests and fixtures that run in the kernel. See docs/pytest-plugin.md.

This module is what the distribution's entry point names. It declares the options. The hooks and the fixtures are in
pytest_tests.py, which is registered when all other plugins have been. So it comes first where the first one decides,
and its fixtures go before those of the same name. pytest-trio has the same three, and the tests of that get theirs.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import pytest

from . import pytest_tests
from .pytest_options import LEFTOVERS, Options, kinds, options, seconds

__all__ = ["pytest_addoption", "pytest_configure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel", "tests that run in the kernel")
    group.addoption(
        "--kernel-mode",
        choices=("strict", "auto"),
        default=None,
        help="strict: tests marked `kernel` run in the kernel; auto: all async and generator tests do",
    )
    group.addoption(
        "--kernel-timeout",
        metavar="SECONDS",
        default=None,
        help="real seconds after which a kernel test is ended, and its task tree shown; 0 for no limit",
    )
    parser.addini("kernel_mode", "default of --kernel-mode", default="strict")
    parser.addini("kernel_timeout", "default of --kernel-timeout", default="0")
    parser.addini(
        "kernel_leftovers",
        f"what a kernel test must not leave behind: any of {' '.join(LEFTOVERS)}",
        type="args",
        default=list(LEFTOVERS),
    )
    parser.addini("kernel_patience", "real seconds that what a test leaves behind gets to end by itself", default="1")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """All other plugins are there: check the options, and register the rest."""
    config.addinivalue_line(
        "markers",
        "kernel(timeout=seconds, leftovers=kinds): run this test in the kernel. `timeout` in real seconds; `leftovers` "
        f"a string or list of what it must not leave behind, of {', '.join(LEFTOVERS)}; False for no check",
    )
    mode = _option(config, "kernel_mode")
    if mode not in ("strict", "auto"):
        raise pytest.UsageError(f"kernel_mode must be strict or auto, not {mode!r}")
    if mode == "auto":
        _refuse_two_masters(config)
    config.stash[options] = Options(
        mode == "auto",
        seconds(_option(config, "kernel_timeout"), "kernel_timeout"),
        kinds(config.getini("kernel_leftovers"), "kernel_leftovers"),
        seconds(config.getini("kernel_patience"), "kernel_patience"),
        _copy_of_stderr(config),
    )
    config.pluginmanager.register(pytest_tests, "kernel tests")


def _option(config: pytest.Config, name: str) -> Any:
    given = config.getoption(name)
    return config.getini(name) if given is None else given


def _copy_of_stderr(config: pytest.Config) -> int | None:
    try:
        copy = os.dup(sys.stderr.fileno())
    except (AttributeError, ValueError, OSError):  # it is no file
        return None
    config.add_cleanup(lambda: os.close(copy))
    return copy


def _refuse_two_masters(config: pytest.Config) -> None:
    for name, wanted in (("asyncio_mode", "auto"), ("anyio_mode", "auto"), ("trio_mode", True)):
        with suppress(ValueError, KeyError):  # there is no such plugin
            if config.getoption(name, None) == wanted or config.getini(name) == wanted:
                raise pytest.UsageError(
                    f"kernel_mode = auto and {name} = {config.getini(name)} both want every async test. "
                    "Leave one of them strict, and mark its tests."
                )
