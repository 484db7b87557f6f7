"""The microkernel. It imports nothing else of the package. Read in this order:

errors, ports, task, traps, scopes, nursery, loop.
"""
