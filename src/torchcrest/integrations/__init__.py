"""Adapters to the trainers of other libraries, each with an extra of its own."""
