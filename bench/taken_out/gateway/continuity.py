"""Without what is kept of streams so that another replica can go on with them."""

from gateway.relay.going_on import GoingOn

GoingOn.tape = lambda self, *request: None  # type: ignore[method-assign]
