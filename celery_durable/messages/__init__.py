"""The only code that knows what a Celery message looks like."""
