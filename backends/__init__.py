"""Where a policy trains: how several processes share its weights, gradients and optimizer states."""
