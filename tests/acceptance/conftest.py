"""A project per test on fresh servers' databases."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.harness import Project


@pytest.fixture
def project(tmp_path: Path, fresh_postgres_url: str, redis_url: str) -> Iterator[Project]:
    """The test project on PostgreSQL and Redis, migrated, with its app loaded as `project.module`."""
    made = Project(tmp_path, store=fresh_postgres_url, broker=redis_url, backend=redis_url)
    made.load().durable.migrate()
    yield made
