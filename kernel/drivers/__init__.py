"""The drivers, each serving one port of the core (see `kernel.core.ports`). None imports another."""
