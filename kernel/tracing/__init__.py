"""Looking at a run from outside: instruments, the task tree, the deadlock report, the watchdog."""
