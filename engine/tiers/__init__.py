"""Tiers below the KV memory of the engines. Host memory: kept by the host process, written by one replica, read by all."""
