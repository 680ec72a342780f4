"""The training API: a server that several clients train and sample through, and what its messages mean."""
