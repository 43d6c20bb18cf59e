"""What is public is small, sorted and described."""

import inspect

import pytest

import celery_durable


def test_the_public_names_are_sorted_and_few() -> None:
    assert celery_durable.__all__ == sorted(celery_durable.__all__)
    assert len(celery_durable.__all__) == len(set(celery_durable.__all__)) <= 30


@pytest.mark.parametrize("name", celery_durable.__all__)
def test_a_public_name_is_described(name: str) -> None:
    described = inspect.getdoc(getattr(celery_durable, name))

    assert described
    assert len(described.splitlines()[0]) > 10


@pytest.mark.parametrize("name", celery_durable.__all__)
def test_the_public_methods_of_a_public_class_are_described(name: str) -> None:
    found = getattr(celery_durable, name)
    if not inspect.isclass(found):
        return
    own = {key: value for key, value in vars(found).items() if not key.startswith("_")}
    methods = {key: value for key, value in own.items() if callable(value) or isinstance(value, property | classmethod)}

    assert [key for key in methods if not inspect.getdoc(getattr(found, key))] == []
