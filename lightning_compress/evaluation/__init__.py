"""What compression cost and gained: parameters, bytes, MACs, latency, metrics, and the report that shows them."""
