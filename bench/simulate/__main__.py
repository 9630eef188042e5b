"""`python -m bench.simulate`: how each policy would serve a trace on a given number of replicas."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from bench.simulate.flags import parser
from bench.simulate.profiles import ProfileRefused, read_profile
from bench.simulate.report import Run, as_json, draw, print_runs, say
from bench.simulate.runs import Task, make_run
from bench.simulate.traces import TraceRefused


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parser().parse_args(arguments)
    try:
        runs = list(_make(list(_tasks(options)), options.jobs))
        print_runs(runs)
        if options.json:
            options.json.write_text(json.dumps(as_json(runs), indent=1) + "\n")
        if options.plot:
            draw(runs, options.plot)
    except (TraceRefused, ProfileRefused, OSError) as error:
        say(f"{error}")
        return 2
    return 0


def _tasks(options: argparse.Namespace) -> Iterator[Task]:
    profile = read_profile(options.profile, options.profile_file)
    for replicas in options.replicas:
        for rate in options.rates:
            for policy in options.policies:
                yield Task(
                    options.trace,
                    options.requests,
                    profile,
                    policy,
                    replicas,
                    rate,
                    options.copies,
                    options.seed,
                    options.workload,
                )


def _make(tasks: Sequence[Task], jobs: int) -> Iterator[Run]:
    if jobs <= 1:
        yield from (make_run(task, say) for task in tasks)
        return
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(partial(make_run, say=say), tasks)


if __name__ == "__main__":
    sys.exit(main())
