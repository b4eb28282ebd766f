"""Read the metrics of a service."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.support.service import DEADLINE_SECONDS, Service, eventually

Sample = tuple[str, tuple[tuple[str, str], ...]]  # a name, and labels sorted by name


async def metrics_of(service: Service) -> dict[Sample, float]:
    async with service.anyone() as client:
        answer = await client.get("/metrics")
        assert answer.status_code == 200
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }


async def metric(service: Service, name: str, **labels: str) -> float:
    return (await metrics_of(service)).get((name, tuple(sorted(labels.items()))), 0.0)


async def metric_becomes(
    service: Service, name: str, expected: float, seconds: float = DEADLINE_SECONDS, **labels: str
) -> None:
    async def is_equal() -> bool:
        return await metric(service, name, **labels) == expected

    await eventually(is_equal, f"{name} is {expected}", seconds)
