"""The networks that recipes and tests use."""
