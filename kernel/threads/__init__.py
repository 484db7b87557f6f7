"""Worker threads: the cache they come from, calls into them and out of them, and other people's executors.

`kernel.to_thread` and `kernel.from_thread` are the doors.
"""
