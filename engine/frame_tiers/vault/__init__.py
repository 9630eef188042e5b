"""Frames in a vault: a Valkey (or Redis) server that several nodes share."""
