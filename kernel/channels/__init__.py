"""Channels: values on their way from one task to another.

Reading order: memory (with ends), threads, safe, priority, broadcast, latest.
"""

from .broadcast import (
    BroadcastReceiveChannel,
    BroadcastSendChannel,
    BroadcastStatistics,
    LaggedError,
    open_broadcast_channel,
)
from .latest import LatestReceiveChannel, LatestSendChannel, open_latest_channel
from .memory import MemoryChannelStatistics, MemoryReceiveChannel, MemorySendChannel, open_memory_channel
from .priority import PriorityReceiveChannel, PrioritySendChannel, open_priority_channel
from .safe import as_safe_channel
from .threads import ThreadReceiveChannel, ThreadSendChannel

__all__ = [
    "BroadcastReceiveChannel",
    "BroadcastSendChannel",
    "BroadcastStatistics",
    "LaggedError",
    "LatestReceiveChannel",
    "LatestSendChannel",
    "MemoryChannelStatistics",
    "MemoryReceiveChannel",
    "MemorySendChannel",
    "PriorityReceiveChannel",
    "PrioritySendChannel",
    "ThreadReceiveChannel",
    "ThreadSendChannel",
    "as_safe_channel",
    "open_broadcast_channel",
    "open_latest_channel",
    "open_memory_channel",
    "open_priority_channel",
]
