"""The nouns every method stands on: where (Select), when (Schedule), what was done (Edit, Journal), and the callback base."""
