"""What vLLM needs on a processor: settings, seeded sampling, norms."""
