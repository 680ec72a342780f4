"""From raw text and public formats to clean questions and solutions: stages that count every row (docs/data.md)."""
