"""vLLM's worker for the CPU without a defect: a seeded request whose prompt took more than one step ended the engine.

For each step that computes a part of a prompt vLLM samples a token, throws it away, and turns the request's generator back
(`GPUModelRunner._bookkeeping_sync`, seen in 0.32) by way of `torch.Generator.get_offset`, which generators on the CPU do not
have. Started by `--worker-cls`, vLLM's own option for that.
"""

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_worker import CPUWorker


class RewindsGenerators:
    """A mixin placed before a model runner's class. If a later vLLM no longer calls it, it does no harm."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in _discarded(self).values()]
        sampled = super()._sample(*args, **kwargs)  # type: ignore[misc]
        for generator, state in states:
            generator.set_state(state)
        return sampled

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        rewound = _discarded(self)
        generators = self.input_batch.generators  # type: ignore[attr-defined]
        for place in rewound:
            del generators[place]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]
        finally:
            generators.update(rewound)


class CpuWorker(CPUWorker):  # type: ignore[misc]
    """One replica's worker."""

    def init_device(self) -> None:
        """Make the model runner, with its generators rewound."""
        super().init_device()
        runner = self.model_runner
        runner.__class__ = type("CpuModelRunner", (RewindsGenerators, type(runner)), {})


def _discarded(runner: Any) -> dict[int, Any]:
    """The generators, by place in the batch, of requests whose sampled token is thrown away in this step."""
    batch = runner.input_batch
    if not batch.generators:
        return {}
    places = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
    return {place: batch.generators[place] for place in places if place in batch.generators}
