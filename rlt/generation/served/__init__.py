"""Generation by vLLM servers: the servers' side, the trainer's side, and how weights travel."""
