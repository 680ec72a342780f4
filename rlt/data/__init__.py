"""Where rows come from: files, a generator, benchmarks, the hub; and how they are split."""
