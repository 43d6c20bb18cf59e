"""Integrations that a project opts into."""
