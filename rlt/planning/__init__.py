"""Before a run: a run that cannot work is refused here in one line, before anything heavy is imported."""
