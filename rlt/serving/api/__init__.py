"""The HTTP of the training API: every route is a few lines over the service."""
