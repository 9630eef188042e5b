"""What keeps a measurement from being made."""

from gateway.errors import GatewayError


class NotMeasured(GatewayError):
    """The installation can not be measured; the message says why and what to do."""
