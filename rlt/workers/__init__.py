"""Who executes the training API's requests: processes of their own that train adapters on shared bases, and sample."""
