"""placeholder"""

from __future__ import annotations

from .runner import Outcome, Runner
from .scenario import Live


async def run_live(runner: Runner, live: Live, service: str, seed: int | None) -> Outcome:
    raise NotImplementedError
