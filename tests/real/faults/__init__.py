"""The shared fleet when replicas and gateways are killed, clients leave, and blocks change while they are copied."""
