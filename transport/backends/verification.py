"""The check after every copy: a block counts only if its owner still vouches for it. The central rule: any doubt is a miss."""

from transport.backends.base import BlockSource, ImportJob


def check(job: ImportJob, reader: BlockSource) -> tuple[tuple[int, ...], int, str]:
    """Return (failed target blocks, how many of them changed, why) for a copy that is complete.

    Every doubt fails: a block whose state moved on may have been overwritten under the copy, a dead owner vouches for nothing.
    """
    if reader.epoch != job.epoch or not reader.alive():
        return tuple(job.target_blocks.tolist()), 0, f"{job.source} ended while it was read"
    stale = ~reader.unchanged(job.source_blocks, job.states)
    if not stale.any():
        return (), 0, ""
    count = int(stale.sum())
    return (
        tuple(job.target_blocks[stale].tolist()),
        count,
        f"{count} blocks of {job.source} were reallocated while they were read",
    )
