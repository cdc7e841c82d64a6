"""Replaces layers of any model by products, and back; saves and loads such models."""
