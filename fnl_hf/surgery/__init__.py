"""Layers of any model replaced by products, and back; how such models are saved and loaded."""
