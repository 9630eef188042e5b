"""Without sampling: the cost model learns from every answer."""

from gateway.steering.costs.sampling import Sampling

Sampling.takes = lambda self, now: True  # type: ignore[method-assign]
