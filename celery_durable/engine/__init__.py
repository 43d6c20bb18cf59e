"""Replay of recorded steps; knows neither Celery nor SQL."""
