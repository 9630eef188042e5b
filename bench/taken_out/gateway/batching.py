"""Without requests that wait for each other: each is planned and sent as soon as it is read."""

from gateway.relay import batching

batching.WAITING_MAX = 0
