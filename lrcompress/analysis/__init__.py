"""What a model's layers use of their dimensions: numbers, findings, pictures."""
