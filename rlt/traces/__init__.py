"""A teacher's traces: scored as in training, ranked and filtered into a student's data."""
