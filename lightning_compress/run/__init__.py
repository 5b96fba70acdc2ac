"""What the command does with a configuration: find it, check it, keep a run's folder, run a task, compare a sweep."""
