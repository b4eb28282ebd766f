"""`python -m clients.conformance [options] -- <driver command>`: run the scenarios and report the failures."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from .driver import DriverFailed
from .live import run_live
from .runner import Outcome, run_all, running
from .scenario import load


def show(outcome: Outcome) -> None:
    mark = "FAILED" if outcome.problem else "skipped" if outcome.is_left_out else "ok"
    sys.stdout.write(f"{mark:8} {outcome.name}\n" + (f"         {outcome.problem}\n" if outcome.problem else ""))
    sys.stdout.flush()


async def main(arguments: argparse.Namespace) -> int:
    scenarios, live = load()
    only = arguments.only
    async with running(arguments.command) as runner:
        outcomes = await run_all(runner, [each for each in scenarios if only is None or only in each.name], show)
        if arguments.service is not None:
            for each in live:
                if only is None or only in each.name:
                    outcomes.append(await run_live(runner, each, arguments.service, arguments.seed))
                    show(outcomes[-1])
    failed = sum(outcome.problem is not None for outcome in outcomes)
    sys.stdout.write(f"{len(outcomes)} scenarios, {failed} failed\n")
    return 1 if failed or not outcomes else 0


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m clients.conformance", description=__doc__)
    parser.add_argument("--service", metavar="URL", help="also run the live scenarios against this service (http://…)")
    parser.add_argument("--only", metavar="TEXT", help="run only the scenarios whose name contains this text")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random writes in live scenarios")
    parser.add_argument("command", nargs="+", help="command of the driver; {control}, {page} and {folder} are replaced")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(parsed(sys.argv[1:]))))
    except DriverFailed as failed:
        sys.exit(str(failed))
