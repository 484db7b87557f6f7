"""The kernel among other tools: what makes it work with programs that know nothing of it."""
