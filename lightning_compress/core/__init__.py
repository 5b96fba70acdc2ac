"""The nouns every method stands on: where (Select), when (Schedule), what was done (Journal), and the callback base."""
