"""How tensors become bytes: packings and the container file. A leaf: it imports nothing else of this package."""
