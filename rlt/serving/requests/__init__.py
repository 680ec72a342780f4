"""Requests that are answered later: kept, put in order, executed once, and polled for."""
