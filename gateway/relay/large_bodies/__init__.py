"""Bodies too large for the event loop, read by processes of their own: `pool` is in the gateway, `worker` in such a process."""
