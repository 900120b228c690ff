"""Adapters to other libraries' trainers, each of which needs that library."""
