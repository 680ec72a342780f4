"""Parts of report.py's page: curves, and completions coloured token by token."""
