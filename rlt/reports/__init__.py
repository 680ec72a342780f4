"""Parts of report.py's page: curves, tables, completions coloured token by token, several runs side by side."""
