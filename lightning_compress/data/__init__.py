"""The data that recipes and tests use, in an order that depends only on seed and epoch."""
