"""A small shop: `python -m example_project.demo` shows what a crash costs it."""
